"""Physics of one tabletop: the robot driven by TCP pose commands, and small verbs the tasks are written
with.
"""

# pyright: reportAttributeAccessIssue=false
# mujoco's names come from compiled modules without stubs.

from collections.abc import Mapping
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from sims.cameras import CameraPlacement, cameras_xml
from sims.robots import panda
from sims.robots.ik import ARM_DOFS, shared_ik

if TYPE_CHECKING:
    from sims.tasks.base import Task

PHYSICS_STEP = 0.002  # seconds
SETTLE_STEPS = 25
HOME_TCP = np.array([0.47, 0.0, 0.165])
HOME_JITTER = np.array([0.02, 0.03, 0.012])
HOME_YAW_JITTER = 0.08
DOWN = np.array([0.0, 1.0, 0.0, 0.0])  # wxyz: the gripper points straight down, fingers spread along y
WORKSPACE_LOW = np.array([0.30, -0.28, 0.018])
WORKSPACE_HIGH = np.array([0.72, 0.28, 0.40])
MAX_LEAD = 0.04  # metres per axis the command may run ahead of a blocked TCP
MAX_TILT = 1.0  # radians between the commanded orientation and straight down (tilt and yaw together)

# Cubes slide (0.5) but stick to the fingertips (1.5): with a rough table a pushed cube wedges under the
# fingertips. Cubes touch everything (1, 3); the robot touches objects but not itself (2, 1); furniture
# touches the robot (0, 2).
SCENE_XML = """
<mujoco model="tabletop">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{dt}" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <size memory="4M"/>
  <statistic center="0.5 0 0.1" extent="1.0"/>
  <visual>
    <quality shadowsize="0" offsamples="0" numslices="16" numstacks="8" numquads="2"/>
    <map znear="0.02" zfar="20"/>
    <headlight ambient="0.40 0.40 0.40" diffuse="0.28 0.28 0.28" specular="0 0 0"/>
  </visual>
  <asset>
    <material name="matte" rgba="0.5 0.5 0.5 1" specular="0.05" shininess="0.1"/>
  </asset>
  <default>
    <geom material="matte"/>
    <default class="object">
      <geom condim="4" friction="0.5 0.005 0.0001" contype="1" conaffinity="3"/>
    </default>
    <default class="visual"><geom contype="0" conaffinity="0"/></default>
    <default class="fixture"><geom contype="0" conaffinity="2" condim="4"/></default>
    {robot_defaults}
  </default>
  <worldbody>
    <light name="key" type="directional" pos="0.9 0.5 1.5" dir="-0.35 -0.3 -1" diffuse="0.32 0.32 0.32"
      specular="0 0 0" castshadow="false"/>
    <light name="fill" type="directional" pos="0.5 -0.8 1.2" dir="-0.1 0.6 -0.6" diffuse="0.14 0.14 0.16"
      specular="0 0 0" castshadow="false"/>
    <geom name="floor" type="box" size="14 14 0.05" pos="0 0 -0.55" rgba="0.13 0.14 0.16 1" class="visual"/>
    <geom name="table" type="box" size="0.75 0.75 0.03" pos="0.35 0 -0.03" rgba="0.30 0.32 0.35 1"
      class="object"/>
    {cameras}
    {robot}
    {task}
  </worldbody>
  {coupling}
  {actuators}
</mujoco>"""


def scene_xml(task: "Task", free_cameras: Mapping[str, CameraPlacement] | None = None) -> str:
    """MJCF of the whole scene."""
    return SCENE_XML.format(
        dt=PHYSICS_STEP,
        robot_defaults=panda.defaults_xml(),
        cameras=cameras_xml(free_cameras),
        robot=panda.body_xml(),
        task=task.xml(),
        coupling=panda.coupling_xml(),
        actuators=panda.actuators_xml(),
    )


