"""Inverse kinematics of the arm with mink: target TCP pose -> seven joint angles."""

# pyright: reportAttributeAccessIssue=false
# mujoco's names come from compiled modules without stubs.

import functools

import mink
import mujoco
import numpy as np

from sims.robots import panda

ARM_DOFS = 7


class ArmIK:
    """Tracks a TCP pose from a given start configuration. Holds no state between calls, so envs can share
    one.
    """

    def __init__(self) -> None:
        self.model = mujoco.MjModel.from_xml_string(panda.arm_only_xml())
        self.configuration = mink.Configuration(self.model)
        self.pose_task = mink.FrameTask(
            "tcp", "site", position_cost=1.0, orientation_cost=0.3, lm_damping=1e-5
        )
        # A weak pull to the home posture settles the redundant joint, so equal targets give equal elbows.
        cost = np.zeros(self.model.nv)
        cost[:ARM_DOFS] = 1e-3
        self.posture_task = mink.PostureTask(self.model, cost=cost)
        self.posture_task.set_target(self._full(np.array(panda.HOME)))
        self.limits = [mink.ConfigurationLimit(self.model)]

    def _full(self, joints: np.ndarray) -> np.ndarray:
        q = np.zeros(self.model.nq)
        q[:ARM_DOFS] = joints
        q[ARM_DOFS:] = panda.FINGER_TRAVEL / 2
        return q

    def solve(
        self, joints: np.ndarray, position: np.ndarray, quaternion: np.ndarray, iterations: int = 2
    ) -> np.ndarray:
        """Joint angles [7] after ``iterations`` steps from ``joints`` [7] towards a TCP pose (metres,
        wxyz).
        """
        pose = mink.SE3.from_rotation_and_translation(mink.SO3(quaternion), position)
        self.pose_task.set_target(pose)
        self.configuration.update(self._full(joints))
        for _ in range(iterations):
            velocity = mink.solve_ik(
                self.configuration,
                [self.pose_task, self.posture_task],
                1.0,
                "daqp",
                damping=1e-6,
                limits=self.limits,
            )
            self.configuration.integrate_inplace(velocity, 1.0)
        return self.configuration.q[:ARM_DOFS].copy()

    def forward(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """TCP position [3] and rotation matrix [3, 3] in the base frame."""
        self.configuration.update(self._full(joints))
        pose = self.configuration.get_transform_frame_to_world("tcp", "site")
        return pose.translation(), pose.rotation().as_matrix()


@functools.lru_cache(maxsize=1)
def shared_ik() -> ArmIK:
    """One solver per process: building it costs far more than a solve."""
    return ArmIK()
