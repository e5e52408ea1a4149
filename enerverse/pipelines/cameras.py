"""The cameras that a user hands in, in any of three forms, checked and put in the order of the model's views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataengine.cameras import Cameras
from enerverse.pipelines.arrays import as_tensor

FORMS = "info['cameras'], dataengine.cameras.Cameras or a pair of intrinsics and camera_to_world"


def read_cameras(
    cameras: Any, views: tuple[str, ...], size: int, batch: int, name: str = "cameras"
) -> tuple[Tensor, Tensor]:
    """Intrinsics [B, V, 3, 3] in pixels and rigid camera-to-world matrices [B, V, 4, 4] in metres.

    cameras: `Cameras`, a mapping {view: {"intrinsics": [3, 3], "camera_to_world": [4, 4]}} as environments give it in
    `info`, or a pair of arrays in the order of `views`; the matrices of the last two forms belong to pictures of
    `size` pixels. Raises ValueError about `name` in one sentence.
    """
    intrinsics, poses = _read_matrices(cameras, views, size, name)
    if intrinsics.shape[-3:] != (len(views), 3, 3) or poses.shape[-3:] != (len(views), 4, 4):
        raise ValueError(
            f"{name}: expected intrinsics [{len(views)}, 3, 3] and camera_to_world [{len(views)}, 4, 4], "
            f"got {list(intrinsics.shape)} and {list(poses.shape)}; give one of each for the views {views}"
        )
    for part_name, part in (("intrinsics", intrinsics), ("camera_to_world", poses)):
        if part.ndim > 4 or (part.ndim == 4 and len(part) not in (1, batch)):
            raise ValueError(
                f"{name}: expected {part_name} of one moment for {batch} episodes, got {list(part.shape)}; "
                "give the cameras of the last observed frame"
            )
    _check_intrinsics(intrinsics, views, name)
    _check_rigid(poses, views, name)
    return intrinsics.expand(batch, -1, -1, -1), poses.expand(batch, -1, -1, -1)


def _read_matrices(cameras: Any, views: tuple[str, ...], size: int, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(cameras, Cameras):
        _check_views(cameras.names, views, name)
        chosen = cameras.select(views).scaled_to(size, size)
        parts = (chosen.intrinsics, chosen.camera_to_world)
    elif isinstance(cameras, Mapping):
        _check_views(tuple(cameras), views, name)
        parts = tuple(_stack(cameras, views, key, name) for key in ("intrinsics", "camera_to_world"))
    elif isinstance(cameras, (tuple, list)) and len(cameras) == 2:
        parts = cameras
    else:
        got = f"{len(cameras)} parts" if isinstance(cameras, (tuple, list)) else type(cameras).__name__
        raise ValueError(f"{name}: expected {FORMS}, got {got}; environments give them in info['cameras']")
    intrinsics, poses = (as_tensor(part, name, FORMS).float().cpu() for part in parts)
    return intrinsics, poses


def _check_views(names: tuple[str, ...], views: tuple[str, ...], name: str) -> None:
    missing = [view for view in views if view not in names]
    if missing:
        raise ValueError(
            f"{name}: expected the views {views}, got {names} without {missing[0]!r}; add that camera"
        )


def _stack(cameras: Mapping[str, Any], views: tuple[str, ...], key: str, name: str) -> np.ndarray:
    """One matrix of every view, stacked before the last two axes."""
    for view in views:
        if not isinstance(cameras[view], Mapping) or key not in cameras[view]:
            raise ValueError(
                f"{name}[{view!r}]: expected 'intrinsics' and 'camera_to_world', missing {key!r}; add it"
            )
    matrices = [np.asarray(cameras[view][key]) for view in views]
    if len({matrix.shape for matrix in matrices}) > 1 or matrices[0].ndim < 2:
        shapes = [list(matrix.shape) for matrix in matrices]
        raise ValueError(f"{name}: expected one {key} matrix per view, got the shapes {shapes}; mend them")
    return np.stack(matrices, -3)


def _check_intrinsics(intrinsics: Tensor, views: tuple[str, ...], name: str) -> None:
    """An upper triangle with positive focal lengths and 1 in the corner can be inverted; anything else may not."""
    focal = intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2]
    corner = (intrinsics[..., 2, :] - torch.tensor([0.0, 0.0, 1.0])).abs().amax(-1) > 1e-3
    bad = ~torch.isfinite(intrinsics).all(-1).all(-1) | ~(focal > 0).all(-1) | corner
    bad |= intrinsics[..., 1, 0].abs() > 1e-3
    if bad.any():
        raise ValueError(
            f"{name}: expected finite intrinsics with positive focal lengths in pixels for "
            f"{_first_view(bad, views)!r}, [[fx, s, cx], [0, fy, cy], [0, 0, 1]], got another matrix; check the "
            "calibration"
        )


def _first_view(bad: Tensor, views: tuple[str, ...]) -> str:
    return views[int(bad.reshape(-1, len(views)).any(0).float().argmax())]


def _check_rigid(poses: Tensor, views: tuple[str, ...], name: str) -> None:
    rotation = poses[..., :3, :3]
    error = (rotation.transpose(-1, -2) @ rotation - torch.eye(3)).abs().amax((-1, -2))
    bad = (
        (error > 1e-3)
        | ((torch.linalg.det(rotation) - 1).abs() > 1e-3)
        | ((poses[..., 3, :] - torch.tensor([0.0, 0.0, 0.0, 1.0])).abs() > 1e-3).any(-1)
        | ~torch.isfinite(poses).all(-1).all(-1)
    )
    if bad.any():
        raise ValueError(
            f"{name}: expected a rigid camera_to_world (rotation, determinant +1) for "
            f"{_first_view(bad, views)!r}, got another matrix; remove scale and shear"
        )
