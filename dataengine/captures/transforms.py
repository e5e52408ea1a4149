"""nerfstudio's and instant-ngp's ``transforms.json``.

``transform_matrix`` is camera to world with OpenGL axes (y up, z back), so the y and z columns change sign on the way in
and once more on the way out. ``cx`` and ``cy`` count from the corner of the first pixel, as here.
Source: docs.nerf.studio, "Data conventions"; instant-ngp, ``docs/nerf_dataset_tips.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataengine.captures import pictures
from dataengine.captures.geometry import FAR, OPENGL, check_axes
from dataengine.captures.shots import (
    Frames,
    Shot,
    arrange,
    check_pose,
    gather,
    name_in_time,
    name_still,
    orient,
)
from dataengine.lerobot.layout import PROVENANCE_LEGEND
from dataengine.storage import read_json, write_json
from dataengine.views import Views

NAMES = ("camera", "camera_label", "camera_name", "camera_id", "cam_id")
MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "RADIAL", "SIMPLE_RADIAL", "PERSPECTIVE")
UNITS = ("depth_unit_scale_factor", "integer_depth_scale")
LONGEST = 1 << 20  # pixels of a side beyond which no picture is that large


def read_transforms(
    path: str | PathLike[str],
    *,
    axes: str = "opengl",
    frames: Frames = "equal",
    fps: float | None = None,
    depth_scale: float | None = None,
    check: bool = True,
) -> Views:
    """Views from a ``transforms.json`` and the files it names.

    Args:
        path: the file, or the folder that holds it.
        axes: how its matrices are written, see :data:`dataengine.captures.geometry.AXES`; ``"auto"`` lets
            the geometry say.
        frames: ``"common"`` cuts cameras with different moments to the shared ones instead of refusing them.
        fps: frames per second; None: ``fps`` of the file, else the step of its times where they count seconds (beyond 1),
            else 10.
        depth_scale: metres per stored unit; None: what the file says, else millimetres for integers and metres for floats.
        check: refuse what :func:`dataengine.captures.check_views` refuses, but for too few views.

    Returns:
        One frame with a view for every picture where no frame has a ``time``; else ``[T, V]``, where a frame's camera is
        its ``camera`` (or ``camera_label``, ``camera_id``), the folder of its file, the start of the file's name or its
        pose.

    Raises:
        FileNotFoundError: the file or one that it names is missing.
        ValueError: it says something that cannot be, a fisheye or panorama among that; the file and the number of the
            frame, from 0, or the picture are named.
    """
    path = Path(path)
    path = path / "transforms.json" if path.is_dir() else path
    check_axes(axes, "auto")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a transforms.json, found none; check the path")
    values = read_json(path)
    entries = values.get("frames") if isinstance(values, dict) else None
    if not entries or not isinstance(entries, list):
        got = type(entries).__name__ if entries else "none"
        raise ValueError(
            f"{path}: expected a list 'frames' with at least one picture, got {got}; is it a transforms.json?"
        )
    whole = _Keys(str(path), values)
    unit = depth_scale or next((found for key in UNITS if (found := whole.above(key)) is not None), None)
    rate = fps or whole.above("fps")
    shots = orient([_shot(path, values, entry, n) for n, entry in enumerate(entries)], axes)
    timed = [entry.get("time") is not None for entry in entries]
    if any(timed) and not all(timed):
        raise ValueError(
            f"{shots[timed.index(False)].label}: expected a time as other frames have, got none; give every frame one"
        )
    names, grid = arrange(name_in_time(shots) if all(timed) else name_still(shots), frames)
    views = gather(names, grid, fps=rate or _fps([row[0].moment for row in grid]), depth_scale=unit)
    if check:
        from dataengine.captures.check import check_views

        check_views(views, least=1, axes="opencv" if axes == "auto" else axes)
    return views


def _fps(moments: list[float]) -> float:
    if len(moments) > 1 and moments[-1] > 1:
        return float(f"{1 / float(np.median(np.diff(moments))):.6g}")
    return 10.0


@dataclass(frozen=True)
class _Keys:
    """What a frame says, or the whole file where the frame says nothing, under names that hold numbers.

    Attributes:
        label: where that is, for errors.
        own, shared: the objects; a value of null is the same as none.
    """

    label: str
    own: Mapping[str, Any]
    shared: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        return self.own.get(key, self.shared.get(key))

    def number(self, key: str, what: str = "a finite number") -> float | None:
        """The number under `key`, None without one; ValueError for what is no finite number, `what` was expected."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < FAR:
            raise self.wrong(key, what)
        return float(value)

    def above(self, key: str, most: float = FAR, what: str = "a number above 0") -> float | None:
        """The same, for one above 0, though not by a rounding alone, and below `most`."""
        value = self.number(key, what)
        if value is not None and not 1 / FAR < value < most:
            raise self.wrong(key, what)
        return value

    def wrong(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self.label}: expected {what} as {key}, got {self.get(key)!r:.60}; correct it")

    def path(self, key: str, root: Path) -> Path | None:
        """The file that a frame names under `key`, seen from `root`."""
        value = self.own.get(key)
        if not value:
            return None
        if not isinstance(value, str) or "\0" in value or not Path(value).name:
            raise self.wrong(key, "the name of a file")
        return root / value


