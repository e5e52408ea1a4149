"""COLMAP reconstructions in and out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataengine.captures import pictures
from dataengine.captures.colmap_files import find_model, model_text, read_model
from dataengine.captures.geometry import check_axes
from dataengine.captures.shots import Frames, Shot, arrange, folder_of, gather, name_still, number_in, orient
from dataengine.storage import atomic_write
from dataengine.views import Views

POINTS = 20_000


def read_colmap(
    folder: str | PathLike[str],
    images: str | PathLike[str] | None = None,
    *,
    axes: str = "world_to_camera",
    scale: float = 1.0,
    frames: Frames = "equal",
    in_time: bool | None = None,
    fps: float = 10.0,
    check: bool = True,
) -> tuple[Views, NDArray[np.float64], NDArray[np.uint8]]:
    """Views and points of a COLMAP model, text or binary.

    Args:
        folder: holds ``cameras``, ``images`` and perhaps ``points3D``, itself or in ``sparse/0`` or ``sparse``.
        images: the pictures; None: ``images`` in `folder`, or beside its ``sparse``.
        axes: how the poses are written; COLMAP itself writes the default.
        scale: metres per unit of the model, whose scale is free unless it was made with known poses.
        frames: ``"common"`` cuts cameras with different frames to the shared ones.
        in_time: whether ``<camera>/<frame>.png`` names cameras and moments; None: where several folders share at least
            half of their frame numbers. Otherwise every picture is a view of one moment.
        fps: frames per second of a capture in time.
        check: refuse what :func:`dataengine.captures.check_views` refuses, but for too few views, and points that lie
            behind the cameras.

    Returns:
        views, points ``[N, 3]`` in metres, their colours uint8 ``[N, 3]``. Radial and tangential distortion is taken out.

    Raises:
        FileNotFoundError: no model there, or a picture is missing.
        ValueError: a damaged file, a fisheye or other lens that OpenCV's model does not hold.
    """
    folder = Path(folder)
    check_axes(axes, "auto")
    if not scale > 0:
        raise ValueError(
            f"scale: expected metres per unit above 0, got {scale}; 1 keeps the model's own scale"
        )
    place, suffix = find_model(folder)
    lenses, registered, points, colors = read_model(place, suffix)
    root = Path(images) if images is not None else _picture_folder(folder, place)
    if not registered:
        raise ValueError(
            f"{place}: expected at least one registered image, got none; reconstruct with more pictures"
        )
    shots = []
    for image in registered:
        lens = lenses[image.camera]
        pose = image.pose.copy()
        pose[:3, 3] *= scale
        shots.append(
            Shot(
                label=image.name,
                image=pictures.find_picture(root / image.name),
                pose=pose,
                intrinsics=lens.intrinsics,
                size=lens.size,
                distortion=lens.distortion,
            )
        )
    shots = orient(shots, axes)
    timed = [replace(s, view=folder_of(s), moment=number_in(s.label)) for s in shots]
    in_time = _shares_frames(timed) if in_time is None else in_time
    names, grid = arrange(timed if in_time else name_still(shots), frames)
    views = gather(names, grid, fps=fps)
    if check:
        from dataengine.captures.check import check_points, check_views

        check_views(views, least=1, axes="opencv" if axes == "auto" else axes)
        check_points(views, points * scale)
    return views, points * scale, colors


def _picture_folder(folder: Path, place: Path) -> Path:
    tries = [folder / "images", place.parent / "images", place.parent.parent / "images"]
    return next((path for path in tries if path.is_dir()), tries[0])


def _shares_frames(shots: Sequence[Shot]) -> bool:
    moments: dict[str, set[float]] = defaultdict(set)
    for shot in shots:
        moments[shot.view].add(shot.moment)
    unique = sum(len(m) for m in moments.values()) == len(shots)
    most = max(len(m) for m in moments.values())
    return unique and len(moments) > 1 and most > 1 and 2 * len(set.intersection(*moments.values())) >= most


def write_colmap(
    folder: str | PathLike[str],
    views: Views,
    points: NDArray[Any] | None = None,
    colors: NDArray[Any] | None = None,
) -> Path:
    """Write views as ``sparse/0/{cameras,images,points3D}.txt`` beside ``images/<view>/<frame>.png``.

    Args:
        folder: where to.
        views: one PINHOLE camera for every view, or for every picture where intrinsics change.
        points: ``[N, 3]`` metres to start a reconstruction from; None: up to 20,000 points of the first frame's depth,
            none where there is no depth.
        colors: ``[N, 3]``, bytes or floats in [0, 1]; None: grey.

    Returns:
        The folder of the model. Depth, masks, ids and the frame rate have no place in the format.

    Raises:
        ValueError: points or colours of another shape, or that are not finite.
        OSError: the disk is full; no half-written file stays.
    """
    folder = Path(folder)
    cloud, paint = _cloud(views, points, colors)
    cameras = views.cameras
    changing = cameras.intrinsics.ndim == 4 and bool((np.ptp(cameras.intrinsics, axis=0) > 0).any())
    lenses, images = {}, {}
    for v, name in enumerate(views.names):
        for t in range(len(views)):
            now = cameras.at(t)
            number = 1 + (v * len(views) + t if changing else v)
            lenses[number] = (now.intrinsics[v], (cameras.width, cameras.height))
            label = f"{name}/{t:06d}.png"
            pictures.write_image(folder / "images" / label, views.images[t, v].numpy(force=True))
            images[label] = (number, now.world_to_camera[v])
    place = folder / "sparse" / "0"
    for file, text in model_text(lenses, images, cloud, paint).items():
        with atomic_write(place / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return place


def _cloud(
    views: Views, points: NDArray[Any] | None, colors: NDArray[Any] | None
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    if points is None and views.depth is not None:
        depth = views.depth[0].numpy(force=True)
        known = np.flatnonzero(depth > 0)
        known = known[:: max(1, -(-len(known) // POINTS))]
        points = views.cameras.at(0).unproject(depth).reshape(-1, 3)[known]
        colors = views.images[0].numpy(force=True).reshape(-1, 3)[known]
    points = np.zeros((0, 3)) if points is None else np.asarray(points, np.float64)
    colors = np.full(points.shape, 128, np.uint8) if colors is None else np.asarray(colors)
    if points.ndim != 2 or points.shape[1] != 3 or colors.shape != points.shape:
        raise ValueError(
            f"points, colors: expected [N, 3] each, got {list(points.shape)} and {list(colors.shape)}; give "
            "every point a colour"
        )
    if not np.isfinite(points).all():
        raise ValueError("points: expected finite metres, got NaN or infinity; leave those points out")
    if np.issubdtype(colors.dtype, np.floating):
        colors = np.rint(colors * 255)
    return points, colors.astype(np.uint8)
