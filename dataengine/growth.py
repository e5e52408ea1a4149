"""New Gaussians where a repaired picture shows a surface that the scene lacks, but never in space that a real view saw to
be empty."""

from __future__ import annotations

import torch
from torch import Tensor

from dataengine.cameras import Cameras
from dataengine.gaussians import STATIC, Gaussians
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
        views: the real views; with depth they say which space is empty, and a point there is pushed back along its ray.
        spacing: side of a cell in pixels, of which every one starts a Gaussian.
        frame: at which to look.
    """
    if pseudo.depth is None or pseudo.confidence is None:
        return scene
    depth = pseudo.depth[frame]
    empty = (alpha[frame] < EMPTY) & (depth > 0) & (pseudo.confidence[frame] > TRUSTED)
    empty &= _every(empty.shape[-2:], max(1, round(spacing)))
    if not empty.any():
        return scene
    cameras = pseudo.cameras.at(frame)
    points, far, open_ = behind_empty_space(cameras, depth, views, frame)
    empty &= open_
    focal = float(cameras.intrinsics[0, 0, 0])
    more = Gaussians.from_points(
        points[empty], pseudo.images[frame][empty], 0.5 * spacing * far[empty] / focal,
        body=torch.full((int(empty.sum()),), STATIC), degree=scene.canonical.degree,
    )  # fmt: skip
    return scene.with_more(more, frame)


def behind_empty_space(
    cameras: Cameras, depth: Tensor, views: Views, frame: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Points of `depth` ``[V, H, W]``, each moved back along its ray until no real view saw that it is empty there.

    Returns points ``[V, H, W, 3]``, their depth, and where there is such a place within `REACH` times the depth.
    """
    places = torch.zeros(*depth.shape, 3)
    far, found = depth.clone(), torch.zeros_like(depth, dtype=torch.bool)
    for step in range(STEPS):
        here = depth * REACH ** (step / (STEPS - 1))
        points = torch.from_numpy(cameras.unproject(here.numpy())).float()
        good = ~found & ~seen_empty(points.view(-1, 3), views, frame).view(depth.shape)
        places[good], far[good] = points[good], here[good]
        found |= good
    return places, far, found


def seen_empty(points: Tensor, views: Views, frame: int) -> Tensor:
    """Which `points` ``[N, 3]`` lie nearer to a real view than the surface that it saw there, by over 2 cm and 2 %."""
    empty = torch.zeros(len(points), dtype=torch.bool)
    if views.depth is None:
        return empty
    cameras = views.cameras.at(frame)
    pixels, depth = (torch.from_numpy(x) for x in cameras.project(points.double().numpy()))
    for view in range(len(cameras.names)):
        column, row = pixels[view].floor().long().unbind(-1)
        inside = (
            (column >= 0) & (column < cameras.width) & (row >= 0) & (row < cameras.height) & (depth[view] > 0)
        )
        surface = views.depth[frame, view][row[inside], column[inside]]
        empty[inside] |= depth[view][inside] < surface - 0.02 - 0.02 * surface
    return empty


def _every(size: torch.Size, step: int) -> Tensor:
    rows, columns = torch.arange(size[0]) % step == 0, torch.arange(size[1]) % step == 0
    return rows[:, None] & columns
