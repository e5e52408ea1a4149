"""Where new cameras stand around a scene that others look at: read off the cameras alone, whatever the scene is."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dataengine.cameras import Cameras
from dataengine.captures.geometry import focus, sees

Array = NDArray[np.float64]
MARGIN = 30.0  # degrees of azimuth beyond the outermost cameras: further round, nobody has seen the scene
RISE = 7.0  # degrees of elevation below the lowest and above the highest camera
LOWEST, STEEPEST = (
    10.0,
    80.0,
)  # degrees: nearer to the ground things hide each other, straight down has no upright
GOLDEN = 0.618033988749895
STILL = 1e-5  # metres, pixels: what moves less stands still
AXES = np.concatenate([np.eye(3)[::-1], -np.eye(3)])  # z before y before x, up before down


def place_cameras(cameras: Cameras, count: int, *, margin: float = MARGIN) -> Cameras:
    """`count` cameras that stand still on the dome about the point that `cameras` look at.

    Each in turn halves the widest gap in azimuth between its neighbours or to the ends of the arc, which lie `margin`
    degrees beyond the outermost camera; elevations follow the golden section through the range of the given ones, and
    neither come near the ground nor look straight down. Distance and intrinsics are those of the given camera nearest in
    direction. All look at the meeting point of the optical axes and hold the world's vertical upright.

    Args:
        cameras: V cameras, fixed or of T frames. Where any stand still, those that move are passed over; but with one that
            does, they tell how far along its axis the place lies that all look at.
        count: how many.
        margin: degrees.

    Returns:
        fixed cameras ``view_00``, ``view_01``, ... (numbers that are taken are passed over).

    Raises:
        ValueError: a count below 1, cameras whose axes do not meet, or meet where the only one that stands still does not
            look.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1 new camera, got {count}")
    every = over_time(cameras)
    still = find_still(*every)
    poses, intrinsics = (a[0, still] if still.any() else a.reshape(-1, *a.shape[2:]) for a in every)
    centre = focus(poses if still.sum() > 1 else every[0].reshape(-1, 4, 4))
    if centre is None:
        raise ValueError(
            f"cameras: expected at least two that look at one place from different directions, got {list(cameras.names)} "
            "whose axes are parallel or which stand in one place; name the new cameras yourself"
        )
    if (
        still.sum() == 1
        and not sees(poses[0], intrinsics[0], (cameras.width, cameras.height), centre[None])[0]
    ):
        raise ValueError(
            f"cameras: expected those that move to look where {cameras.names[still.argmax()]!r} looks, got axes that meet "
            "outside its picture; name the new cameras yourself"
        )
    up = find_up(poses)
    azimuths, elevations, distances = on_dome(poses, centre, up)
    turns = spread(azimuths, count, margin)
    heights = climb(elevations, count)
    directions = [direction(turn, height, up) for turn, height in zip(turns, heights, strict=True)]
    known = np.stack([direction(a, e, up) for a, e in zip(azimuths, elevations, strict=True)])
    nearest = [int((known @ d).argmax()) for d in directions]
    placed = [
        look_at(centre + distances[n] * d, centre, up) for n, d in zip(nearest, directions, strict=True)
    ]
    names = free_names(cameras.names, count)
    return Cameras(names, intrinsics[nearest], np.stack(placed), cameras.width, cameras.height)


def over_time(cameras: Cameras) -> tuple[Array, Array]:
    """Poses ``[T, V, 4, 4]`` and intrinsics ``[T, V, 3, 3]``; T is 1 for fixed cameras."""
    frames = cameras.frames or 1
    arrays = (cameras.camera_to_world, cameras.intrinsics)
    poses, intrinsics = (np.broadcast_to(a, (frames, *a.shape[-3:])) for a in arrays)
    return poses, intrinsics


def find_still(poses: Array, intrinsics: Array) -> NDArray[np.bool_]:
    """Which of V cameras stand still over T frames, ``[V]``."""
    return (np.ptp(poses, axis=0) < STILL).all((-1, -2)) & (np.ptp(intrinsics, axis=0) < STILL).all((-1, -2))


