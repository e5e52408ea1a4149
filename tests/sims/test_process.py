"""Things that only a fresh process shows: import order, missing GL, what importing pulls in."""

import os
import subprocess
import sys

import pytest

from sims.gl import choose_backend

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
import ctypes.util
ctypes.util.find_library = lambda name: None
import gymnasium, sims
env = gymnasium.make("enerverse/Lift-v0", cameras=())
env.reset(seed=0)
try:
    env.unwrapped.render_camera("front")
except RuntimeError as problem:
    print(problem)
"""


def run(code, **environment):
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables)
    assert result.returncode == 0, result.stderr
    assert "Exception ignored" not in result.stderr
    return result.stdout.strip()


def test_render_then_train():
    assert run(RENDER_THEN_TRAIN) == "mean True True"


def test_import_is_light():
    assert run(NO_TORCH) == "[]"


@pytest.mark.parametrize("backend", ["", "egl", "osmesa", "glfw"])
def test_missing_gl_names_the_packages(backend):
    message = run(NO_GL, MUJOCO_GL=backend, DISPLAY=None)
    assert message.startswith("rendering: expected a working OpenGL off-screen context")
    assert "libegl1 libgl1 libgles2" in message


def test_backend_choice(monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name == "OSMesa" else None)
    assert choose_backend("", has_display=False) == "osmesa"
    assert choose_backend("", has_display=True) == ""
    assert choose_backend("egl", has_display=True) == "disable"
    assert choose_backend("glfw", has_display=False) == "glfw"
