"""Camera placement, and the one place where MuJoCo cameras become OpenCV cameras.

MuJoCo cameras look along -z with y up. Everything outside this file uses OpenCV axes (x right, y down, z
forward), ``camera_to_world`` [4, 4], intrinsics [3, 3] in pixels with pixel centres at +0.5, metres.
"""

# pyright: reportAttributeAccessIssue=false
# mujoco's names come from compiled modules without stubs.

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import mujoco
import numpy as np

from sims.errors import expect, expect_name

OPENCV_FROM_MUJOCO = np.diag([1.0, -1.0, -1.0])
TABLE = ((-0.40, -0.75, -0.06), (1.10, 0.75, 0.0))  # lowest and highest corner, metres
FLOOR = -0.5  # metres
CLEARANCE = 0.02  # metres: nearer than this nothing is drawn
STEEPEST = 1e-3  # radians off the vertical: nearer to it the picture has no upright


@dataclasses.dataclass(frozen=True, kw_only=True)
class CameraPlacement:
    """A static camera: position and look-at point in metres, vertical field of view in degrees.

    Raises ValueError for numbers that are not finite, a camera inside the table or the floor, one that looks along
    the vertical (its picture has no upright) or at itself, and a field of view outside (0, 180).
    """

    position: tuple[float, float, float]
    look_at: tuple[float, float, float]
    fovy: float

    def __post_init__(self) -> None:
        for name in ("position", "look_at"):
            object.__setattr__(self, name, _point(name, getattr(self, name)))
        expect(0.0 < self.fovy < 180.0, "fovy", "degrees in (0, 180)", self.fovy)
        place, low, high = np.array(self.position), *np.array(TABLE)
        inside = bool(((place > low - CLEARANCE) & (place < high + CLEARANCE)).all())
        expect(not inside, "position", "a point outside the table", self.position, "raise the camera")
        expect(
            self.position[2] > FLOOR + CLEARANCE,
            "position",
            f"a point above the floor at {FLOOR} m",
            self.position,
            "raise the camera",
        )
        view = np.array(self.look_at) - place
        expect(
            float(np.hypot(view[0], view[1])) > STEEPEST * float(np.linalg.norm(view)),
            "look_at",
            "a point that is not straight above or below the camera",
            f"{self.look_at} from {self.position}",
            "move one of them sideways",
        )


def _point(name: str, value: Sequence[float]) -> tuple[float, float, float]:
    numbers = np.asarray(value, float)
    good = numbers.shape == (3,) and bool(np.isfinite(numbers).all())
    expect(good, name, "3 finite numbers in metres", value)
    return (float(numbers[0]), float(numbers[1]), float(numbers[2]))


# The field is about 50 cm wide at the workspace, so a 5 cm cube covers 6-7 of 64 pixels. The top camera
# stands beyond the workspace, tilted back, because from straight above the hand would hide what it grasps.
ANCHORS: dict[str, CameraPlacement] = {
    "front": CameraPlacement(position=(1.27, 0.0, 0.55), look_at=(0.51, 0.0, 0.125), fovy=34.0),
    "left": CameraPlacement(position=(0.52, 0.80, 0.50), look_at=(0.52, 0.0, 0.115), fovy=34.0),
    "right": CameraPlacement(position=(0.52, -0.80, 0.50), look_at=(0.52, 0.0, 0.115), fovy=34.0),
    "top": CameraPlacement(position=(0.90, 0.0, 0.92), look_at=(0.49, 0.0, 0.04), fovy=32.0),
}
CAMERAS = (*ANCHORS, "wrist")

# Rings of free cameras: pictures of about the same scale as the anchors', from 22 to 44 degrees above the table.
RING_RADIUS = 0.78  # metres, horizontal
RING_HEIGHT = (0.42, 0.86)  # metres above the table
RING_LOOK_AT = (0.51, 0.0, 0.10)
RING_FOVY = 36.0
RING_ARC = math.radians(300.0)  # leaves out the views from behind the arm, which hides the workspace there
Height = float | tuple[float, float]


def ring(
    n: int,
    *,
    radius: float = RING_RADIUS,
    height: Height = RING_HEIGHT,
    look_at: tuple[float, float, float] = RING_LOOK_AT,
    fovy: float = RING_FOVY,
    arc: float = RING_ARC,
    phase: float = 0.0,
    name: str = "ring",
) -> dict[str, CameraPlacement]:
    """``n`` cameras around the workspace, named ``ring_00``, ``ring_01``, ...

    Args:
        radius: horizontal distance from ``look_at``, metres.
        height: metres above the table. A pair (low, high) makes a dome: ``n`` different heights between the two,
            dealt out so that neighbours differ much.
        look_at: the point that all look at, metres.
        fovy: vertical field of view, degrees.
        arc: how much of the circle they share evenly, radians up to 2 pi; by default 300 degrees.
        phase: azimuth of the arc's middle in radians, 0 in front of the robot, growing to its left.
        name: what the names begin with.

    Raises:
        ValueError: ``n`` < 1, a radius or an arc out of range, or a camera that cannot be (``CameraPlacement``).
    """
    expect(isinstance(n, int) and n >= 1, "n", "a whole number of cameras >= 1", repr(n))
    return _dome(name, _steps(n), _shuffled(_steps(n)), radius, height, look_at, fovy, arc, phase)


