"""The robot against Franka's published numbers, with forward kinematics computed here from the DH table."""

import mujoco
import numpy as np
import pytest

from sims.robots.ik import shared_ik
from sims.tasks import make_task

# a, d, alpha, lower, upper of joints 1..7, as printed in Franka's documentation (modified DH).
TABLE = np.array(
    [
        [0.0, 0.333, 0.0, -2.8973, 2.8973],
        [0.0, 0.0, -np.pi / 2, -1.7628, 1.7628],
        [0.0, 0.316, np.pi / 2, -2.8973, 2.8973],
        [0.0825, 0.0, np.pi / 2, -3.0718, -0.0698],
        [-0.0825, 0.384, -np.pi / 2, -2.8973, 2.8973],
        [0.0, 0.0, np.pi / 2, -0.0175, 3.7525],
        [0.088, 0.0, np.pi / 2, -2.8973, 2.8973],
    ]
)


def forward(joints):
    """Flange pose [4, 4]: product of RotX(alpha) TransX(a) RotZ(theta) TransZ(d), then 107 mm along z."""
    pose = np.eye(4)
    for (a, d, alpha), theta in zip(TABLE[:, :3], joints, strict=True):
        ca, sa, ct, st = np.cos(alpha), np.sin(alpha), np.cos(theta), np.sin(theta)
        pose = pose @ np.array(
            [
                [ct, -st, 0, a],
                [st * ca, ct * ca, -sa, -d * sa],
                [st * sa, ct * sa, ca, d * ca],
                [0, 0, 0, 1],
            ]
        )
    flange = np.eye(4)
    flange[2, 3] = 0.107
    return pose @ flange


CONFIGURATIONS = [
    np.zeros(7),
    np.array([0, -np.pi / 4, 0, -3 * np.pi / 4, 0, np.pi / 2, np.pi / 4]),
    np.array([0.3, 0.5, -0.4, -1.9, 0.7, 2.2, -0.6]),
]


@pytest.mark.parametrize("joints", CONFIGURATIONS, ids=["zero", "ready", "general"])
def test_forward_kinematics(joints):
    position, rotation = shared_ik().forward(joints)
    flange = forward(joints)
    hand = np.array([[1, 1, 0], [-1, 1, 0], [0, 0, np.sqrt(2)]]) / np.sqrt(2)  # RotZ(-45 degrees)
    np.testing.assert_allclose(position, flange[:3, 3] + 0.1034 * flange[:3, 2], atol=1e-6)
    np.testing.assert_allclose(rotation, flange[:3, :3] @ hand, atol=1e-6)


def test_known_flange_position():
    """The ready pose of Franka's documentation puts the flange about 30.7 cm ahead and 59 cm up."""
    np.testing.assert_allclose(forward(CONFIGURATIONS[1])[:3, 3], [0.3069, 0.0, 0.5903], atol=1e-3)


def test_joint_limits_and_masses():
    model = shared_ik().model
    ranges = np.array([model.joint(f"joint{i + 1}").range for i in range(7)])
    np.testing.assert_allclose(ranges, TABLE[:, 3:], atol=1e-9)
    masses = [model.body(f"link{i + 1}").mass[0] for i in range(7)]
    assert sum(masses) == pytest.approx(16.062, abs=1e-3)


def test_inverse_kinematics_reaches_the_workspace():
    down = np.array([0.0, 1.0, 0.0, 0.0])
    home = np.array([0.0, 0.05, 0.0, -2.45, 0.0, 2.5, np.pi / 4])
    for target in ([0.35, -0.25, 0.05], [0.35, 0.25, 0.35], [0.70, 0.0, 0.02], [0.65, 0.25, 0.2]):
        joints = shared_ik().solve(home, np.array(target), down, iterations=40)
        position, rotation = shared_ik().forward(joints)
        np.testing.assert_allclose(position, target, atol=1e-3)
        np.testing.assert_allclose(rotation[:, 2], [0, 0, -1], atol=1e-2)
        assert np.all(joints >= TABLE[:, 3] - 1e-9)
        assert np.all(joints <= TABLE[:, 4] + 1e-9)


def test_arm_holds_its_pose_against_gravity():
    from sims.simulation import Simulation

    sim = Simulation(make_task("Lift"))
    sim.reset_robot(np.random.default_rng(0))
    sim.place("cube", (0.5, 0.15, 0.025))
    mujoco.mj_forward(sim.model, sim.data)
    sim.advance(500)
    np.testing.assert_allclose(sim.tcp_position(), sim.command_position, atol=1e-3)
