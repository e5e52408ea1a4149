"""What the experts decide: from the visible state to the next move, one function per task.

The functions read only ``obs["state"]`` and ``info["privileged"]`` and remember nothing, so a Markov policy
can learn them.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

OPEN, CLOSED = 1.0, -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """The two vectors an expert sees, by name; metres, radians, world frame."""

    state: np.ndarray
    privileged: np.ndarray

    @property
    def tcp(self) -> np.ndarray:
        """Measured TCP position [3]."""
        return self.state[0:3]

    @property
    def command(self) -> np.ndarray:
        """Commanded TCP position [3]; steps add to this one."""
        return self.state[0:3] + self.state[8:11]

    @property
    def yaw(self) -> float:
        """Yaw of the hand; 0 when the fingers spread along y. For a near-vertical hand q = (0, c, s, 0)."""
        return float(2.0 * np.arctan2(self.state[5], self.state[4]))

    @property
    def width(self) -> float:
        """Opening between the fingertips."""
        return float(self.state[7])

    @property
    def thing(self) -> np.ndarray:
        """Position [3] of the object."""
        return self.privileged[0:3]

    @property
    def thing_yaw(self) -> float:
        """Yaw of the object within a quarter turn."""
        return float(self.privileged[3])

    @property
    def goal(self) -> np.ndarray:
        """Goal position [3]."""
        return self.privileged[4:7]

    @property
    def closed(self) -> bool:
        """Whether the fingers were last told to close."""
        return bool(self.privileged[16] < 0)

    @property
    def lateral(self) -> float:
        """Horizontal distance of the TCP from the object."""
        return float(np.linalg.norm((self.tcp - self.thing)[:2]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """Where to go now: TCP target [3], hand yaw, gripper, speed in action units, factor on the action
    noise.
    """

    target: np.ndarray
    gripper: float
    noise: float
    yaw: float = 0.0
    speed: float = 1.0


def _at(xy: np.ndarray, z: float) -> np.ndarray:
    return np.array([xy[0], xy[1], z])


def _seize(view: View, *, hover: float, full: float) -> Move | None:
    """Come from above and close the fingers; ``None`` once they hold something thinner than ``full``
    metres.
    """
    above = float(view.tcp[2] - view.thing[2])
    if view.closed and view.lateral < 0.03 and abs(above) < 0.03:
        if view.width > full:
            return Move(target=view.command, yaw=view.thing_yaw, gripper=CLOSED, noise=0.0)
        return None
    if view.lateral > 0.018:
        return Move(
            target=_at(view.thing, view.thing[2] + hover),
            yaw=view.thing_yaw,
            gripper=OPEN,
            noise=1.0,
            speed=0.65,
        )
    ready = view.lateral < 0.01 and above < 0.01
    gripper = CLOSED if ready and view.width > 0.07 else OPEN
    return Move(
        target=view.thing, yaw=view.thing_yaw, gripper=gripper, noise=0.8 if above > 0.03 else 0.0, speed=0.5
    )


def lift(view: View) -> Move:
    """Seize the cube and go up."""
    goal = _at(view.command, 0.16)
    return _seize(view, hover=0.075, full=0.056) or Move(
        target=goal, yaw=view.thing_yaw, gripper=CLOSED, noise=0.4, speed=0.5
    )


def pick_place(view: View) -> Move:
    """Seize the cube, carry it over the bin, lower it, let go and leave."""
    offset = np.linalg.norm((view.thing - view.goal)[:2])
    if not view.closed and offset < 0.05:
        return Move(target=_at(view.command, 0.15), gripper=OPEN, noise=0.3)
    grasp = _seize(view, hover=0.075, full=0.056)
    if grasp is not None:
        return grasp
    if offset > 0.02:
        height = view.tcp[2]
        # Rise first, drift sideways only once the cube clears the walls.
        across = np.clip((height - 0.055) / 0.03, 0.0, 1.0)
        xy = view.command[:2] + across * (view.goal - view.command)[:2]
        return Move(target=_at(xy, 0.12), gripper=CLOSED, noise=0.4, speed=0.8)
    low = view.tcp[2] < 0.055
    return Move(target=_at(view.goal, 0.045), gripper=OPEN if low else CLOSED, noise=0.3, speed=0.6)


def push(view: View) -> Move:
    """Go behind the cube as seen from the disc, down, and push along the line between them."""
    offset = (view.goal - view.thing)[:2]
    remaining = float(np.linalg.norm(offset))
    if remaining < 0.012:
        return Move(target=_at(view.command, 0.10), gripper=CLOSED, noise=0.0)
    along = offset / max(remaining, 1e-6)
    across = np.array([-along[1], along[0]])
    behind = view.thing[:2] - 0.065 * along
    relative = (view.tcp - view.thing)[:2]
    aside, ahead = float(relative @ across), float(relative @ along)
    yaw = float(np.clip(np.arctan2(along[1], along[0]), -0.7, 0.7))
    if view.tcp[2] > 0.04:
        far = np.linalg.norm(view.tcp[:2] - behind) > 0.02
        return Move(
            target=_at(behind, 0.09 if far else 0.025),
            yaw=yaw,
            gripper=CLOSED,
            noise=1.0 if far else 0.5,
            speed=0.75,
        )
    if abs(aside) > 0.03 or ahead > -0.025:
        return Move(target=_at(view.command, 0.10), yaw=yaw, gripper=CLOSED, noise=0.0)
    step = view.command[:2] + along * min(0.03, remaining + 0.004) - across * 0.6 * aside
    return Move(target=_at(step, 0.025), yaw=yaw, gripper=CLOSED, noise=0.35, speed=0.5)


def open_drawer(view: View) -> Move:
    """Seize the handle and pull until the drawer is out."""
    grasp = _seize(view, hover=0.075, full=0.022)
    return grasp or Move(target=view.goal, gripper=CLOSED, noise=0.3, speed=0.6)


def cue_delay_reach(view: View) -> Move:
    """Stay near home until the go signal, then reach the cued cube."""
    if view.privileged[11] > 0.5:
        return Move(target=view.goal, gripper=OPEN, noise=0.6, speed=0.9)
    return Move(target=view.privileged[13:16], gripper=OPEN, noise=0.0, speed=0.3)


MOVES: dict[str, Callable[[View], Move]] = {
    "Lift": lift,
    "Push": push,
    "PickPlace": pick_place,
    "OpenDrawer": open_drawer,
    "CueDelayReach": cue_delay_reach,
}