def _shot(path: Path, values: Mapping[str, Any], entry: Any, n: int) -> Shot:
    if not isinstance(entry, dict):
        raise ValueError(
            f"{path}: expected an object as frame {n}, got {type(entry).__name__}; remove it or describe its picture"
        )
    named = _Keys(f"{path}, frame {n}", entry, values)
    file = named.path("file_path", path.parent)
    if file is None:
        raise ValueError(
            f"{path}: expected file_path in frame {n}, got none; remove the frame or name its picture"
        )
    name = str(Path(entry["file_path"]))
    said = replace(named, label=f"{named.label}, {name}")
    image = pictures.find_picture(file)
    size = _size(said, image)
    return Shot(
        label=name,
        image=image,
        pose=_pose(said),
        intrinsics=_intrinsics(said, size),
        size=size,
        distortion=_distortion(said),
        view=str(next((entry[key] for key in NAMES if entry.get(key) is not None), "")),
        moment=said.number("time", "a time in seconds") or 0.0,
        provenance=_provenance(said),
        depth=said.path("depth_file_path", path.parent),
        mask=said.path("mask_path", path.parent),
        segmentation=said.path("segmentation_path", path.parent),
    )


def _size(said: _Keys, image: Path) -> tuple[int, int]:
    width, height = (said.above(key, LONGEST, "a number of pixels") for key in ("w", "h"))
    if width is None or height is None:
        height, width = pictures.read_image(image).shape[:2]
    return max(1, int(width)), max(1, int(height))


def _pose(said: _Keys) -> NDArray[np.float64]:
    rows = said.get("transform_matrix")
    plain = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    cells: list[Any] = [cell for row in rows for cell in row] if plain else [None]
    if any(isinstance(cell, bool) or not isinstance(cell, (int, float)) for cell in cells):
        raise said.wrong("transform_matrix", "4 rows of 4 numbers")
    if len({len(row) for row in rows}) > 1 or any(abs(cell) > FAR for cell in cells):
        raise said.wrong("transform_matrix", "4 rows of 4 finite numbers")
    pose = np.array(rows, np.float64)
    check_pose(pose, said.label)
    return pose


