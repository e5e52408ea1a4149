"""Things that only a fresh process shows: import order, missing GL, what importing pulls in."""

import os
import subprocess
import sys

RENDER_THEN_TRAIN = """
import gymnasium, sims
env = gymnasium.make("enerverse/Lift-v0")
obs, _ = env.reset(seed=0)
import torch
layer = torch.nn.Linear(4, 2)
optimiser = torch.optim.AdamW(layer.parameters())
layer(torch.ones(1, 4)).sum().backward()
optimiser.step()
env.step(env.action_space.sample() * 0)
print("mean", obs["images"]["front"].mean() > 5, torch.isfinite(layer.weight).all().item())
"""

NO_TORCH = """
import sys, sims
print([name for name in ("torch", "triton", "OpenGL.GL") if name in sys.modules])
"""

NO_GL = """
import gymnasium, sims
env = gymnasium.make("enerverse/Lift-v0", cameras=())
env.reset(seed=0)
try:
    env.unwrapped.render_camera("front")
except RuntimeError as problem:
    print(problem)
"""


def run(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    assert "Exception ignored" not in result.stderr
    return result.stdout.strip()


def test_render_then_train():
    assert run(RENDER_THEN_TRAIN) == "mean True True"


def test_import_is_light():
    assert run(NO_TORCH) == "[]"


def test_missing_gl_names_the_packages():
    message = run(NO_GL, MUJOCO_GL="glfw", DISPLAY="")
    assert message.startswith("rendering: expected a working OpenGL off-screen context")
    assert "libegl1 libgl1 libgles2" in message
