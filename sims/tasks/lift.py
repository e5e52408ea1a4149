"""Lift a cube of a named colour."""

import numpy as np

from sims.simulation import Simulation
from sims.tasks.base import COLOURS, CUBE_HALF, Facts, Task, choose, cube_xml, sample_xy, wrap_quarter

LIFTED = 0.09  # metres, height of the cube's centre


class Lift(Task):
    """Instruction "lift the {colour} cube": done when its centre is more than 9 cm above the table."""

    name = "Lift"
    objects = ("cube",)
    max_steps = 80
    colours = ("red", "green", "blue", "yellow")

    def xml(self) -> str:
        """One free cube."""
        return cube_xml("cube")

    def reset(self, sim: Simulation, rng: np.random.Generator, spread: float) -> str:
        """Random colour, position and yaw."""
        colour = choose(rng, self.colours)
        position = sample_xy(rng, (0.08, 0.13), spread)
        sim.place("cube", (*position, CUBE_HALF), rng.uniform(-0.4, 0.4))
        sim.paint("cube", COLOURS[colour])
        return f"lift the {colour} cube"

    def succeeded(self, sim: Simulation) -> bool:
        """The cube is in the air."""
        return bool(sim.position("cube")[2] > LIFTED)

    def facts(self, sim: Simulation) -> Facts:
        """The cube, and the point 15 cm above its place."""
        cube = sim.position("cube")
        return Facts(
            object_position=cube,
            object_yaw=wrap_quarter(sim.yaw("cube")),
            goal_position=np.array([cube[0], cube[1], 0.15]),
        )
