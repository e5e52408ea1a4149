"""First Gaussians of a scene from colour alone: scattered where the cameras look."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataengine.cameras import Cameras
from dataengine.gaussians import LOOSE, STATIC, Gaussians
from dataengine.initialize import Start, moving_pixels
from dataengine.views import Views

DRAWN = 50_000  # points of a camera, among which those in a visual hull are looked for


def from_frusta(
    views: Views, count: int = 5000, *, seed: int = 0, loose: str | None = None, crowd: int = 600
) -> Start:
    """Gaussians scattered where at least two cameras look, for colour without depth; densification does the rest.

    Args:
        views: cameras and pictures.
        count: of static Gaussians.
        seed: of their places.
        loose: add loose Gaussians where the moving pixels of all views that look there meet: of every frame, each for its
            own time (`born`), or of frame 0 alone (`first`). None adds none.
        crowd: of loose Gaussians, at most, of a frame.

    Raises ValueError for views that never overlap.
    """
    generator, cameras = torch.Generator().manual_seed(seed), views.cameras.at(0)
    box = _Box.around(cameras)
    points = box.draw(20 * count, generator)
    seen = _looked_at(cameras, points)[0].sum(0) >= min(2, len(views.names))
    if not seen.any():
        raise ValueError(
            "views: expected cameras that look at one place, got none that overlap; check their poses"
        )
    points = points[seen][:count].float()
    colors = views.images.mean((0, 1, 2, 3)).expand(len(points), 3)
    size = box.reach / len(points) ** (1 / 3)
    found = [_start(points, colors, size, STATIC, 0, opacity=0.1)]
    if loose is not None:
        moving = moving_pixels(views)
        for frame in range(len(views) if loose == "born" else 1):
            found.append(_loose_from_frusta(views, moving[frame], frame, box.reach, crowd, generator))
    return Start(
        gaussians=Gaussians.cat([part.gaussians for part in found]),
        born=torch.cat([part.born for part in found]),
    )


def _loose_from_frusta(
    views: Views, moving: Tensor, frame: int, reach: float, crowd: int, generator: torch.Generator
) -> Start:
    """Loose Gaussians in the visual hull of the pixels `moving` ``[V, H, W]`` of a frame, of the colours shown there."""
    cameras = views.cameras.at(frame)
    points = _on_rays(cameras, moving, reach, generator)
    points = points[_meet(views, moving, frame, points)[0]]
    if not len(points):
        return _start(points.float(), points.float(), 1.0, LOOSE, frame, opacity=0.3)
    room = _room(cameras, moving, reach, points)
    count = min(len(points), crowd)
    points = points[torch.multinomial(room, count, generator=generator)]
    size = float(room.sum() / count) ** (1 / 3) / 2
    return _start(points.float(), _meet(views, moving, frame, points)[1], size, LOOSE, frame, opacity=0.3)


def _on_rays(cameras: Cameras, moving: Tensor, reach: float, generator: torch.Generator) -> Tensor:
    """World points ``[N, 3]`` on rays through moving pixels of every camera, evenly in depth up to twice `reach`: however
    small a thing is, its pixels are looked through."""
    found = []
    for view in range(len(cameras.names)):
        pixels = moving[view].nonzero().flip(-1).double()  # column, row
        if not len(pixels):
            continue
        chosen = torch.randint(len(pixels), (DRAWN,), generator=generator)
        unit = torch.rand(DRAWN, 3, generator=generator, dtype=torch.float64)
        at = torch.cat([pixels[chosen] + unit[:, :2], torch.ones(DRAWN, 1, dtype=torch.float64)], -1)
        pose, intrinsics = (torch.from_numpy(a[view]) for a in (cameras.camera_to_world, cameras.intrinsics))
        local = at @ torch.linalg.inv(intrinsics).T * (2 * reach * unit[:, 2:])
        found.append(local @ pose[:3, :3].T + pose[:3, 3])
    return torch.cat(found) if found else torch.empty(0, 3, dtype=torch.float64)


def _room(cameras: Cameras, moving: Tensor, reach: float, points: Tensor) -> Tensor:
    """Cubic metres ``[N]`` that each of the points of `_on_rays` stands for: one over how densely they lie there, those of
    all cameras that see the place together."""
    inside, _ = _looked_at(cameras, points)
    _, depth = (torch.from_numpy(x) for x in cameras.project(points.numpy()))
    focal = torch.from_numpy(cameras.intrinsics[:, 0, 0] * cameras.intrinsics[:, 1, 1])[:, None]
    pixels = moving.flatten(1).sum(1)[:, None]
    density = DRAWN * focal / (pixels.clamp_min(1) * depth.square() * 2 * reach)
    return 1 / torch.where(inside & (depth < 2 * reach), density, 0.0).sum(0)


def _meet(views: Views, moving: Tensor, frame: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """Which `points` ``[N, 3]`` lie behind a moving pixel of every view that looks there, two at least, and the mean
    colour ``[N, 3]`` of those pixels."""
    inside, pixels = _looked_at(views.cameras.at(frame), points)
    column, row = torch.where(inside[..., None], pixels, 0.0).long().unbind(-1)
    view = torch.arange(len(views.names))[:, None]
    colors = (views.images[frame][view, row, column] * inside[..., None]).sum(0)
    count = inside.sum(0)
    return (moving[view, row, column] | ~inside).all(0) & (count >= 2), colors / count.clamp_min(1)[:, None]


def _start(points: Tensor, colors: Tensor, size: float, body: int, frame: int, *, opacity: float) -> Start:
    n = len(points)
    gaussians = Gaussians.from_points(points, colors, size, body=torch.full((n,), body), opacity=opacity)
    return Start(gaussians=gaussians, born=torch.full((n,), frame))


@dataclass(frozen=True, eq=False)
class _Box:
    """A cube in the world about `centre` ``[3]``, whose sides are twice `reach` metres long."""

    centre: Tensor
    reach: float

    @classmethod
    def around(cls, cameras: Cameras) -> _Box:
        """About the point where the optical axes meet, to the cameras' median distance on every side."""
        centres = torch.from_numpy(cameras.camera_to_world[:, :3, 3])
        target = _meeting_point(centres, torch.from_numpy(cameras.camera_to_world[:, :3, 2]))
        return cls(target, float((centres - target).norm(dim=-1).median()))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """World points ``[count, 3]`` all over it."""
        unit = torch.rand(count, 3, generator=generator, dtype=torch.float64)
        return self.centre + self.reach * (2 * unit - 1)


def _looked_at(cameras: Cameras, points: Tensor) -> tuple[Tensor, Tensor]:
    """Which world points a camera has before it and in its picture ``[V, N]``, and the pixels ``[V, N, 2]``."""
    pixels, depth = (torch.from_numpy(x) for x in cameras.project(points.numpy()))
    size = torch.tensor([cameras.width, cameras.height])
    near = 0.05 * torch.from_numpy(cameras.camera_to_world[:, :3, 3]).diff(dim=0).norm(dim=-1).max()
    return ((pixels > 0) & (pixels < size)).all(-1) & (depth > near), pixels


def _meeting_point(centres: Tensor, axes: Tensor) -> Tensor:
    """The point nearest to all optical axes, least squares."""
    across = torch.eye(3, dtype=axes.dtype) - axes[:, :, None] * axes[:, None]
    return torch.linalg.lstsq(across.sum(0), (across @ centres[..., None]).sum(0)).solution.squeeze(-1)
