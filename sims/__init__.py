"""Tabletop manipulation in MuJoCo, registered with Gymnasium as ``enerverse/<Task>-v0``."""

# ruff: noqa: E402  The OpenGL backend must be chosen before mujoco is imported.

from sims.gl import prepare_environment

prepare_environment()

import gymnasium

from sims.cameras import CAMERAS
from sims.env import TabletopEnv
from sims.randomization import Randomization
from sims.rendering import MODALITIES
from sims.tasks import TASKS

for _name in TASKS:
    gymnasium.register(f"enerverse/{_name}-v0", entry_point="sims.env:TabletopEnv", kwargs={"task": _name})
gymnasium.register(
    "enerverse/CueDelayReachMarkov-v0",
    entry_point="sims.env:TabletopEnv",
    kwargs={"task": "CueDelayReach", "markov": True},
)

__all__ = ["CAMERAS", "MODALITIES", "TASKS", "Randomization", "TabletopEnv"]
