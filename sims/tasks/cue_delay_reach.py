"""Remember a colour that was shown briefly, wait for the go signal, then reach the cube of that colour."""

import numpy as np

from sims.errors import expect
from sims.simulation import Simulation
from sims.tasks.base import COLOURS, CUBE_HALF, Facts, Task, cube_xml, disc_xml

CUE_FRAMES = 8
REACHED = 0.03  # metres between the TCP and the middle of a cube's top
SLOTS = ((0.49, 0.10), (0.49, 0.0), (0.49, -0.10))
DARK = (0.05, 0.05, 0.05)


class CueDelayReach(Task):
    """Three cubes in shuffled slots; a lamp shows one colour in frames 0-7, a second lamp brightens until
    frame ``8 + delay``. From that frame on the TCP must come within 3 cm of the top of the shown cube.
    Touching a wrong cube, or any cube too early, ends the episode. With ``markov=True`` the lamp keeps
    showing the colour.
    """

    name = "CueDelayReach"
    objects = ("cube_0", "cube_1", "cube_2", "cue_lamp", "timer_lamp")
    colours = ("red", "green", "blue")

    def __init__(self, *, delay: int = 64, markov: bool = False) -> None:
        expect(
            isinstance(delay, int) and delay >= 0,
            "delay",
            "a whole number of control steps >= 0",
            repr(delay),
        )
        self.delay = delay
        self.markov = markov
        self.go_step = CUE_FRAMES + delay
        self.max_steps = self.go_step + 28

    def xml(self) -> str:
        """Three fixed cubes in a row and two lamps in front of them."""
        cubes = "".join(cube_xml(f"cube_{i}", slot, fixed=True) for i, slot in enumerate(SLOTS))
        lamps = disc_xml("cue_lamp", (0.64, 0.10), 0.055) + disc_xml("timer_lamp", (0.64, -0.10), 0.045)
        return cubes + lamps

    def reset(self, sim: Simulation, rng: np.random.Generator, spread: float) -> str:
        """Shuffle the colours over the slots and draw the cue."""
        order = rng.permutation(3)
        self.cue = int(rng.integers(3))
        self.cued_cube = f"cube_{int(np.flatnonzero(order == self.cue)[0])}"
        for index, slot in enumerate(SLOTS):
            shift = spread * rng.uniform(-0.01, 0.01, 2)
            sim.place(f"cube_{index}", (slot[0] + shift[0], slot[1] + shift[1], CUBE_HALF))
            sim.paint(f"cube_{index}", COLOURS[self.colours[order[index]]])
        self.step = 0
        return f"reach the cube that {'is' if self.markov else 'was'} shown"

    def update(self, sim: Simulation, step: int) -> None:
        """Set both lamps for frame ``step``."""
        self.step = step
        shown = self.markov or step < CUE_FRAMES
        sim.paint("cue_lamp", COLOURS[self.colours[self.cue]] if shown else DARK)
        sim.paint("timer_lamp", (self.timer,) * 3)

    @property
    def timer(self) -> float:
        """Level of the timer lamp, 0 at reset to 1 at the go signal."""
        return min(1.0, self.step / self.go_step)

    def _reached(self, sim: Simulation) -> str | None:
        """The cube whose top the TCP has reached, if any."""
        for name in self.objects[:3]:
            top = sim.position(name) + np.array([0.0, 0.0, CUBE_HALF])
            if np.linalg.norm(sim.tcp_position() - top) < REACHED:
                return name
        return None

    def succeeded(self, sim: Simulation) -> bool:
        """At the shown cube, after the go signal."""
        return self.step >= self.go_step and self._reached(sim) == self.cued_cube

    def failed(self, sim: Simulation) -> bool:
        """At a wrong cube, or at any cube before the go signal."""
        reached = self._reached(sim)
        return reached is not None and not (reached == self.cued_cube and self.step >= self.go_step)

    def facts(self, sim: Simulation) -> Facts:
        """The cued cube, the TCP goal 1.5 cm above its top, the cue and the clock."""
        cube = sim.position(self.cued_cube)
        return Facts(
            object_position=cube,
            goal_position=cube + np.array([0.0, 0.0, CUBE_HALF + 0.015]),
            cue=(float(self.cue == 0), float(self.cue == 1), float(self.cue == 2)),
            go=self.step >= self.go_step,
            timer=self.timer,
        )
