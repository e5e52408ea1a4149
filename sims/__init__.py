"""Tabletop manipulation in MuJoCo, registered with Gymnasium as ``enerverse/<Task>-v0``."""

import os

# Without a display MuJoCo would try GLFW and fail; the choice must be made before mujoco is imported.
if not os.environ.get("MUJOCO_GL") and not os.environ.get("DISPLAY"):
    os.environ["MUJOCO_GL"] = "egl"

# Software GL gains nothing from threads on small pictures, and a forked worker would wait forever for the
# parent's threads.
os.environ.setdefault("LP_NUM_THREADS", "0")

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