def holdout_ring(
    n: int,
    *,
    beside: int,
    radius: float = RING_RADIUS,
    height: Height = RING_HEIGHT,
    look_at: tuple[float, float, float] = RING_LOOK_AT,
    fovy: float = RING_FOVY,
    arc: float = RING_ARC,
    phase: float = 0.0,
    name: str = "holdout",
) -> dict[str, CameraPlacement]:
    """``n`` cameras named ``holdout_00``, ... as far as can be in azimuth and in height from ``ring(beside)``.

    Azimuths lie halfway between those that the two rings could share, the heights of a dome too, so no camera has
    either in common with ``ring(beside)`` made with the same arguments. Those are explained there.

    Raises:
        ValueError: as :func:`ring`; also for ``beside`` < 1.
    """
    expect(isinstance(n, int) and n >= 1, "n", "a whole number of cameras >= 1", repr(n))
    expect(isinstance(beside, int) and beside >= 1, "beside", "a whole number of cameras >= 1", repr(beside))
    common = math.lcm(n, beside)
    # Steps are odd multiples of 1 / 2n, so those of the two rings meet where both divide `common` alike.
    meet = (common // n) % 2 == (common // beside) % 2
    steps = [step + 0.5 / common * meet for step in _steps(n)]
    return _dome(name, steps, _shuffled(steps), radius, height, look_at, fovy, arc, phase)


def _steps(n: int) -> list[float]:
    """The middles of ``n`` equal parts of [0, 1]."""
    return [(i + 0.5) / n for i in range(n)]


def _shuffled(values: list[float]) -> list[float]:
    """The same values in strides of about the golden section, so that neighbours differ much."""
    n = len(values)
    stride = min((s for s in range(1, n + 1) if math.gcd(s, n) == 1), key=lambda s: abs(s - 0.618 * n))
    return [values[i * stride % n] for i in range(n)]


def _dome(
    name: str,
    turns: list[float],
    levels: list[float],
    radius: float,
    height: Height,
    look_at: tuple[float, float, float],
    fovy: float,
    arc: float,
    phase: float,
) -> dict[str, CameraPlacement]:
    """Cameras at the given shares of the arc and of the height between low and high."""
    expect(radius > 0.0, "radius", "metres > 0", radius)
    expect(0.0 < arc <= 2.0 * math.pi, "arc", "radians in (0, 2 pi]", arc)
    low, high = height if isinstance(height, tuple) else (height, height)
    cameras = {}
    for i, (turn, level) in enumerate(zip(turns, levels, strict=True)):
        azimuth = phase + arc * (turn - 0.5)
        x, y = look_at[0] + radius * math.cos(azimuth), look_at[1] + radius * math.sin(azimuth)
        position = (x, y, low + (high - low) * level)
        cameras[f"{name}_{i:02d}"] = CameraPlacement(position=position, look_at=look_at, fovy=fovy)
    return cameras


def check_camera(name: str, free: Iterable[str] = ()) -> str:
    """Return ``name`` if such a camera exists, else raise naming the closest."""
    return expect_name(name, (*CAMERAS, *free), "camera")


def check_free_cameras(cameras: Mapping[str, CameraPlacement] | None) -> dict[str, CameraPlacement]:
    """A copy of name -> placement; raises ValueError for names that are taken or that files cannot hold."""
    free = dict(cameras or {})
    for name, camera in free.items():
        plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", name) is not None
        expect(plain, "free_cameras", "names of letters, digits, '_', '.' and '-'", repr(name))
        expect(name not in CAMERAS, "free_cameras", "names that are not taken", repr(name), "choose another")
        kind = type(camera).__name__
        expect(isinstance(camera, CameraPlacement), f"free_cameras[{name!r}]", "a CameraPlacement", kind)
    return free


def look_at_rotation(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """MuJoCo camera axes as columns [3, 3]: x right, y up, -z towards ``target``; world z is up in the
    picture.
    """
    back = np.asarray(position, float) - np.asarray(target, float)
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back], axis=1)


def cameras_xml(free: Mapping[str, CameraPlacement] | None = None) -> str:
    """The static cameras as MJCF, the free ones after the anchors."""
    lines = []
    for name, camera in {**ANCHORS, **(free or {})}.items():
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
