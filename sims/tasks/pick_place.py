"""Put a cube into the bin of a named colour."""

import numpy as np

from sims.simulation import Simulation
from sims.tasks.base import COLOURS, CUBE_HALF, Facts, Task, choose, cube_xml, sample_xy, wrap_quarter

INNER = 0.045  # half side of a bin's inside, metres
WALL = 0.004  # half thickness
HEIGHT = 0.015  # half height
BIN_OFFSET = 0.17  # the bins stand this far left and right of the middle
RELEASED = 0.062  # finger opening beyond which a 5 cm cube is free, metres


def _bin_xml(name: str, y: float) -> str:
    side = INNER + WALL
    walls = (
        (side, 0, HEIGHT, WALL, side + WALL, HEIGHT),
        (-side, 0, HEIGHT, WALL, side + WALL, HEIGHT),
        (0, side, HEIGHT, side, WALL, HEIGHT),
        (0, -side, HEIGHT, side, WALL, HEIGHT),
        (0, 0, 0.002, side, side, 0.002),
    )
    geoms = "".join(
        f'<geom name="{name}_{i}" class="object" type="box" pos="{x} {y_} {z}" size="{a} {b} {c}"/>'
        for i, (x, y_, z, a, b, c) in enumerate(walls)
    )
    return f'<body name="{name}" pos="0.53 {y} 0">{geoms}</body>'


class PickPlace(Task):
    """Instruction "put the cube in the {colour} bin": done when it lies in the named bin, let go."""

    name = "PickPlace"
    objects = ("cube", "bin_left", "bin_right")
    max_steps = 120
    colours = ("red", "green", "blue")

    def xml(self) -> str:
        """One free cube between two open bins."""
        return cube_xml("cube") + _bin_xml("bin_left", BIN_OFFSET) + _bin_xml("bin_right", -BIN_OFFSET)

    def reset(self, sim: Simulation, rng: np.random.Generator, spread: float) -> str:
        """Two of three colours on random sides; one of the two is asked for."""
        left, right = (self.colours[i] for i in rng.permutation(3)[:2])
        self.target = choose(rng, ("bin_left", "bin_right"))
        sim.paint("bin_left", COLOURS[left])
        sim.paint("bin_right", COLOURS[right])
        sim.paint("cube", COLOURS[choose(rng, ("white", "yellow"))])
        shift = spread * rng.uniform(-0.015, 0.015, 2)
        sim.place("bin_left", (0.53 + shift[0], BIN_OFFSET, 0.0))
        sim.place("bin_right", (0.53 + shift[1], -BIN_OFFSET, 0.0))
        position = sample_xy(rng, (0.07, 0.03), spread)
        sim.place("cube", (*position, CUBE_HALF), rng.uniform(-0.4, 0.4))
        return f"put the cube in the {left if self.target == 'bin_left' else right} bin"

    def succeeded(self, sim: Simulation) -> bool:
        """Inside the walls, low, and let go."""
        offset = sim.position("cube") - sim.position(self.target)
        inside = np.abs(offset[:2]).max() < INNER and offset[2] < 0.05
        return bool(inside and sim.finger_width() > RELEASED)

    def facts(self, sim: Simulation) -> Facts:
        """The cube and the named bin."""
        return Facts(
            object_position=sim.position("cube"),
            object_yaw=wrap_quarter(sim.yaw("cube")),
            goal_position=sim.position(self.target),
        )
