"""Rigid bodies by name: which there are, where they are, and which of them a picture shows.

Named are the bodies that carry something visible and can move (links, hand and fingers of the robot, drawers), and
all objects of the task, which may also stand still within an episode (bins, discs, lamps).
"""

# pyright: reportAttributeAccessIssue=false
# mujoco's names come from compiled modules without stubs.

from collections.abc import Sequence

import mujoco
import numpy as np


def find_bodies(model: mujoco.MjModel, objects: Sequence[str]) -> tuple[str, ...]:
    """Names of the bodies: the robot's from base to fingertips, then the task's ``objects`` in their order."""
    named = (model.body(i) for i in range(1, model.nbody))
    robot = (b.name for b in named if b.weldid[0] != 0 and b.geomnum[0] > 0 and b.name not in objects)
    return (*robot, *objects)


def body_of_geom(model: mujoco.MjModel, bodies: Sequence[str]) -> np.ndarray:
    """Body id uint8 of each geom: 1 + index in ``bodies``, 0 for all else; the last entry serves geom id -1."""
    ids = np.zeros(model.nbody, np.uint8)
    ids[[model.body(name).id for name in bodies]] = np.arange(1, len(bodies) + 1)
    return np.append(ids[model.geom_bodyid], np.uint8(0))


def body_poses(model: mujoco.MjModel, data: mujoco.MjData, bodies: Sequence[str]) -> dict[str, np.ndarray]:
    """World pose [7] float64 of each body: x y z in metres, then the quaternion wxyz."""
    rows = {name: model.body(name).id for name in bodies}
    return {name: np.concatenate([data.xpos[row], data.xquat[row]]) for name, row in rows.items()}