def rotate(quaternion: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Turn ``quaternion`` (wxyz) by a rotation vector [3] in the world frame, radians."""
    angle = float(np.linalg.norm(rotation))
    if angle < 1e-12:
        return quaternion.copy()
    turn, result = np.empty(4), np.empty(4)
    mujoco.mju_axisAngle2Quat(turn, rotation / angle, angle)
    mujoco.mju_mulQuat(result, turn, quaternion)
    return result


def rotation_from_down(quaternion: np.ndarray) -> np.ndarray:
    """World-frame rotation vector [3] that turns ``DOWN`` into ``quaternion``."""
    inverse, turn, vector = np.empty(4), np.empty(4), np.empty(3)
    mujoco.mju_negQuat(inverse, DOWN)
    mujoco.mju_mulQuat(turn, quaternion, inverse)
    mujoco.mju_quat2Vel(vector, turn, 1.0)
    return vector


class Simulation:
    """Model, data and the accumulated TCP command of one environment."""

    def __init__(self, task: "Task", free_cameras: Mapping[str, CameraPlacement] | None = None) -> None:
        self.model = mujoco.MjModel.from_xml_string(scene_xml(task, free_cameras))
        self.data = mujoco.MjData(self.model)
        self._arm = np.array([self.model.joint(f"joint{i + 1}").qposadr[0] for i in range(ARM_DOFS)])
        self._fingers = [self.model.joint(name).qposadr[0] for name in ("finger_left", "finger_right")]
        self._tcp = self.model.site("tcp").id

    def reset_robot(self, rng: np.random.Generator) -> None:
        """Zero the state and put the arm near home, fingers open; objects are placed afterwards."""
        mujoco.mj_resetData(self.model, self.data)
        self.command_position = HOME_TCP + rng.uniform(-1.0, 1.0, 3) * HOME_JITTER
        self.command_quaternion = rotate(DOWN, np.array([0.0, 0.0, rng.uniform(-1.0, 1.0) * HOME_YAW_JITTER]))
        self.gripper_open = True
        home = np.array(panda.HOME)
        self._joints = shared_ik().solve(home, self.command_position, self.command_quaternion, iterations=12)
        self.data.qpos[self._arm] = self._joints
        self.data.qpos[self._fingers] = panda.FINGER_TRAVEL
        self._send()

    def _send(self) -> None:
        self.data.ctrl[:ARM_DOFS] = self._joints
        self.data.ctrl[ARM_DOFS] = panda.FINGER_TRAVEL if self.gripper_open else 0.0

    def command(self, translation: np.ndarray, rotation: np.ndarray, gripper: float) -> None:
        """Move the command by ``translation`` [3] metres and ``rotation`` [3] radians (world frame)."""
        measured = self.tcp_position()
        position = np.clip(self.command_position + translation, measured - MAX_LEAD, measured + MAX_LEAD)
        self.command_position = np.clip(position, WORKSPACE_LOW, WORKSPACE_HIGH)
        turned = rotation_from_down(rotate(self.command_quaternion, rotation))
        angle = np.linalg.norm(turned)
        self.command_quaternion = rotate(DOWN, turned * min(1.0, MAX_TILT / max(angle, 1e-9)))
        if gripper != 0.0:
            self.gripper_open = gripper > 0.0
        self._joints = shared_ik().solve(self._joints, self.command_position, self.command_quaternion)
        self._send()

    def advance(self, substeps: int) -> None:
        """Physics for ``substeps`` of 2 ms."""
        mujoco.mj_step(self.model, self.data, nstep=substeps)
        self.refresh()

    def settle(self) -> None:
        """Let objects come to rest before the first frame, the arm held where it is."""
        mujoco.mj_step(self.model, self.data, nstep=SETTLE_STEPS)
        self.data.time = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Bring positions of bodies, sites and cameras up to date with the joint state."""
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def tcp_position(self) -> np.ndarray:
        """Measured TCP [3], metres."""
        return self.data.site_xpos[self._tcp].copy()

    def tcp_quaternion(self) -> np.ndarray:
        """Measured TCP orientation [4] wxyz, signed to lie in the hemisphere of ``DOWN``."""
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, self.data.site_xmat[self._tcp])
        return quaternion if quaternion @ DOWN >= 0 else -quaternion

    def finger_width(self) -> float:
        """Opening between the fingertips, metres."""
        return float(self.data.qpos[self._fingers].sum())

    def position(self, body: str) -> np.ndarray:
        """World position [3] of a body."""
        return self.data.body(body).xpos.copy()

    def yaw(self, body: str) -> float:
        """Rotation of a body about the vertical, radians."""
        matrix = self.data.body(body).xmat
        return float(np.arctan2(matrix[3], matrix[0]))

    def place(self, body: str, position: tuple, yaw: float = 0.0) -> None:
        """Set where a body is: a free one by its joint, scenery by its model entry."""
        quaternion = np.array([np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)])
        index = self.model.body(body).id
        if self.model.body_jntnum[index]:
            address = self.model.jnt_qposadr[self.model.body_jntadr[index]]
            self.data.qpos[address : address + 7] = (*position, *quaternion)
        else:
            self.model.body_pos[index] = position
            self.model.body_quat[index] = quaternion

    def paint(self, body: str, colour: tuple[float, ...]) -> None:
        """Colour all geoms that belong directly to a body."""
        self.model.geom_rgba[self.model.geom_bodyid == self.model.body(body).id, :3] = colour