def find_up(poses: Array) -> Array:
    """The vertical of the world ``[3]``, from cameras ``[N, 4, 4]`` that are held upright: their x axes are level.

    The direction across all x axes, taken for an axis of the world within 5 degrees of one. Where the x axes are all
    alike, as of cameras above each other, an axis of the world that is across them, z first; at last the mean of what the
    pictures call up.
    """
    right, tops = poses[:, :3, 0], -poses[:, :3, 1].mean(0)
    values, vectors = np.linalg.eigh(right.T @ right / len(right))
    if values[1] > 0.01:  # two x axes 12 degrees apart
        up = vectors[:, 0] * (1.0 if vectors[:, 0] @ tops >= 0 else -1.0)
        return next((axis for axis in AXES if axis @ up > np.cos(np.radians(5.0))), up)
    level = [axis for axis in AXES if np.abs(right @ axis).mean() < 0.1 and tops @ axis > 0.25]
    return level[0] if level else tops / np.linalg.norm(tops)


def on_dome(poses: Array, centre: Array, up: Array) -> tuple[Array, Array, Array]:
    """Azimuths and elevations in degrees and distances in metres ``[N]`` of cameras seen from `centre`."""
    away = poses[:, :3, 3] - centre
    distances = np.linalg.norm(away, axis=1)
    x, y = level_axes(up)
    elevations = np.degrees(np.arcsin(np.clip(away @ up / distances, -1.0, 1.0)))
    return np.degrees(np.arctan2(away @ y, away @ x)), elevations, distances


def level_axes(up: Array) -> tuple[Array, Array]:
    """Two level axes ``[3]`` of the dome; the first is the world's x axis, levelled, or z where x is the vertical."""
    start = np.eye(3)[0] if abs(up[0]) < 0.9 else np.eye(3)[2]
    x = start - (start @ up) * up
    x /= np.linalg.norm(x)
    return x, np.asarray(np.cross(up, x), np.float64)


def direction(azimuth: float, elevation: float, up: Array) -> Array:
    """From the centre to a place on the dome, of length 1."""
    x, y = level_axes(up)
    turn, rise = np.radians(azimuth), np.radians(elevation)
    return np.cos(rise) * (np.cos(turn) * x + np.sin(turn) * y) + np.sin(rise) * up


def spread(azimuths: Array, count: int, margin: float) -> list[float]:
    """`count` azimuths in degrees, each in the middle of the widest gap that is left on the arc."""
    known = np.sort(np.unique(np.round(azimuths % 360.0, 6)))
    gaps = np.diff(np.append(known, known[0] + 360.0))
    first = known[(int(gaps.argmax()) + 1) % len(known)]  # the arc begins behind the widest gap
    places = sorted(((known - first) % 360.0).tolist())
    if gaps.max() > 2 * margin:
        places = [-margin, *places, places[-1] + margin]
    else:  # seen from all around
        places = [*places, 360.0]
    turns = []
    for _ in range(count):
        widths = np.round(np.diff(places), 9)
        widest = int(widths.argmax())
        middle = 0.5 * (places[widest] + places[widest + 1])
        places.insert(widest + 1, middle)
        turns.append(float(first + middle))
    return turns


def climb(elevations: Array, count: int) -> list[float]:
    """`count` elevations in degrees, neighbours far apart."""
    low, high = float(elevations.min()), float(elevations.max())
    low, high = max(low - RISE, min(low, LOWEST)), min(high + RISE, STEEPEST)
    low = min(low, high)
    return [low + (high - low) * ((0.5 + i * GOLDEN) % 1.0) for i in range(count)]


def look_at(position: Array, target: Array, up: Array) -> Array:
    """camera_to_world ``[4, 4]``, OpenCV axes, at `position`, with `target` in the middle of the picture."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    pose[:3, 3] = position
    return pose


def free_names(taken: Sequence[str], count: int) -> tuple[str, ...]:
    """``view_00`` and on, after the highest number that is taken."""
    numbers = [int(found[1]) for name in taken if (found := re.fullmatch(r"view_(\d+)", name))]
    start = max(numbers, default=-1) + 1
    return tuple(f"view_{start + i:02d}" for i in range(count))
