"""The simulator as the verbs use it: environments by task name, the scripted expert, demonstrations in memory."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import gymnasium

    from sims.experts import Expert
    from sims.rollout import Rollout

BACKENDS = ("egl", "osmesa", "glfw")
OFF = ("0", "no", "off", "false", "disable", "disabled")  # mujoco's words for "no OpenGL"


def check_task(task: str) -> str:
    """`task` when it is one of the simulator's; ValueError names the closest one when not."""
    check_backend()
    from enerverse.config import unknown
    from sims.tasks import TASKS

    if task not in TASKS:
        raise unknown("task", task, TASKS)
    return task


def check_backend() -> None:
    """ValueError where MUJOCO_GL turns rendering off or names no OpenGL backend, before mujoco fails on it."""
    chosen = os.environ.get("MUJOCO_GL", "").lower().strip()
    if (
        chosen in ("", *BACKENDS) or "sims.gl" in sys.modules
    ):  # `sims` itself turns OpenGL off where there is none
        return
    why = ", which turns rendering off" if chosen in OFF else ""
    raise ValueError(f"MUJOCO_GL: expected one of {', '.join(BACKENDS)}, got {chosen!r}{why}; unset it")


def make_env(task: str, **options: Any) -> gymnasium.Env:
    """The environment of a task; ValueError names the closest task when there is none."""
    check_task(task)
    import gymnasium

    import sims  # noqa: F401 - registers the environments

    return gymnasium.make(f"enerverse/{task}-v0", **options)


def episode_rng(seed: int) -> np.random.Generator:
    """The noise of the episode of `seed`; its first number decides whether the episode is disturbed."""
    return np.random.default_rng((7, seed))


def is_disturbed(seed: int, clean_share: float) -> bool:
    """Whether the recorded episode of `seed` was disturbed, where `clean_share` of the episodes were not."""
    return episode_rng(seed).random() >= clean_share


class SeededExpert:
    """The scripted expert as a recording policy: noise depends on the episode's seed alone."""

    needs_pictures = False

    def __init__(self, env: gymnasium.Env, noise: float, clean_share: float = 0.0):
        self.env, self.noise, self.clean_share = env, noise, clean_share

    def reset(self, seed: int) -> None:
        """Start the episode of `seed`."""
        from sims.experts import make_expert

        rng = episode_rng(seed)
        noise = 0.0 if rng.random() < self.clean_share else self.noise
        self.expert: Expert = make_expert(self.env, noise=noise, rng=rng)

    def act(self, obs: dict[str, Any], info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Executed action and clean label, each [7]."""
        return self.expert.act(obs, info)


def check_seed(seed: int) -> None:
    """ValueError for a seed that the simulator cannot take."""
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")


def demonstrate(task: str, views: tuple[str, ...], size: int, count: int, seed: int) -> list[Rollout]:
    """`count` successful demonstrations with the usual disturbance, from `seed` on, kept in memory."""
    env = make_env(task, cameras=views, image_size=size)
    from sims.rollout import rollout

    expert, kept = SeededExpert(env, noise=1.0), []
    try:
        for current in range(seed, seed + 10 * count):
            expert.reset(current)
            played = rollout(env, expert, current)
            kept += [played] if played.success else []
            if len(kept) == count:
                return kept
    finally:
        env.close()
    raise ValueError(f"{task}: expected {count} demonstrations from seed {seed} on, got {len(kept)}")
