"""Pull a drawer open by its handle."""

import numpy as np

from sims.simulation import Simulation
from sims.tasks.base import Facts, Task

OPENED = 0.12  # metres
TRAVEL = 0.16
HANDLE = np.array([0.0, 0.070, 0.065])  # in the frame of the cabinet's front, drawer closed
# The cabinet is low enough for the wide hand to pass over it while the fingers hold the handle.
CABINET_XML = f"""
<body name="cabinet" pos="0.52 -0.125 0">
  <geom name="cabinet_top" class="fixture" type="box" pos="0 -0.075 0.090" size="0.085 0.075 0.005"/>
  <geom name="cabinet_left" class="fixture" type="box" pos="0.080 -0.075 0.0425" size="0.005 0.075 0.0425"/>
  <geom name="cabinet_right" class="fixture" type="box" pos="-0.080 -0.075 0.0425" size="0.005 0.075 0.0425"/>
  <geom name="cabinet_back" class="fixture" type="box" pos="0 -0.145 0.0425" size="0.080 0.005 0.0425"/>
  <body name="drawer">
    <joint name="drawer" type="slide" axis="0 1 0" range="0 {TRAVEL}" damping="6" frictionloss="0.8"
      armature="0.02"/>
    <geom name="drawer_front" class="fixture" type="box" pos="0 -0.005 0.044" size="0.073 0.005 0.038"
      mass="0.2"/>
    <geom name="drawer_floor" class="fixture" type="box" pos="0 -0.073 0.014" size="0.070 0.066 0.004"
      mass="0.1"/>
    <geom name="drawer_left" class="fixture" type="box" pos="0.067 -0.073 0.04" size="0.003 0.066 0.025"
      mass="0.05"/>
    <geom name="drawer_right" class="fixture" type="box" pos="-0.067 -0.073 0.04"
      size="0.003 0.066 0.025" mass="0.05"/>
    <body name="handle">
      <geom name="handle_bar" class="fixture" type="capsule"
        fromto="-0.045 {HANDLE[1]} {HANDLE[2]} 0.045 {HANDLE[1]} {HANDLE[2]}" size="0.008" friction="1.5"
        mass="0.05"/>
      <geom name="handle_post0" class="fixture" type="capsule"
        fromto="-0.045 0 {HANDLE[2]} -0.045 {HANDLE[1]} {HANDLE[2]}" size="0.006" mass="0.02"/>
      <geom name="handle_post1" class="fixture" type="capsule"
        fromto="0.045 0 {HANDLE[2]} 0.045 {HANDLE[1]} {HANDLE[2]}" size="0.006" mass="0.02"/>
    </body>
  </body>
</body>"""


class OpenDrawer(Task):
    """Instruction "open the drawer": done when it is pulled out by 12 cm or more."""

    name = "OpenDrawer"
    objects = ("cabinet", "drawer", "handle")
    max_steps = 100

    def xml(self) -> str:
        """A cabinet right of the robot whose drawer slides towards the left camera."""
        return CABINET_XML

    def reset(self, sim: Simulation, rng: np.random.Generator, spread: float) -> str:
        """The cabinet's place varies by a few centimetres."""
        shift = spread * rng.uniform(-1.0, 1.0, 2) * np.array([0.05, 0.015])
        sim.place("cabinet", (0.52 + shift[0], -0.125 + shift[1], 0.0))
        sim.paint("cabinet", (0.46, 0.30, 0.18))
        sim.paint("drawer", (0.74, 0.58, 0.38))
        sim.paint("handle", (0.10, 0.75, 0.80))
        return "open the drawer"

    def opening(self, sim: Simulation) -> float:
        """How far the drawer is out, metres."""
        return float(sim.data.joint("drawer").qpos[0])

    def succeeded(self, sim: Simulation) -> bool:
        """Open far enough."""
        return self.opening(sim) >= OPENED

    def facts(self, sim: Simulation) -> Facts:
        """The handle, and where it is when the drawer is out."""
        closed = sim.position("cabinet") + HANDLE
        opening = self.opening(sim)
        return Facts(
            object_position=closed + np.array([0.0, opening, 0.0]),
            goal_position=closed + np.array([0.0, TRAVEL - 0.01, 0.0]),
            drawer_opening=opening,
        )
