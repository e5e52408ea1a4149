"""What a task is: the objects it adds, how an episode starts, and when it is done."""

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from sims.simulation import Simulation

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.10),
    "green": (0.10, 0.66, 0.18),
    "blue": (0.12, 0.28, 0.92),
    "yellow": (0.95, 0.84, 0.10),
    "white": (0.96, 0.96, 0.96),
}
CUBE_HALF = 0.025  # metres
WORKSPACE_CENTRE = np.array([0.51, 0.0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """The task's part of ``info["privileged"]``; metres and radians in the world frame."""

    object_position: np.ndarray  # [3] what the task handles: cube, drawer handle or cued cube
    object_yaw: float = 0.0  # wrapped to a cube's quarter turn
    goal_position: np.ndarray  # [3] where it, or the TCP, should end
    drawer_opening: float = 0.0
    cue: tuple[float, float, float] = (0.0, 0.0, 0.0)  # one-hot red, green, blue
    go: bool = False
    timer: float = 0.0  # 0 at reset, 1 at the go signal


class Task(ABC):
    """Base of all tasks. One instance belongs to one environment and keeps only the current episode's
    choices.
    """

    name: ClassVar[str]
    objects: ClassVar[tuple[str, ...]]  # body names; segmentation class 2 + index
    max_steps: int = 100

    @abstractmethod
    def xml(self) -> str:
        """MJCF bodies of the task."""

    @abstractmethod
    def reset(self, sim: "Simulation", rng: np.random.Generator, spread: float) -> str:
        """Place and paint the objects (ranges times ``spread``); return the instruction."""

    def update(self, sim: "Simulation", step: int) -> None:  # noqa: B027 - most tasks change nothing
        """Change what the scene shows at frame ``step``; called before each picture."""

    @abstractmethod
    def succeeded(self, sim: "Simulation") -> bool:
        """Whether the goal holds now."""

    def failed(self, sim: "Simulation") -> bool:
        """Whether the episode is lost for good."""
        return False

    @abstractmethod
    def facts(self, sim: "Simulation") -> Facts:
        """Privileged task state."""


def cube_xml(name: str, position: tuple[float, float] = (0.5, 0.0), *, fixed: bool = False) -> str:
    """A 5 cm cube of 100 g on the table; a fixed one is part of the scenery."""
    joint = "" if fixed else f'<freejoint name="{name}"/>'
    return (
        f'<body name="{name}" pos="{position[0]} {position[1]} {CUBE_HALF}">{joint}'
        f'<geom name="{name}" class="object" type="box" size="{CUBE_HALF} {CUBE_HALF} {CUBE_HALF}"'
        ' mass="0.1"/></body>'
    )


def disc_xml(name: str, position: tuple[float, float], radius: float) -> str:
    """A flat disc on the table that nothing collides with."""
    return (
        f'<body name="{name}" pos="{position[0]} {position[1]} 0.002"><geom name="{name}" class="visual"'
        f' type="cylinder" size="{radius} 0.002"/></body>'
    )


def choose(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    """One of ``names``, uniformly."""
    return names[int(rng.integers(len(names)))]


def sample_xy(rng: np.random.Generator, half: tuple[float, float], spread: float) -> np.ndarray:
    """A point [2] around the workspace centre, uniform in a box of half sides ``half`` times ``spread``."""
    return WORKSPACE_CENTRE + spread * rng.uniform(-1.0, 1.0, 2) * np.asarray(half)


def wrap_quarter(yaw: float) -> float:
    """Yaw of a cube modulo its quarter-turn symmetry, in [-pi/4, pi/4)."""
    return (yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4