def _intrinsics(said: _Keys, size: tuple[int, int]) -> NDArray[np.float64]:
    def focal(key: str, angle: str, side: int) -> float | None:
        given = said.above(key, what="a focal length in pixels above 0")
        if given is not None:
            return given
        wide = said.above(angle, math.pi, "an angle in radians between 0 and pi")
        return None if wide is None else 0.5 * side / math.tan(0.5 * wide)

    fx, fy = focal("fl_x", "camera_angle_x", size[0]), focal("fl_y", "camera_angle_y", size[1])
    if fx is None and fy is None:
        raise ValueError(
            f"{said.label}: expected fl_x or camera_angle_x, found neither; write the focal length in pixels"
        )
    centre = [
        half if (given := said.number(key)) is None else given
        for key, half in (("cx", size[0] / 2), ("cy", size[1] / 2))
    ]
    return np.array([[fx or fy, 0, centre[0]], [0, fy or fx, centre[1]], [0, 0, 1]], np.float64)


def _distortion(said: _Keys) -> tuple[float, ...]:
    model = str(said.get("camera_model") or "OPENCV").upper()
    if model not in MODELS or said.get("is_fisheye"):
        raise ValueError(
            f"{said.label}: expected a camera_model among {', '.join(MODELS)}, got {model:.60}"
            f"{' with is_fisheye' if said.get('is_fisheye') else ''}; undistort the pictures first (colmap "
            "image_undistorter)"
        )
    more = [key for key in ("k4", "k5", "k6") if said.get(key)]
    if more:
        raise ValueError(
            f"{said.label}: expected distortion in k1, k2, k3, p1, p2, got {more[0]} too; undistort the pictures first"
        )
    return tuple(said.number(key) or 0.0 for key in ("k1", "k2", "p1", "p2", "k3"))


def _provenance(said: _Keys) -> int:
    word = said.own.get("provenance", PROVENANCE_LEGEND[0])
    if word not in PROVENANCE_LEGEND:
        raise ValueError(
            f"{said.label}: expected a provenance among {', '.join(PROVENANCE_LEGEND)}, got {word!r}; correct it"
        )
    return PROVENANCE_LEGEND.index(word)


def write_transforms(folder: str | PathLike[str], views: Views) -> Path:
    """Write views as ``transforms.json`` beside ``images/<view>/<frame>.png`` and, where there are any, ``depth`` (16-bit
    millimetres), ``masks`` (the confidence) and ``segmentation`` (16-bit ids); ``transforms.json`` comes last.

    Times count seconds; a capture of one frame has none, so that it reads as a still scene elsewhere too. Our own keys are
    ``camera``, ``fps``, ``segmentation_path`` and ``provenance``.

    Returns:
        The path of ``transforms.json``.

    Raises:
        OSError: the disk is full; no half-written file stays.
    """
    folder = Path(folder)
    assert views.provenance is not None
    cameras, entries = views.cameras, []
    writers: dict[str, tuple[str, Any, Any]] = {
        "file_path": ("images", views.images, pictures.write_image),
        "depth_file_path": ("depth", views.depth, pictures.write_depth),
        "mask_path": ("masks", views.confidence, pictures.write_mask),
        "segmentation_path": ("segmentation", views.body_ids, pictures.write_ids),
    }
    for t in range(len(views)):
        now = cameras.at(t)
        for v, name in enumerate(views.names):
            entry: dict[str, Any] = {"camera": name} | ({"time": t / views.fps} if len(views) > 1 else {})
            for key, (kind, pixels, write) in writers.items():
                if pixels is not None:
                    entry[key] = f"{kind}/{name}/{t:06d}.png"
                    write(folder / entry[key], pixels[t, v].numpy(force=True))
            matrix = now.intrinsics[v]
            entry |= {"fl_x": matrix[0, 0], "fl_y": matrix[1, 1], "cx": matrix[0, 2], "cy": matrix[1, 2]}
            entry |= {"w": cameras.width, "h": cameras.height}
            entry["provenance"] = PROVENANCE_LEGEND[int(views.provenance[t, v])]
            entry["transform_matrix"] = (now.camera_to_world[v] @ OPENGL).tolist()
            entries.append(entry)
    values = {"camera_model": "OPENCV", "fps": views.fps, "frames": entries}
    return write_json(folder / "transforms.json", values)
