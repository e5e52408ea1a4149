"""First Gaussians of a scene from depth, and what depth says of points. Without depth: `dataengine.frusta`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dataengine.cameras import Cameras
from dataengine.gaussians import LOOSE, STATIC, Gaussians
from dataengine.views import Views

MOVED = 20 / 255  # a pixel has moved when a channel is further than this from its median over time


@dataclass(frozen=True, kw_only=True)
class Start:
    """Gaussians and the frame ``[N]`` at which each was seen."""

    gaussians: Gaussians
    born: Tensor


def moving_pixels(views: Views) -> Tensor:
    """Which pixels show something that moves, bool ``[T, V, H, W]``.

    Cameras that stand still and have depth: what is nearer than the farthest seen there, or of another colour than
    that is usually, or that another view looked through at some frame. Otherwise: what differs from its median over
    time, grown by one pixel. Moving cameras see motion everywhere, and are judged so.
    """
    if len(views) < 2:
        return torch.zeros(views.images.shape[:-1], dtype=torch.bool)
    if views.depth is None or not still(views.cameras):
        return _differ_from_median(views)
    far = views.depth.amax(0)
    behind = views.depth > far - slack(far)
    usual = torch.where(behind[..., None], views.images, torch.nan).nanmedian(0).values
    other = (views.images - usual).abs().amax(-1) > MOVED
    points = torch.from_numpy(views.cameras.at(0).unproject(far.numpy())).float()
    through = evidence(points.view(-1, 3), views).through.view(far.shape)
    return (views.depth > 0) & (~behind | other | through)


def still(cameras: Cameras) -> bool:
    """Whether none of the cameras moves or zooms."""
    arrays = (cameras.camera_to_world, cameras.intrinsics)
    return cameras.frames is None or all(np.allclose(array, array[:1], atol=1e-5) for array in arrays)


def _differ_from_median(views: Views) -> Tensor:
    median = views.images.median(0).values
    moved = (views.images - median).abs().amax(-1) > MOVED
    if views.depth is not None:
        usual = views.depth.median(0).values
        far = (views.depth - usual).abs() > slack(usual)
        moved |= far & (views.depth > 0) & (usual > 0)
    return F.max_pool2d(moved.float(), 3, 1, 1) > 0


def slack(depth: Tensor) -> Tensor:
    """By how much two depths of one surface may differ, metres; stored depth is coarser where it is far."""
    return 0.02 + 0.02 * depth


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What depth says of points, bool ``[N]``: some view shows them, some view shows what is behind, some view looked
    there without knowing the depth."""

    there: Tensor
    through: Tensor
    unknown: Tensor


def evidence(points: Tensor, views: Views) -> Evidence:
    """What the depth of `views` says, over all frames, of world points ``[N, 3]`` that do not move."""
    assert views.depth is not None
    there, through, unknown = (torch.zeros(len(points), dtype=torch.bool) for _ in range(3))
    size, view = torch.tensor([views.cameras.width, views.cameras.height]), torch.arange(len(views.names))
    for frame in range(len(views)):
        pixels, depth = (torch.from_numpy(x).float() for x in views.cameras.at(frame).project(points.numpy()))
        inside = ((pixels >= 0) & (pixels < size)).all(-1) & (depth > 0)
        column, row = torch.where(inside[..., None], pixels, 0.0).long().unbind(-1)
        # The nearest of a pixel and those beside it: beside an edge, nothing is looked through.
        least = -F.max_pool2d(-views.depth[frame], 3, 1, 1)
        here, near = (x[view[:, None], row, column] for x in (views.depth[frame], least))
        there |= (inside & (here > 0) & ((here - depth).abs() < slack(depth))).any(0)
        through |= (inside & (near > depth + slack(depth))).any(0)
        unknown |= (inside & (here == 0)).any(0)
    return Evidence(there=there, through=through, unknown=unknown)


def normals(points: Tensor, among: Tensor, count: int = 9) -> Tensor:
    """Unit normals ``[n, 3]``, of either sign, at `points` ``[n, 3]``: of the planes through the nearest `count` of
    `among`; zero where there are fewer."""
    if len(among) < count:
        return torch.zeros_like(points)
    near, _ = nearest(points, among, count)
    around = among[near] - among[near].mean(1, keepdim=True)
    return torch.linalg.eigh(around.mT @ around).eigenvectors[..., 0]


