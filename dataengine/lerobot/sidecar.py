"""Camera poses beside a dataset that has none in its columns: ``meta/cameras.json``.

Either what :meth:`dataengine.cameras.Cameras.to_json` gives, or view -> camera, perhaps under the key ``cameras``::

    {"axes": "opencv",
     "front": {"intrinsics": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], "camera_to_world": [4 x 4],
               "width": 640, "height": 480}}

``world_to_camera`` may stand for ``camera_to_world``; ``extrinsics`` is camera to world, as in our columns. ``axes`` is
``opencv`` (the default) or ``opengl``. Intrinsics are in pixels of width x height, by default those of the stored
pictures; pixel centres at +0.5, metres. Cameras stand still in the whole dataset. A file of conventions alone, as
:class:`dataengine.episodes.EpisodeWriter` leaves it beside columns that hold the poses, says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataengine.cameras import Cameras
from dataengine.errors import DatasetError, closest
from dataengine.lerobot import layout

KEYS = ("intrinsics", "camera_to_world", "world_to_camera", "extrinsics", "width", "height")
WORDS = ("axes", "cameras", *layout.CAMERA_CONVENTION, "views")
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])


def read_sidecar(root: Path) -> dict[str, Any] | None:
    """``meta/cameras.json`` where it holds cameras, None where it is absent or holds conventions alone.

    Raises:
        DatasetError: the file is damaged or is no JSON object.
    """
    path = root / layout.CAMERAS_PATH
    if not path.is_file():
        return None
    values = _read(path)
    if "camera_to_world" not in values and not any(isinstance(v, dict) for v in values.values()):
        return None
    return values


def read_cameras(path: Path, size: tuple[int, int]) -> Cameras:
    """The cameras of a file like ``meta/cameras.json``, all of them, for pictures of `size` (height, width).

    Raises:
        FileNotFoundError: no such file. DatasetError: it is damaged or holds no cameras; a camera at fault is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of cameras, found none; check the path")
    values = _read(path)
    table = values.get("cameras", {k: v for k, v in values.items() if k not in WORDS})
    names = values["names"] if "camera_to_world" in values else list(table)
    found = _cameras_of(path, values, names, dict.fromkeys(names, size)) if names else None
    if found is None:
        raise DatasetError(
            f"{path}: expected view -> camera, got no camera; write intrinsics and poses", path=path
        )
    try:
        return Cameras(tuple(names), *found, size[1], size[0])
    except ValueError as cause:
        raise DatasetError(f"{path}: {cause}", path=path) from cause


def sidecar_cameras(
    root: Path,
    values: Mapping[str, Any],
    names: Sequence[str],
    sizes: Mapping[str, tuple[int, int]],
    frames: int,
) -> Cameras | None:
    """The cameras of the views `names` over T `frames`, None where one of them has none.

    Args:
        sizes: view -> (height, width) of its stored pictures; intrinsics are scaled to them.

    Raises:
        DatasetError: a camera that is incomplete or cannot be; the view is named.
    """
    path = root / layout.CAMERAS_PATH
    found = _cameras_of(path, values, names, sizes)
    if found is None or not names:
        return None
    height, width = sizes[names[0]]
    if len({sizes[name] for name in names}) > 1:
        return None  # the record holds views of one size
    over = [np.broadcast_to(a, (frames, *a.shape)) for a in (found[0], found[1])]
    try:
        return Cameras(tuple(names), over[0], over[1], width, height)
    except ValueError as cause:
        raise DatasetError(f"{path}: {cause}", path=path) from cause


Found = tuple[np.ndarray, np.ndarray]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise DatasetError(
            f"{path}: cannot be read ({cause}); restore this file from a copy", path=path
        ) from cause
    if not isinstance(values, dict):
        raise DatasetError(
            f"{path}: expected an object, got {type(values).__name__}; write view -> camera", path=path
        )
    return values


def _cameras_of(
    path: Path, values: Mapping[str, Any], names: Sequence[str], sizes: Mapping[str, tuple[int, int]]
) -> Found | None:
    try:
        read = _from_record if "camera_to_world" in values else _from_views
        return read(values, names, sizes)
    except (ValueError, TypeError, KeyError) as cause:
        raise DatasetError(f"{path}: {cause}", path=path) from cause


def _from_record(
    values: Mapping[str, Any], names: Sequence[str], sizes: Mapping[str, tuple[int, int]]
) -> Found | None:
    cameras = Cameras.from_json(json.dumps(values))
    if cameras.frames is not None:
        raise ValueError(
            f"cameras: expected cameras that stand still, got {cameras.frames} frames; store moving ones in columns"
        )
    if any(name not in cameras.names for name in names):
        return None
    parts = [cameras.select([name]).scaled_to(sizes[name][1], sizes[name][0]) for name in names]
    return np.concatenate([p.intrinsics for p in parts]), np.concatenate([p.camera_to_world for p in parts])


def _from_views(
    values: Mapping[str, Any], names: Sequence[str], sizes: Mapping[str, tuple[int, int]]
) -> Found | None:
    axes = values.get("axes", "opencv")
    if axes not in ("opencv", "opengl"):
        raise ValueError(f"axes: expected 'opencv' or 'opengl', got {axes!r}; say how the poses are written")
    table = values.get("cameras", {k: v for k, v in values.items() if k not in WORDS})
    if any(name not in table for name in names):
        return None
    pairs = [_camera(name, table[name], axes, sizes[name]) for name in names]
    return np.stack([p[0] for p in pairs]), np.stack([p[1] for p in pairs])


def _camera(name: str, entry: Mapping[str, Any], axes: str, size: tuple[int, int]) -> Found:
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"{name}: unknown key {key!r}; {closest(key, KEYS)}")
    given = [key for key in KEYS[1:4] if key in entry]
    if "intrinsics" not in entry or len(given) != 1:
        raise ValueError(
            f"{name}: expected intrinsics and one of camera_to_world, world_to_camera, extrinsics, got {sorted(entry)}; "
            "write both matrices"
        )
    intrinsics, pose = np.array(entry["intrinsics"], np.float64), np.array(entry[given[0]], np.float64)
    if intrinsics.size != 9 or pose.size != 16:
        raise ValueError(
            f"{name}: expected intrinsics 3 x 3 and a pose 4 x 4, got {list(intrinsics.shape)} and {list(pose.shape)}; "
            "write whole matrices"
        )
    intrinsics, pose = intrinsics.reshape(3, 3), pose.reshape(4, 4)
    if given[0] == "world_to_camera":
        pose = np.linalg.inv(pose)
    if axes == "opengl":
        pose = pose @ OPENGL
    ratio = [[size[1] / entry.get("width", size[1])], [size[0] / entry.get("height", size[0])], [1.0]]
    return intrinsics * np.array(ratio), pose
