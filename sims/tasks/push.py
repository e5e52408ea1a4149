"""Push a white cube onto a coloured disc."""

import numpy as np

from sims.simulation import Simulation
from sims.tasks.base import (
    COLOURS,
    CUBE_HALF,
    Facts,
    Task,
    choose,
    cube_xml,
    disc_xml,
    sample_xy,
    wrap_quarter,
)

ARRIVED = 0.03  # metres between the centres in the plane


class Push(Task):
    """Instruction "push the white cube to the {colour} disc": done when their centres are within 3 cm."""

    name = "Push"
    objects = ("cube", "disc")
    max_steps = 120
    colours = ("red", "green", "blue", "yellow")

    def xml(self) -> str:
        """One free cube and a disc of 3.5 cm radius."""
        return cube_xml("cube") + disc_xml("disc", (0.6, 0.0), 0.035)

    def reset(self, sim: Simulation, rng: np.random.Generator, spread: float) -> str:
        """The disc lies 11-16 cm from the cube, within 60 degrees of straight ahead."""
        colour = choose(rng, self.colours)
        cube = sample_xy(rng, (0.03, 0.07), spread) - np.array([0.04, 0.0])
        angle = rng.uniform(-1.0, 1.0)
        disc = cube + rng.uniform(0.11, 0.16) * np.array([np.cos(angle), np.sin(angle)])
        sim.place("cube", (*cube, CUBE_HALF), rng.uniform(-0.3, 0.3))
        sim.paint("cube", COLOURS["white"])
        sim.place("disc", (*disc, 0.002))
        sim.paint("disc", COLOURS[colour])
        return f"push the white cube to the {colour} disc"

    def succeeded(self, sim: Simulation) -> bool:
        """The cube stands on the disc."""
        return bool(np.linalg.norm((sim.position("cube") - sim.position("disc"))[:2]) < ARRIVED)

    def facts(self, sim: Simulation) -> Facts:
        """The cube and the disc."""
        return Facts(
            object_position=sim.position("cube"),
            object_yaw=wrap_quarter(sim.yaw("cube")),
            goal_position=sim.position("disc"),
        )
