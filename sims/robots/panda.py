"""Franka Emika Panda from primitive geoms: published kinematics, limits and inertias, no meshes.

Sources: kinematics and joint limits from Franka's "Robot and interface specifications" (modified DH,
Craig's convention); link inertias from Gaz et al., "Dynamic Identification of the Franka Emika Panda Robot
with Retrieval of Feasible Parameters", RA-L 2019, as shipped in franka_description. Lengths in metres,
angles in radians.
"""

import numpy as np

# (a_{i-1}, d_i, alpha_{i-1}) of joints 1..7.
DH = (
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -np.pi / 2),
    (0.0, 0.316, np.pi / 2),
    (0.0825, 0.0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0.0, 0.0, np.pi / 2),
    (0.088, 0.0, np.pi / 2),
)
FLANGE_OFFSET = 0.107  # joint 7 to flange along z
TCP_OFFSET = 0.1034  # flange to the point between the fingertips along z
HAND_YAW = -np.pi / 4  # the hand is mounted turned by -45 degrees
JOINT_LIMITS = (
    (-2.8973, 2.8973),
    (-1.7628, 1.7628),
    (-2.8973, 2.8973),
    (-3.0718, -0.0698),
    (-2.8973, 2.8973),
    (-0.0175, 3.7525),
    (-2.8973, 2.8973),
)
# Mass, centre of mass, inertia (xx yy zz xy xz yz) of links 1..7.
LINK_INERTIA = (
    (4.970684, (0.003875, 0.002081, -0.04762), (0.70337, 0.70661, 0.009117, -0.000139, 0.006772, 0.019169)),
    (0.646926, (-0.003141, -0.02872, 0.003495), (0.007962, 0.02811, 0.025995, -0.003925, 0.010254, 0.000704)),
    (
        3.228604,
        (0.027518, 0.039252, -0.066502),
        (0.037242, 0.036155, 0.01083, -0.004761, -0.011396, -0.012805),
    ),
    (3.587895, (-0.05317, 0.104419, 0.027454), (0.025853, 0.019552, 0.028323, 0.007796, -0.001332, 0.008641)),
    (
        1.225946,
        (-0.011953, 0.041065, -0.038437),
        (0.035549, 0.029474, 0.008627, -0.002117, -0.004037, 0.000229),
    ),
    (
        1.666555,
        (0.060149, -0.014117, -0.010517),
        (0.001964, 0.004354, 0.005433, 0.000109, -0.001158, 0.000341),
    ),
    (
        0.735522,
        (0.010517, -0.004252, 0.061597),
        (0.012516, 0.010027, 0.004815, -0.000428, -0.001196, -0.000741),
    ),
)
# Shapes of links 1..7 in their joint frames: (colour class, radius, from, to).
LINK_CAPSULES = (
    (("light", 0.062, (0, 0, -0.19), (0, 0, -0.05)),),
    (("dark", 0.062, (0, 0, -0.06), (0, 0, 0.06)), ("light", 0.058, (0, -0.05, 0), (0, -0.16, 0))),
    (("light", 0.058, (0, 0, -0.12), (0.03, 0, -0.03)),),
    (("dark", 0.058, (0, 0, -0.06), (0, 0, 0.06)), ("light", 0.052, (-0.05, 0.04, 0), (-0.0825, 0.11, 0))),
    (("light", 0.055, (0, 0, -0.25), (0, 0.03, -0.14)), ("light", 0.045, (0, 0.05, -0.12), (0, 0.04, -0.02))),
    (("dark", 0.05, (0, 0, -0.05), (0, 0, 0.05)), ("light", 0.045, (0.02, 0, 0), (0.08, 0, 0))),
    (("light", 0.042, (0, 0, -0.03), (0, 0, 0.075)),),
)
ACTUATOR_GAINS = (4500.0, 4500.0, 3500.0, 3500.0, 2000.0, 2000.0, 2000.0)
FORCE_LIMITS = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)
FINGER_TRAVEL = 0.04  # per finger; the opening is twice this
HOME = (0.0, 0.05, 0.0, -2.45, 0.0, 2.5, np.pi / 4)  # only the posture; the task sets the exact start by IK


def _numbers(values: object) -> str:
    return " ".join(f"{float(v):.7g}" for v in np.ravel(np.asarray(values)))


