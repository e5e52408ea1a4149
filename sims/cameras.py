"""Camera placement, and the one place where MuJoCo cameras become OpenCV cameras.

MuJoCo cameras look along -z with y up. Everything outside this file uses OpenCV axes (x right, y down, z
forward), ``camera_to_world`` [4, 4], intrinsics [3, 3] in pixels with pixel centres at +0.5, metres.
"""

# pyright: reportAttributeAccessIssue=false
# mujoco's names come from compiled modules without stubs.

import dataclasses

import mujoco
import numpy as np

from sims.errors import expect_name

OPENCV_FROM_MUJOCO = np.diag([1.0, -1.0, -1.0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CameraPlacement:
    """A static camera: position and look-at point in metres, vertical field of view in degrees."""

    position: tuple[float, float, float]
    look_at: tuple[float, float, float]
    fovy: float


# The field is about 50 cm wide at the workspace, so a 5 cm cube covers 6-7 of 64 pixels. The top camera
# stands beyond the workspace, tilted back, because from straight above the hand would hide what it grasps.
ANCHORS: dict[str, CameraPlacement] = {
    "front": CameraPlacement(position=(1.27, 0.0, 0.55), look_at=(0.51, 0.0, 0.125), fovy=34.0),
    "left": CameraPlacement(position=(0.52, 0.80, 0.50), look_at=(0.52, 0.0, 0.115), fovy=34.0),
    "right": CameraPlacement(position=(0.52, -0.80, 0.50), look_at=(0.52, 0.0, 0.115), fovy=34.0),
    "top": CameraPlacement(position=(0.90, 0.0, 0.92), look_at=(0.49, 0.0, 0.04), fovy=32.0),
}
CAMERAS = (*ANCHORS, "wrist")


def check_camera(name: str) -> str:
    """Return ``name`` if such a camera exists, else raise naming the closest."""
    return expect_name(name, CAMERAS, "camera")


def look_at_rotation(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """MuJoCo camera axes as columns [3, 3]: x right, y up, -z towards ``target``; world z is up in the
    picture.
    """
    back = np.asarray(position, float) - np.asarray(target, float)
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back], axis=1)


def cameras_xml() -> str:
    """The static cameras as MJCF."""
    lines = []
    for name, camera in ANCHORS.items():
        axes = look_at_rotation(np.array(camera.position), np.array(camera.look_at))
        numbers = " ".join(f"{v:.9g}" for v in (*axes[:, 0], *axes[:, 1]))
        place = " ".join(str(v) for v in camera.position)
        lines.append(f'<camera name="{name}" pos="{place}" xyaxes="{numbers}" fovy="{camera.fovy}"/>')
    return "".join(lines)


def intrinsics(model: mujoco.MjModel, name: str, size: int) -> np.ndarray:
    """Pinhole matrix [3, 3] float64 of a square image of ``size`` pixels; principal point at ``size / 2``."""
    fovy = np.deg2rad(model.cam_fovy[model.camera(name).id])
    focal = 0.5 * size / np.tan(0.5 * fovy)
    return np.array([[focal, 0.0, size / 2], [0.0, focal, size / 2], [0.0, 0.0, 1.0]])


def camera_to_world(model: mujoco.MjModel, data: mujoco.MjData, name: str) -> np.ndarray:
    """Pose [4, 4] float64 of a camera with OpenCV axes, at the moment of ``data``."""
    index = model.camera(name).id
    pose = np.eye(4)
    pose[:3, :3] = data.cam_xmat[index].reshape(3, 3) @ OPENCV_FROM_MUJOCO
    pose[:3, 3] = data.cam_xpos[index]
    return pose


def project(points: np.ndarray, matrix: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World points [N, 3] -> pixel coordinates [N, 2] (x right, y down) and depth along the axis [N] in
    metres.
    """
    local = (np.asarray(points) - pose[:3, 3]) @ pose[:3, :3]
    homogeneous = local @ matrix.T
    return homogeneous[:, :2] / homogeneous[:, 2:], local[:, 2]


def unproject(depth: np.ndarray, matrix: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Metric depth [P, P] along the optical axis -> world points [P, P, 3] at the pixel centres."""
    rows, columns = np.indices(depth.shape)
    pixels = np.stack([columns + 0.5, rows + 0.5, np.ones(depth.shape)], axis=-1)
    local = (pixels @ np.linalg.inv(matrix).T) * depth[..., None]
    return local @ pose[:3, :3].T + pose[:3, 3]
