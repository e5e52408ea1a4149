"""The Gymnasium environment of all tabletop tasks."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from sims import randomization
from sims.bodies import body_of_geom, body_poses, find_bodies
from sims.cameras import CameraPlacement, camera_to_world, check_camera, check_free_cameras, intrinsics
from sims.errors import expect, expect_name
from sims.randomization import Appearance, Randomization
from sims.rendering import MODALITIES, SharedRenderer, Shot, shared_renderer
from sims.simulation import HOME_TCP, PHYSICS_STEP, Simulation
from sims.tasks import TASKS, make_task
from sims.views import Drawer, Pictures, Views, key_of

STATE_SIZE = 11
PRIVILEGED_SIZE = 24
HOLD_STEPS = 4  # success must hold this long, so recordings end with a few frames of the finished task
TRANSLATION_PER_SECOND = 0.16  # metres, at action 1
ROTATION_PER_SECOND = 1.5  # radians, at action 1


class TabletopEnv(gymnasium.Env):
    """A Panda at a table.

    Action [7] float32 in [-1, 1]: TCP translation (1.6 cm per unit at 10 Hz) and rotation vector (0.15 rad
    per unit), both in the world frame and added to the commanded pose, then the gripper: > 0 opens, < 0
    closes, 0 keeps.

    Observation: ``images`` {camera: uint8 [P, P, 3]}; ``state`` float32 [11] = TCP position (3, metres),
    TCP quaternion wxyz (4, w.r.t. the world), finger opening (1, metres), commanded minus measured TCP
    position (3, metres); with the modalities ``depth`` {camera: float32 [P, P] metres along the axis} and
    ``segmentation`` {camera: uint8 [P, P]}: 0 background, 1 robot, 2 + i the task's i-th object
    (``segmentation_classes``); ``bodies`` {camera: uint8 [P, P]}: 0 background, 1 + i the i-th of the rigid bodies
    (``bodies``: robot links, hand and fingers, task objects; names and order depend on the task alone).

    With the modality ``bodies``, ``info["bodies"]`` {body: float64 [7]} holds their poses in the world: x y z in
    metres, quaternion wxyz.

    ``info["privileged"]`` float32 [24]: 0-2 object position, 3 object yaw (quarter-turn), 4-6 goal
    position, 7 drawer opening, 8-10 cue one-hot (red, green, blue), 11 go signal, 12 timer level, 13-15
    nominal home TCP, 16 gripper command (+1 open, -1 closed), 17 held successes / 4, 18 step / max_steps,
    19-23 task one-hot in the order of ``sims.TASKS``. Lengths in metres. Together with ``state`` it decides
    what an expert does.

    ``free_cameras`` {name: CameraPlacement} adds static cameras to the built-in ones; ``cameras`` names those to
    observe, of both kinds (``sims.cameras.ring`` and ``holdout_ring`` make many).

    An episode terminates when success has held for 4 steps or the task is lost, and is truncated at
    ``max_steps``.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  Gymnasium's name

    def __init__(
        self,
        task: str = "Lift",
        *,
        image_size: int = 64,
        cameras: Sequence[str] = ("front", "left", "top"),
        free_cameras: Mapping[str, CameraPlacement] | None = None,
        modalities: Sequence[str] = ("rgb",),
        randomize: bool | Randomization = False,
        render_mode: str | None = None,
        control_hz: float = 10.0,
        **task_options: Any,
    ) -> None:
        expect(
            isinstance(image_size, (int, np.integer)) and image_size > 0,
            "image_size",
            "a whole number of pixels > 0",
            repr(image_size),
        )
        expect(
            0 < control_hz <= 1 / PHYSICS_STEP,
            "control_hz",
            f"a rate in (0, {1 / PHYSICS_STEP:.0f}] Hz",
            control_hz,
        )
        expect(
            not isinstance(cameras, str),
            "cameras",
            "a sequence of names",
            repr(cameras),
            f"write ({cameras!r},)",
        )
        expect(
            not isinstance(modalities, str),
            "modalities",
            "a sequence of names",
            repr(modalities),
            f"write ({modalities!r},)",
        )
        expect(render_mode in (None, "rgb_array"), "render_mode", "None or 'rgb_array'", repr(render_mode))
        self.free_cameras = check_free_cameras(free_cameras)
        self.cameras = tuple(check_camera(name, self.free_cameras) for name in cameras)
        twice = sorted({name for name in self.cameras if self.cameras.count(name) > 1})
        expect(not twice, "cameras", "distinct names", f"{', '.join(twice)} twice")
        self.modalities = tuple(expect_name(name, MODALITIES, "modality") for name in modalities)
        self.image_size = int(image_size)
        self.render_mode = render_mode
        self.randomization = randomization.resolve(randomize)
        self.task = make_task(task, **task_options)
        self.max_steps = self.task.max_steps
        self.metadata = {**self.metadata, "render_fps": control_hz}
        self.sim = Simulation(self.task, self.free_cameras)
        self._appearance = Appearance(self.sim.model)
        self._substeps = max(1, round(1 / (control_hz * PHYSICS_STEP)))
        per_step = self._substeps * PHYSICS_STEP
        self.action_scale = np.array(
            [TRANSLATION_PER_SECOND * per_step] * 3 + [ROTATION_PER_SECOND * per_step] * 3 + [1.0], np.float32
        )
        self.segmentation_classes = ("background", "robot", *self.task.objects)
        self.bodies = find_bodies(self.sim.model, self.task.objects)
        self._tables = {
            "segmentation": self._geom_classes(),
            "bodies": body_of_geom(self.sim.model, self.bodies),
        }
        self._views = Views(self.sim.model, self.cameras, self.modalities, self.image_size, self._tables)
        self._draws = True
        self._renderer: SharedRenderer | None = None
        self._running = False
        self.action_space = spaces.Box(-1.0, 1.0, (7,), np.float32)
        self.observation_space = self._observation_space()

    def _observation_space(self) -> spaces.Dict:
        size = self.image_size
        ids: Any = (0, 255, (size, size), np.uint8)
        box: dict[str, Any] = {
            "rgb": (0, 255, (size, size, 3), np.uint8), "depth": (0.0, np.inf, (size, size), np.float32),
            "segmentation": ids, "bodies": ids,
        }  # fmt: skip
        parts: dict[str, spaces.Space] = {"state": spaces.Box(-np.inf, np.inf, (STATE_SIZE,), np.float32)}
        for modality in self.modalities if self.cameras and self._draws else ():
            parts[key_of(modality)] = spaces.Dict({name: spaces.Box(*box[modality]) for name in self.cameras})
        return spaces.Dict(parts)

    @property
    def draws(self) -> bool:
        """Whether observations hold pictures. Without, ``shoot`` and a ``make_drawer`` give them apart."""
        return self._draws

    @draws.setter
    def draws(self, value: bool) -> None:
        self._draws = bool(value)
        self.observation_space = self._observation_space()

    @property
    def draws_apart(self) -> bool:
        """Whether OpenGL can be used in a thread of its own here."""
        return os.environ.get("MUJOCO_GL") in ("egl", "osmesa") and bool(self.cameras)

    def shoot(self) -> dict[str, Shot]:
        """What the cameras see now, for a drawer."""
        return self._views.shoot(self.sim.data)

    def make_drawer(self) -> Drawer:
        """Makes pictures of shots in the thread that calls this; ``close`` it there."""
        return Drawer(self._views)

    def _geom_classes(self) -> np.ndarray:
        """Segmentation class of each geom id; the last entry serves id -1."""
        model = self.sim.model
        classes = np.zeros(model.ngeom + 1, np.uint8)
        for geom in range(model.ngeom):
            body = model.body(model.geom_bodyid[geom]).name
            if body in self.task.objects:
                classes[geom] = 2 + self.task.objects.index(body)
            elif body != "world":
                classes[geom] = 1
        return classes

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Start an episode; ``seed`` decides all of it."""
        expect(not options, "options", "none", options, "pass task options to gymnasium.make")
        super().reset(seed=seed)
        # Separate streams: switching the look on or off leaves the layout of a seed unchanged.
        layout, look = self.np_random.spawn(2)
        self._appearance.restore(self.sim.model)
        self.sim.reset_robot(layout)
        self.instruction = self.task.reset(self.sim, layout, self.randomization.spread)
        randomization.apply(self.sim.model, self.randomization, look)
        self.sim.settle()
        self.step_count = 0
        self._held = 0
        self._running = True
        self.task.update(self.sim, 0)
        return self._observe(), self._info(self.task.succeeded(self.sim))

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One control step."""
        expect(self._running, "step", "a reset environment", "none", "call reset() first")
        scaled = self._check_action(action) * self.action_scale
        self.sim.command(scaled[:3], scaled[3:6], float(scaled[6]))
        self.sim.advance(self._substeps)
        self.step_count += 1
        self.task.update(self.sim, self.step_count)
        success = self.task.succeeded(self.sim)
        self._held = self._held + 1 if success else 0
        terminated = self._held >= HOLD_STEPS or self.task.failed(self.sim)
        truncated = not terminated and self.step_count >= self.max_steps
        return self._observe(), float(success), terminated, truncated, self._info(success)

    def _check_action(self, action: np.ndarray) -> np.ndarray:
        values = np.asarray(action, np.float64)
        expect(values.shape == (7,), "action", "shape (7,)", values.shape, "give dx dy dz, rx ry rz, gripper")
        expect(
            bool(np.isfinite(values).all()),
            "action",
            "finite numbers",
            values.tolist(),
            "check the policy for NaN",
        )
        inside = bool((np.abs(values) <= 1.0 + 1e-6).all())
        expect(
            inside,
            "action",
            "values in [-1, 1]",
            values.tolist(),
            "clip it or divide by env.unwrapped.action_scale",
        )
        return values

    def _state(self) -> np.ndarray:
        sim = self.sim
        position = sim.tcp_position()
        parts = (position, sim.tcp_quaternion(), [sim.finger_width()], sim.command_position - position)
        return np.concatenate(parts).astype(np.float32)

    def _observe(self) -> dict[str, Any]:
        return {**self._pictures(), "state": self._state()}

    def _pictures(self) -> Pictures:
        if not (self.cameras and self._draws):
            return {}
        return self._views.draw(self.shoot(), self._retained())

    def _info(self, success: bool) -> dict[str, Any]:
        poses = {
            name: {
                "intrinsics": intrinsics(self.sim.model, name, self.image_size),
                "camera_to_world": camera_to_world(self.sim.model, self.sim.data, name),
            }
            for name in self.cameras
        }
        info = {
            "task": self.instruction,
            "is_success": success,
            "cameras": poses,
            "privileged": self.expert_state(),
        }
        if "bodies" in self.modalities:
            info["bodies"] = body_poses(self.sim.model, self.sim.data, self.bodies)
        return info

    def expert_state(self) -> np.ndarray:
        """The privileged vector float32 [24] described in the class docstring."""
        facts = self.task.facts(self.sim)
        task = np.eye(len(TASKS))[list(TASKS).index(self.task.name)]
        clock = [
            1.0 if self.sim.gripper_open else -1.0,
            self._held / HOLD_STEPS,
            self.step_count / self.max_steps,
        ]
        parts = (
            facts.object_position, [facts.object_yaw], facts.goal_position, [facts.drawer_opening], facts.cue,
            [float(facts.go), facts.timer], HOME_TCP, clock, task,
        )  # fmt: skip
        return np.concatenate(parts).astype(np.float32)

    def render_camera(self, name: str, modality: str = "rgb", size: int | None = None) -> np.ndarray:
        """A picture now: rgb uint8 [P, P, 3], depth float32 [P, P] metres, segmentation or bodies uint8 [P, P]."""
        check_camera(name, self.free_cameras)
        expect_name(modality, MODALITIES, "modality")
        size = self.image_size if size is None else size
        expect(size > 0, "size", "a whole number of pixels > 0", size)
        views = Views(self.sim.model, (name,), (modality,), size, self._tables, self._views.spare)
        return views.draw(views.shoot(self.sim.data), self._retained())[key_of(modality)][name]

    def _retained(self) -> SharedRenderer:
        """The renderer of the process, counted as used by this environment."""
        renderer = shared_renderer()
        if renderer is not self._renderer:
            renderer.retain()
            self._renderer = renderer
        return renderer

    def render(self) -> np.ndarray | None:
        """The first camera's picture in ``rgb_array`` mode."""
        if self.render_mode is None:
            return None
        return self.render_camera(self.cameras[0] if self.cameras else "front")

    def close(self) -> None:
        """Give the renderer back; the last environment of the process frees it."""
        if self._renderer is not None and self._renderer is shared_renderer():
            self._renderer.release()
        self._renderer = None
