"""Captures put right: the repairs that their own geometry dictates, and views from arrays, with what is wrong named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dataengine.cameras import Cameras
from dataengine.captures import geometry
from dataengine.captures.problems import (
    Problem,
    check_points,
    check_views,
    find_problems,
    wrong_axes,
    wrong_depth,
)
from dataengine.captures.shots import Frames, check_hands, check_pose, flip
from dataengine.errors import closest
from dataengine.views import Views

__all__ = [
    "Problem",
    "build_views",
    "check_points",
    "check_views",
    "find_conventions",
    "find_problems",
    "repair",
]


def repair(
    views: Views, *, axes: str = "auto", depth_scale: float | Literal["auto"] = "auto", least: int = 2,
    check: bool = True, given: str = "opencv",
) -> tuple[Views, list[str]]:  # fmt: skip
    """Views with what can be put right put right, and a sentence for everything that was changed.

    Args:
        views: poses as somebody wrote them, read in the axes `given`.
        axes: how they are written, one of :data:`dataengine.captures.geometry.AXES`; ``"auto"`` lets the geometry say.
        depth_scale: what to multiply depth with; ``"auto"``: 0.001 or the factor to the poses where that is plain.
        least: views asked for.
        check: refuse what is left.
        given: how a reader has read them already, such as ``"opengl"`` for a ``transforms.json``; `axes` then says how the
            file itself writes them.

    Raises:
        ValueError: the sentences of what is left, such as too few views, empty masks, or views that overlap no other.
    """
    axes, depth_scale = find_conventions(views, axes=axes, depth_scale=depth_scale, given=given)
    done = []
    views = _finite(views, done)
    if axes != given:
        views = _oriented(views, axes, given)
        done.append(f"camera_to_world: read as {geometry.WORDS[axes]}, not as {geometry.WORDS[given]}")
    if views.depth is not None and depth_scale != 1.0:
        views = replace(views, depth=views.depth * depth_scale)
        done.append(f"depth: multiplied by {depth_scale:.4g}")
    if check:
        check_views(views, least=least, axes=axes)
    return views, done


def find_conventions(
    views: Views, *, axes: str = "auto", depth_scale: float | Literal["auto"] = "auto", given: str = "opencv"
) -> tuple[str, float]:
    """How poses that were read in the axes `given` are written and what depth must be multiplied with, as told or, for
    ``"auto"``, as the geometry says.

    Raises ValueError for axes that are not known and a factor that is not above 0.
    """
    geometry.check_axes(axes, "auto")
    geometry.check_axes(given)
    views = _finite(views, [])
    if axes == "auto":
        axes = next((p.remedy for p in wrong_axes(views, given)), given)
    if depth_scale == "auto":
        depth_scale = next((p.remedy for p in wrong_depth(_oriented(views, axes, given)) if p.remedy), 1.0)
    if not 0 < float(depth_scale) < np.inf:
        raise ValueError(
            f"depth_scale: expected a factor above 0, got {depth_scale}; 0.001 turns millimetres into metres"
        )
    return axes, float(depth_scale)


def _oriented(views: Views, axes: str, given: str) -> Views:
    written = geometry.from_opencv(views.cameras.camera_to_world, given)
    poses = geometry.to_opencv(written, axes)
    return replace(views, cameras=replace(views.cameras, camera_to_world=poses))


def _finite(views: Views, done: list[str]) -> Views:
    """Depth that is not finite becomes unknown (0), pixels that are not become black and count nothing."""
    changes: dict[str, Any] = {}
    if views.depth is not None and not bool(torch.isfinite(views.depth).all()):
        changes["depth"] = torch.nan_to_num(views.depth, nan=0.0, posinf=0.0, neginf=0.0)
        done.append("depth: set to unknown where it was not finite")
    bad = ~torch.isfinite(views.images).all(-1)
    counts = views.confidence
    if counts is not None and not bool(torch.isfinite(counts).all()):
        bad |= ~torch.isfinite(counts)
    if bool(bad.any()):
        changes["images"] = torch.nan_to_num(views.images, nan=0.0, posinf=1.0, neginf=0.0)
        full = torch.ones_like(views.images[..., 0]) if counts is None else torch.nan_to_num(counts)
        changes["confidence"] = full * ~bad
        done.append(f"images: {int(bad.sum())} pixels that were not finite count nothing")
    return replace(views, **changes) if changes else views


def build_views(
    images: Mapping[str, NDArray[Any]],
    intrinsics: Mapping[str, NDArray[Any]],
    poses: Mapping[str, NDArray[Any]],
    *,
    axes: str = "opencv",
    flip_axis: str | None = None,
    depth: Mapping[str, NDArray[Any]] | None = None,
    depth_scale: float = 1.0,
    masks: Mapping[str, NDArray[Any]] | None = None,
    segmentation: Mapping[str, NDArray[Any]] | None = None,
    frames: Frames = "equal",
    fps: float = 10.0,
    least: int = 2,
    check: bool = True,
) -> Views:
    """Views from arrays by camera name, with everything named that does not fit.

    Args:
        images: name -> ``[T, H, W, 3]``, bytes or floats in [0, 1].
        intrinsics: name -> ``[3, 3]`` or ``[T, 3, 3]`` pixels, centres at +0.5.
        poses: name -> ``[4, 4]`` or ``[T, 4, 4]``, written in `axes`.
        axes: one of :data:`dataengine.captures.geometry.AXES`, or ``"auto"``.
        flip_axis: the camera axis, ``"x"``, ``"y"`` or ``"z"``, that left-handed poses have the wrong way round.
        depth, masks, segmentation: name -> ``[T, H, W]``; depth times `depth_scale` is metres, masks keep where above 0.
        frames: ``"common"`` cuts longer cameras to the shortest instead of refusing them.
        fps: frames per second.
        least: views asked for.
        check: refuse what :func:`find_problems` finds.

    Raises:
        ValueError: the argument, the view and the frame at fault.
    """
    geometry.check_axes(axes, "auto")
    names = tuple(images)
    parts: dict[str, Mapping[str, Any] | None] = {"intrinsics": intrinsics, "poses": poses, "depth": depth}
    parts |= {"masks": masks, "segmentation": segmentation}
    for argument, part in parts.items():
        for name in names if part is not None else ():
            if name not in (part or {}):
                raise ValueError(
                    f"{argument}: expected the views {list(names)}, missing {name!r}; {closest(name, part or {})}"
                )
    count = _frame_count({name: len(images[name]) for name in names}, frames)

    def stack(part: Mapping[str, Any] | None, dtype: torch.dtype) -> torch.Tensor | None:
        if part is None:
            return None
        return torch.stack([torch.as_tensor(np.asarray(part[n])[:count]) for n in names], 1).to(dtype)

    shapes = {name: np.shape(images[name])[1:] for name in names}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"images: expected pictures of one size, got {shapes}; resize them and scale the intrinsics"
        )
    raw = torch.stack([torch.as_tensor(np.asarray(images[n])[:count]) for n in names], 1)
    cameras = _cameras(names, intrinsics, poses, count, shapes[names[0]][:2], flip_axis)
    scaled = stack(depth, torch.float32)
    kept = stack(masks, torch.float32)
    views = Views(
        cameras=cameras,
        images=raw / 255 if raw.dtype == torch.uint8 else raw.float(),
        depth=None if scaled is None else scaled * depth_scale,
        confidence=None if kept is None else (kept > 0).float(),
        body_ids=stack(segmentation, torch.long),
        fps=fps,
    )
    if axes == "auto":
        axes = next((p.remedy for p in wrong_axes(views)), "opencv")
    if axes != "opencv":
        views = replace(
            views, cameras=replace(cameras, camera_to_world=geometry.to_opencv(cameras.camera_to_world, axes))
        )
    if check:
        check_views(views, least=least, axes=axes)
    return views


def _frame_count(counts: Mapping[str, int], frames: Frames) -> int:
    if not counts:
        raise ValueError("images: expected at least one view, got none; pass name -> [T, H, W, 3]")
    few, many = min(counts, key=lambda n: counts[n]), max(counts, key=lambda n: counts[n])
    if counts[few] != counts[many] and frames != "common":
        raise ValueError(
            f"images: expected all views to have the same number of frames, got {counts[many]} of {many!r} and "
            f"{counts[few]} of {few!r}; cut the longer ones with frames 'common', and check with "
            "estimate_offsets that they start together"
        )
    return counts[few]


def _cameras(
    names: tuple[str, ...],
    intrinsics: Mapping[str, NDArray[Any]],
    poses: Mapping[str, NDArray[Any]],
    count: int,
    size: tuple[int, ...],
    axis: str | None,
) -> Cameras:
    moving = any(np.ndim(part[n]) == 3 for part in (intrinsics, poses) for n in names)

    def stack(part: Mapping[str, NDArray[Any]], side: int) -> NDArray[np.float64]:
        arrays = [np.asarray(part[n], np.float64) for n in names]
        if not moving:
            return np.stack(arrays)
        return np.stack(
            [np.broadcast_to(a[:count] if a.ndim == 3 else a, (count, side, side)) for a in arrays], 1
        )

    given = stack(poses, 4)
    flat = given.reshape(-1, 4, 4)
    labels = [f"poses[{n!r}]" for n in names]
    if moving:
        labels = [f"poses[{n!r}], frame {t}" for t in range(count) for n in names]
    for pose, label in zip(flat, labels, strict=True):
        check_pose(pose, label)
    if axis is not None:
        left = np.linalg.det(flat[:, :3, :3]) < 0
        flat = np.where(left[:, None, None], flip(axis, flat), flat)
    check_hands(flat, labels)
    return Cameras(names, stack(intrinsics, 3), flat.reshape(given.shape), size[1], size[0])