def nearest(points: Tensor, among: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Indices of and distances to the nearest of `among` ``[m, d]`` for each of `points` ``[n, d]``: ``[n]``, or
    ``[n, count]``, nearest first, for a `count` above 1. Memory grows with n + m."""
    from scipy.spatial import KDTree

    gap, index = KDTree(among.numpy()).query(points.numpy(), count)
    return torch.from_numpy(np.asarray(index)).long(), torch.from_numpy(np.asarray(gap)).to(points.dtype)


def from_depth(
    views: Views,
    bodies: Tensor | None = None,
    poses: Tensor | None = None,
    *,
    spacing: float = 1.5,
    degree: int = 0,
) -> Start:
    """Gaussians at the points that depth shows, one per cell of a grid.

    Args:
        views: with depth.
        bodies: int64 ``[T, V, H, W]``: 0 static, b > 0 rigid body b - 1; None finds what moves by itself, which then is
            loose (-1).
        poses: ``[T, n, 4, 4]`` of the bodies; their points of every frame are brought back to frame 0.
        spacing: side of a cell in pixels at the median depth.
        degree: of the spherical harmonics.

    Raises:
        ValueError: no depth, or fewer than one known pixel.
    """
    if views.depth is None or not (views.depth > 0).any():
        raise ValueError(
            "views: expected depth to start from, got none; use dataengine.frusta.from_frusta for colour alone"
        )
    label = _labels(views, bodies, poses)
    points = torch.from_numpy(np.asarray(_unproject(views))).float()
    focal = float(np.median(views.cameras.intrinsics[..., 0, 0]))
    cell = spacing * float(views.depth[views.depth > 0].median()) / focal
    frame = torch.arange(len(views)).view(-1, 1, 1, 1).expand(label.shape)
    near = views.depth > 0
    points, colors, label, frame, depth = (x[near] for x in (points, views.images, label, frame, views.depth))
    if poses is not None:
        points = _back_to_first(points, label, frame, poses)
    # Points of one cell, one body and, where they are loose, one frame become one Gaussian; far ones get wider cells.
    width = cell * (depth / depth.median()).clamp_min(1.0).log2().round().exp2()
    time = torch.where(label == LOOSE, frame, 0)
    key = torch.cat([(points / width[:, None]).floor().long(), width[:, None].log2().round().long(), label[:, None],
                     time[:, None]], -1)  # fmt: skip
    _, group, count = torch.unique(key, dim=0, return_inverse=True, return_counts=True)

    def mean(values: Tensor) -> Tensor:
        total = values.new_zeros(len(count), *values.shape[1:]).index_add_(0, group, values)
        return total / count.view(-1, *(1,) * (values.ndim - 1))

    first = torch.full((len(count),), len(group)).scatter_reduce_(0, group, torch.arange(len(group)), "amin")
    size = 0.5 * mean(width)
    gaussians = Gaussians.from_points(mean(points), mean(colors), size, body=label[first], degree=degree)
    return Start(gaussians=gaussians, born=time[first])


def _unproject(views: Views) -> np.ndarray:
    assert views.depth is not None
    return views.cameras.unproject(views.depth.numpy())


def _labels(views: Views, bodies: Tensor | None, poses: Tensor | None) -> Tensor:
    if bodies is None:
        return torch.where(moving_pixels(views), LOOSE, STATIC)
    if bodies.shape != views.images.shape[:-1]:
        raise ValueError(f"bodies: expected {list(views.images.shape[:-1])}, got {list(bodies.shape)}")
    return bodies if poses is not None else torch.where(bodies > 0, LOOSE, STATIC)


def _back_to_first(points: Tensor, label: Tensor, frame: Tensor, poses: Tensor) -> Tensor:
    """World points of rigid bodies to where they were at frame 0."""
    moved = label > 0
    body, time = label[moved] - 1, frame[moved]
    back = poses[0][body] @ torch.linalg.inv(poses)[time, body]
    brought = torch.einsum("nij,nj->ni", back[:, :3, :3].float(), points[moved]) + back[:, :3, 3].float()
    return points.masked_scatter(moved[:, None], brought)
