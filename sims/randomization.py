"""Domain randomisation: what may look or lie different from episode to episode."""

# pyright: reportAttributeAccessIssue=false
# mujoco's names come from compiled modules without stubs.

import dataclasses

import mujoco
import numpy as np

from sims.cameras import ANCHORS, look_at_rotation
from sims.errors import expect

KEPT_COLOURS = ("cue_lamp", "timer_lamp")  # their brightness is the message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Randomization:
    """Switches of domain randomisation; each can be used alone.

    colours: shift of every surface colour, and a fresh table grey. lights: strength and direction. cameras:
    positions and look-at points of the built-in static cameras (free ones stay where they were put). spread:
    factor on the range of object positions (1 = the task's own).
    """

    colours: bool = True
    lights: bool = True
    cameras: bool = True
    spread: float = 1.25
    colour_shift: float = 0.07  # per channel, of 1
    camera_shift: float = 0.03  # metres

    def __post_init__(self) -> None:
        expect(0.0 < self.spread <= 1.5, "spread", "a factor in (0, 1.5]", self.spread)
        expect(0.0 <= self.colour_shift <= 0.3, "colour_shift", "a value in [0, 0.3]", self.colour_shift)
        expect(0.0 <= self.camera_shift <= 0.1, "camera_shift", "metres in [0, 0.1]", self.camera_shift)


FIXED = Randomization(colours=False, lights=False, cameras=False, spread=1.0)


def resolve(randomize: "bool | Randomization") -> Randomization:
    """``True`` is the default randomisation, ``False`` none at all."""
    if isinstance(randomize, Randomization):
        return randomize
    expect(isinstance(randomize, bool), "randomize", "True, False or a Randomization", repr(randomize))
    return Randomization() if randomize else FIXED


class Appearance:
    """The compiled look of a model, to go back to at each reset."""

    FIELDS = ("geom_rgba", "light_diffuse", "light_dir", "cam_pos", "cam_quat", "body_pos", "body_quat")

    def __init__(self, model: mujoco.MjModel) -> None:
        self._nominal = {name: getattr(model, name).copy() for name in self.FIELDS}

    def restore(self, model: mujoco.MjModel) -> None:
        """Undo everything earlier episodes changed."""
        for name, value in self._nominal.items():
            getattr(model, name)[:] = value


def apply(model: mujoco.MjModel, options: Randomization, rng: np.random.Generator) -> None:
    """Change the look of ``model`` in place. Call after the task has painted its objects."""
    if options.colours:
        _shift_colours(model, options.colour_shift, rng)
    if options.lights:
        model.light_diffuse[:] *= rng.uniform(0.75, 1.2, (model.nlight, 1))
        model.light_dir[:] += rng.uniform(-0.25, 0.25, (model.nlight, 3))
        model.light_dir[:] /= np.linalg.norm(model.light_dir, axis=1, keepdims=True)
    if options.cameras:
        _shift_cameras(model, options.camera_shift, rng)


def _shift_colours(model: mujoco.MjModel, size: float, rng: np.random.Generator) -> None:
    """Geoms that shared a colour keep sharing one, so the robot stays of one piece."""
    kept = [
        model.geom(name).id
        for name in KEPT_COLOURS
        if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, name) >= 0
    ]
    saved = model.geom_rgba[kept].copy()
    colours, owners = np.unique(model.geom_rgba[:, :3], axis=0, return_inverse=True)
    colours = colours + rng.uniform(-size, size, colours.shape)
    model.geom_rgba[:, :3] = np.clip(colours, 0.02, 1.0)[owners.reshape(-1)]
    model.geom_rgba[model.geom("table").id, :3] = rng.uniform(0.22, 0.42) + rng.uniform(-0.03, 0.03, 3)
    model.geom_rgba[kept] = saved


def _shift_cameras(model: mujoco.MjModel, size: float, rng: np.random.Generator) -> None:
    for name, camera in ANCHORS.items():
        index = model.camera(name).id
        position = np.array(camera.position) + rng.uniform(-size, size, 3)
        target = np.array(camera.look_at) + rng.uniform(-size, size, 3) * 0.5
        model.cam_pos[index] = position
        mujoco.mju_mat2Quat(model.cam_quat[index], look_at_rotation(position, target).reshape(-1))