def _link_frame(a: float, d: float, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Body position and quaternion wxyz of one modified-DH row: RotX(alpha) then translate (a, 0, d)."""
    position = np.array([a, -np.sin(alpha) * d, np.cos(alpha) * d])
    return position, np.array([np.cos(alpha / 2), np.sin(alpha / 2), 0.0, 0.0])


def _capsule(kind: str, radius: float, start: tuple, end: tuple) -> str:
    return f'<geom class="{kind}" type="capsule" size="{radius}" fromto="{_numbers(start)} {_numbers(end)}"/>'


def _link_open(index: int) -> str:
    """Opening tag, inertia, joint and geoms of link ``index`` (1-based); the caller closes the body."""
    position, quaternion = _link_frame(*DH[index - 1])
    mass, centre, inertia = LINK_INERTIA[index - 1]
    shapes = "".join(_capsule(*shape) for shape in LINK_CAPSULES[index - 1])
    return (
        f'<body name="link{index}" pos="{_numbers(position)}" quat="{_numbers(quaternion)}" gravcomp="1">'
        f'<inertial mass="{mass}" pos="{_numbers(centre)}" fullinertia="{_numbers(inertia)}"/>'
        f'<joint name="joint{index}" class="arm" range="{_numbers(JOINT_LIMITS[index - 1])}"/>{shapes}'
    )


def _finger(name: str, side: int) -> str:
    """One finger; ``side`` +1 or -1 along the hand's y axis, sliding outwards by up to FINGER_TRAVEL."""
    return f"""
    <body name="{name}" pos="0 0 0.0584" gravcomp="1">
      <inertial mass="0.015" pos="0 0 0" diaginertia="2.375e-6 2.375e-6 7.5e-7"/>
      <joint name="{name}" class="finger" axis="0 {side} 0"/>
      <geom class="gripper" type="box" size="0.013 0.010 0.014" pos="0 {side * 0.012} 0.012"/>
      <geom class="fingertip" name="{name}_pad" type="box" size="0.014 0.011 0.0145"
        pos="0 {side * 0.011} 0.0405"/>
    </body>"""


def _hand() -> str:
    quaternion = (np.cos(HAND_YAW / 2), 0, 0, np.sin(HAND_YAW / 2))
    return f"""
    <body name="hand" pos="0 0 {FLANGE_OFFSET}" quat="{_numbers(quaternion)}" gravcomp="1">
      <inertial mass="0.73" pos="-0.01 0 0.03" diaginertia="0.001 0.0025 0.0017"/>
      <geom class="gripper" type="box" size="0.03 0.1 0.03" pos="0 0 0.032"/>
      <camera name="wrist" pos="0.075 0 0.0" xyaxes="0 1 0 1 0 0.35" fovy="70"/>
      <site name="tcp" pos="0 0 {TCP_OFFSET}" size="0.004" group="5"/>
      {_finger("finger_left", 1)}
      {_finger("finger_right", -1)}
    </body>"""


def defaults_xml() -> str:
    """Default classes of the robot. Links are visual only: just the hand and fingers can touch the scene."""
    return f"""
    <default class="robot">
      <default class="arm"><joint armature="0.1" damping="1"/></default>
      <default class="finger"><joint type="slide" range="0 {FINGER_TRAVEL}" armature="0.1"
        damping="5"/></default>
      <default class="light"><geom contype="0" conaffinity="0" rgba="0.95 0.96 0.97 1" mass="0"/></default>
      <default class="dark"><geom contype="0" conaffinity="0" rgba="0.14 0.15 0.17 1" mass="0"/></default>
      <default class="gripper"><geom contype="2" conaffinity="1" rgba="0.05 0.07 0.15 1" mass="0"/></default>
      <default class="fingertip">
        <geom contype="2" conaffinity="1" condim="4" friction="1.5 0.02 0.001" rgba="1.0 0.60 0.16 1"
          mass="0"/>
      </default>
    </default>"""


def body_xml() -> str:
    """The robot's body tree, base at the origin of the parent frame."""
    links = "".join(_link_open(i) for i in range(1, 8))
    base = _capsule("light", 0.07, (-0.08, 0, 0.06), (0.0, 0, 0.06)) + _capsule(
        "dark", 0.062, (0, 0, 0.06), (0, 0, 0.15)
    )
    return f'<body name="base" childclass="robot">{base}{links}{_hand()}{"</body>" * 7}</body>'


def actuators_xml() -> str:
    """Position servos of the seven joints and one servo for the coupled fingers (control: metres per
    finger).
    """
    arm = "".join(
        f'<position name="joint{i + 1}" joint="joint{i + 1}" kp="{kp}" kv="{kp / 10}"'
        f' forcerange="-{limit} {limit}"/>'
        for i, (kp, limit) in enumerate(zip(ACTUATOR_GAINS, FORCE_LIMITS, strict=True))
    )
    fingers = '<position name="gripper" joint="finger_left" kp="1500" kv="60" forcerange="-60 60"/>'
    return f"<actuator>{arm}{fingers}</actuator>"


def coupling_xml() -> str:
    """Both fingers move together, as the rack and pinion of the real hand makes them."""
    return (
        '<equality><joint joint1="finger_left" joint2="finger_right"'
        ' solref="0.005 1" solimp="0.95 0.99 0.001"/></equality>'
    )


def arm_only_xml() -> str:
    """The robot alone, for inverse kinematics."""
    return (
        '<mujoco model="panda"><compiler angle="radian" autolimits="true"/>'
        f"<default>{defaults_xml()}</default>"
        f"<worldbody>{body_xml()}</worldbody></mujoco>"
    )
