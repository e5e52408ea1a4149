"""New Gaussians where a repaired picture shows a surface that the scene lacks, but never in space that a real view saw to
be empty."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dataengine.cameras import Cameras
from dataengine.gaussians import STATIC, Gaussians
from dataengine.initialize import slack, still
from dataengine.scene import Scene
from dataengine.views import Views

EMPTY = 0.5  # alpha below which a pixel shows a hole
TRUSTED = 0.1  # confidence from which on a repaired pixel may start a Gaussian
REACH = 2.0  # times its depth a point may be pushed back, out of empty space
STEPS = 24


def grown(scene: Scene, pseudo: Views, alpha: Tensor, views: Views, spacing: float, frame: int = 0) -> Scene:
    """The scene with static Gaussians where `pseudo` shows a surface and the scene covers less than half of a pixel.

    Args:
        scene: what was rendered.
        pseudo: repaired pictures with depth and confidence.
        alpha: ``[T, V, H, W]`` of the renders that were repaired.
        views: the real views; with depth they say which space is empty at any frame, where nothing static can be, and a
            point there is pushed back along its ray.
        spacing: side of a cell in pixels, of which every one starts a Gaussian.
        frame: at which to look for what the scene lacks.
    """
    if pseudo.depth is None or pseudo.confidence is None:
        return scene
    depth = pseudo.depth[frame]
    empty = (alpha[frame] < EMPTY) & (depth > 0) & (pseudo.confidence[frame] > TRUSTED)
    empty &= _every(empty.shape[-2:], max(1, round(spacing)))
    if not empty.any():
        return scene
    cameras = pseudo.cameras.at(frame)
    points, far, open_ = behind_empty_space(cameras, torch.where(empty, depth, 0.0), views)
    empty &= open_
    focal = float(cameras.intrinsics[0, 0, 0])
    more = Gaussians.from_points(
        points[empty], pseudo.images[frame][empty], 0.5 * spacing * far[empty] / focal,
        body=torch.full((int(empty.sum()),), STATIC), degree=scene.canonical.degree,
    )  # fmt: skip
    return scene.with_more(more, frame)


def behind_empty_space(cameras: Cameras, depth: Tensor, views: Views) -> tuple[Tensor, Tensor, Tensor]:
    """Points of `depth` ``[V, H, W]``, each moved back along its ray until no real view saw that it is empty there.

    Returns points ``[V, H, W, 3]``, their depth, and where there is such a place within `REACH` times the depth; there is
    none where `depth` is 0.
    """
    places = torch.zeros(*depth.shape, 3)
    far, open_ = depth.clone(), depth > 0
    for step in range(STEPS):
        here = depth * REACH ** (step / (STEPS - 1))
        points = torch.from_numpy(cameras.unproject(here.numpy())).float()[open_]
        good = open_.clone()
        good[open_] = ~seen_empty(points, views)
        places[good], far[good] = points[good[open_]], here[good]
        open_ &= ~good
    return places, far, (depth > 0) & ~open_


def seen_empty(points: Tensor, views: Views) -> Tensor:
    """Which `points` ``[N, 3]`` lie nearer to a real view than the surface that it saw there at any frame, by more than
    depth varies."""
    empty = torch.zeros(len(points), dtype=torch.bool)
    for cameras, surfaces in _moments(views):
        pixels, depth = (torch.from_numpy(x) for x in cameras.project(points.double().numpy()))
        column, row = pixels.nan_to_num(-1.0).floor().long().unbind(-1)
        inside = (column >= 0) & (column < cameras.width) & (row >= 0) & (row < cameras.height) & (depth > 0)
        for view, surface in enumerate(surfaces):
            mine = inside[view]
            farthest = surface[row[view, mine], column[view, mine]]
            empty[mine] |= depth[view, mine] < farthest - slack(farthest)
    return empty


def _moments(views: Views) -> Iterator[tuple[Cameras, Tensor]]:
    """Cameras and depth ``[V, H, W]`` of every frame. Of cameras that stand still the farthest depth says the same."""
    if views.depth is None:
        return
    if still(views.cameras):
        yield views.cameras.at(0), views.depth.amax(0)
    else:
        yield from ((views.cameras.at(t), depth) for t, depth in enumerate(views.depth))


def _every(size: torch.Size, step: int) -> Tensor:
    rows, columns = torch.arange(size[0]) % step == 0, torch.arange(size[1]) % step == 0
    return rows[:, None] & columns
