"""nerfstudio's and instant-ngp's ``transforms.json``.

``transform_matrix`` is camera to world with OpenGL axes (y up, z back), so the y and z columns change sign on the way in
and once more on the way out. ``cx`` and ``cy`` count from the corner of the first pixel, as here.
Source: docs.nerf.studio, "Data conventions"; instant-ngp, ``docs/nerf_dataset_tips.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dataengine.captures import pictures
from dataengine.captures.geometry import OPENGL, check_axes
from dataengine.captures.shots import Frames, Shot, arrange, gather, name_in_time, name_still, orient
from dataengine.lerobot.layout import PROVENANCE_LEGEND
from dataengine.storage import read_json, write_json
from dataengine.views import Views

NAMES = ("camera", "camera_label", "camera_name", "camera_id", "cam_id")
MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "RADIAL", "SIMPLE_RADIAL", "PERSPECTIVE")
UNITS = ("depth_unit_scale_factor", "integer_depth_scale")


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
        ValueError: it says something that cannot be, a fisheye or panorama among that; the picture is named.
    """
    path = Path(path)
    path = path / "transforms.json" if path.is_dir() else path
    check_axes(axes, "auto")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a transforms.json, found none; check the path")
    values = read_json(path)
    entries = values.get("frames") if isinstance(values, dict) else None
    if not entries:
        raise ValueError(
            f"{path}: expected a list 'frames' with at least one picture, got none; is it a transforms.json?"
        )
    shots = orient([_shot(path, values, entry, n) for n, entry in enumerate(entries)], axes)
    timed = [entry.get("time") is not None for entry in entries]
    if any(timed) and not all(timed):
        raise ValueError(
            f"{shots[timed.index(False)].label}: expected a time as other frames have, got none; give every frame one"
        )
    names, grid = arrange(name_in_time(shots) if all(timed) else name_still(shots), frames)
    unit = depth_scale or next((float(values[key]) for key in UNITS if key in values), None)
    views = gather(names, grid, fps=fps or _fps(values, [row[0].moment for row in grid]), depth_scale=unit)
    if check:
        from dataengine.captures.check import check_views

        check_views(views, least=1, axes="opencv" if axes == "auto" else axes)
    return views


def _fps(values: Mapping[str, Any], moments: list[float]) -> float:
    if values.get("fps"):
        return float(values["fps"])
    if len(moments) > 1 and moments[-1] > 1:
        return round(1 / float(np.median(np.diff(moments))), 6)
    return 10.0


def _shot(path: Path, values: Mapping[str, Any], entry: Mapping[str, Any], n: int) -> Shot:
    file = entry.get("file_path")
    if not file:
        raise ValueError(
            f"{path}: expected file_path in frame {n}, got none; remove the frame or name its picture"
        )
    label, root = str(Path(file)), path.parent

    def get(key: str) -> Any:
        return entry.get(key, values.get(key))

    image = pictures.find_picture(root / file)
    size = (get("w"), get("h"))
    if size[0] is None or size[1] is None:
        height, width = pictures.read_image(image).shape[:2]
        size = (width, height)
    size = (int(size[0]), int(size[1]))
    files = {
        name: root / entry[key] if entry.get(key) else None
        for name, key in (
            ("depth", "depth_file_path"),
            ("mask", "mask_path"),
            ("segmentation", "segmentation_path"),
        )
    }
    return Shot(
        label=label,
        image=image,
        pose=np.array(entry.get("transform_matrix", []), np.float64),
        intrinsics=_intrinsics(get, label, size),
        size=size,
        distortion=_distortion(get, label),
        view=str(next((entry[key] for key in NAMES if entry.get(key) is not None), "")),
        moment=float(entry.get("time") or 0.0),
        provenance=_provenance(entry, label),
        **files,
    )


def _intrinsics(get: Any, label: str, size: tuple[int, int]) -> Any:
    def focal(key: str, angle: str, side: int) -> float | None:
        if get(key) is not None:
            return float(get(key))
        return 0.5 * side / math.tan(0.5 * get(angle)) if get(angle) else None

    fx, fy = focal("fl_x", "camera_angle_x", size[0]), focal("fl_y", "camera_angle_y", size[1])
    if fx is None and fy is None:
        raise ValueError(
            f"{label}: expected fl_x or camera_angle_x, found neither; write the focal length in pixels"
        )
    centre = [
        half if get(key) is None else float(get(key))
        for key, half in (("cx", size[0] / 2), ("cy", size[1] / 2))
    ]
    return np.array([[fx or fy, 0, centre[0]], [0, fy or fx, centre[1]], [0, 0, 1]], np.float64)


def _distortion(get: Any, label: str) -> tuple[float, ...]:
    model = str(get("camera_model") or "OPENCV").upper()
    if model not in MODELS or get("is_fisheye"):
        raise ValueError(
            f"{label}: expected a camera_model among {', '.join(MODELS)}, got {model}"
            f"{' with is_fisheye' if get('is_fisheye') else ''}; undistort the pictures first (colmap image_undistorter)"
        )
    more = [key for key in ("k4", "k5", "k6") if get(key)]
    if more:
        raise ValueError(
            f"{label}: expected distortion in k1, k2, k3, p1, p2, got {more[0]} too; undistort the pictures first"
        )
    return tuple(float(get(key) or 0) for key in ("k1", "k2", "p1", "p2", "k3"))


def _provenance(entry: Mapping[str, Any], label: str) -> int:
    word = entry.get("provenance", PROVENANCE_LEGEND[0])
    if word not in PROVENANCE_LEGEND:
        raise ValueError(
            f"{label}: expected a provenance among {', '.join(PROVENANCE_LEGEND)}, got {word!r}; correct it"
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
