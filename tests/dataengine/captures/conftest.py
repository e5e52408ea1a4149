"""A floor with a checker and a ball that rolls over it, seen by calibrated cameras: exact pictures, depth and ids."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dataengine.cameras import Cameras
from dataengine.views import Views

HEIGHT, WIDTH = 40, 48
INTRINSICS = np.array([[52.0, 0.0, 23.0], [0.0, 51.0, 21.0], [0.0, 0.0, 1.0]])
PLACES = {"front": (1.3, 0.1, 0.7), "left": (0.1, 1.2, 0.8), "top": (-0.5, -0.6, 1.2)}


def look_at(position, target=(0.0, 0.0, 0.0)) -> np.ndarray:
    """Camera to world, OpenCV axes, level horizon."""
    forward = np.asarray(target, float) - position
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    pose[:3, 3] = position
    return pose


def render(
    pose: np.ndarray, ball: np.ndarray, radius: float = 0.18
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image [H, W, 3], depth [H, W] metres along the axis, ids [H, W] (1 the ball)."""
    u, v = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(INTRINSICS).T @ pose[:3, :3].T
    start = pose[:3, 3]
    floor = np.where(rays[..., 2] < -1e-6, -start[2] / np.minimum(rays[..., 2], -1e-6), np.inf)
    b, offset = rays @ (start - ball), start - ball
    a = (rays * rays).sum(-1)
    inside = b * b - a * (offset @ offset - radius**2)
    near = np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, np.inf)
    depth, ids = np.minimum(floor, near), (near < floor).astype(np.int64)
    points = start + rays * np.where(np.isfinite(depth), depth, 0)[..., None]
    check = (np.floor(points[..., 0] * 5) + np.floor(points[..., 1] * 5)) % 2
    image = np.stack([0.3 + 0.4 * check, 0.5 + 0.1 * check, 0.6 - 0.2 * check], -1)
    normal = (points - ball) / radius
    image = np.where(
        ids[..., None] == 1, np.stack([0.6 + 0.3 * normal[..., 2], 0 * u + 0.1, 0 * u + 0.15], -1), image
    )
    far = ~np.isfinite(depth)
    image[far], depth[far] = (0.7, 0.8, 0.9), 0
    return np.clip(image, 0, 1).astype(np.float32), depth.astype(np.float32), ids


def rolling(t: float) -> np.ndarray:
    """The ball at time t in frames: it starts, stops and turns."""
    return np.array([0.35 * np.sin(0.5 * t) * np.cos(0.13 * t), 0.3 * np.sin(0.31 * t + 1), 0.18])


def scene(
    frames: int = 1,
    names: tuple[str, ...] = ("front", "left", "top"),
    *,
    late: dict[str, float] | None = None,
    path: Callable[[float], np.ndarray] = rolling,
    moving: bool = False,
) -> Views:
    """Views of the scene; `late` gives streams that lag by so many frames."""
    late = late or {}
    rows = []
    poses = np.array([[look_at(PLACES[n]) for n in names]] * frames)
    if moving:
        for t in range(frames):
            poses[t, -1] = look_at(np.add(PLACES[names[-1]], (0.02 * t, 0, 0)))
    for t in range(frames):
        rows.append([render(poses[t, v], path(t - late.get(n, 0.0))) for v, n in enumerate(names)])
    images, depth, ids = (np.stack([[cell[k] for cell in row] for row in rows]) for k in range(3))
    return Views(
        cameras=Cameras(
            names, np.array([INTRINSICS] * len(names)), poses if moving else poses[0], WIDTH, HEIGHT
        ),
        images=torch.from_numpy(images),
        depth=torch.from_numpy(depth),
        body_ids=torch.from_numpy(ids),
        fps=10.0,
    )


@pytest.fixture(scope="session")
def make_scene() -> Callable[..., Views]:
    return scene


@pytest.fixture(scope="session")
def aim() -> Callable[..., np.ndarray]:
    return look_at
