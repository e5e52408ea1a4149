"""What no camera saw, guessed: the planes of a scene go on where nothing speaks against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataengine.gaussians import STATIC, Gaussians
from dataengine.initialize import evidence, normals
from dataengine.views import Views

FEWEST = 0.05  # share of the static Gaussians that a plane holds at least: a table, not the face of a tool
CELLS = 96  # of the longer side of a plane
LEVEL = 0.9  # cosine of the angle between a plane and the surface at half of its points, at least
SAMPLED = 500  # points at which that is asked
BEYOND = 0.5  # how much further a plane may go than it was seen, as a share of its size
TRIALS = 256  # planes through three points that are tried
NEAREST = 12  # Gaussians that give a guessed one its colour


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A plane ``normal . x = offset`` (metres, unit normal ``[3]``) and which points ``[N]`` lie in it."""

    normal: Tensor
    offset: Tensor
    inside: Tensor

    def axes(self) -> Tensor:
        """Two unit vectors ``[2, 3]`` along the plane."""
        helper = torch.eye(3)[self.normal.abs().argmin()]
        first = torch.nn.functional.normalize(torch.linalg.cross(self.normal, helper), dim=0)
        return torch.stack([first, torch.linalg.cross(self.normal, first)])


def complete(gaussians: Gaussians, views: Views, *, planes: int = 4, seed: int = 0) -> Gaussians:
    """Static Gaussians for the parts of the largest planes of `gaussians` that no camera of `views` looked at.

    A cell of a plane is filled where no picture without depth shows it, no depth shows it or something behind it, and the
    nearest cell of which depth does say something lies in the plane (a table ends where its edge was seen). It takes the
    colour of what is nearest in the plane. `views` need depth; the result may be empty.
    """
    still = gaussians[gaussians.body == STATIC]
    found = [_fill(plane, still, views) for plane in find_planes(still, planes, seed)]
    return Gaussians.cat([still[:0], *found])


def find_planes(still: Gaussians, most: int, seed: int = 0) -> list[Plane]:
    """At most `most` planes, the largest first, by RANSAC on the centres of Gaussians, which count by their area."""
    generator = torch.Generator().manual_seed(seed)
    points, sizes = still.means, still.scales.mean(-1).exp()
    free = torch.ones(len(points), dtype=torch.bool)
    found: list[Plane] = []
    while len(found) < most and int(free.sum()) >= max(3, FEWEST * len(points)):
        at, width = points[free], sizes[free].clamp_min(0.005)
        trios = at[torch.randint(len(at), (TRIALS, 3), generator=generator)]
        normals = torch.linalg.cross(trios[:, 1] - trios[:, 0], trios[:, 2] - trios[:, 0])
        normals = torch.nn.functional.normalize(normals, dim=-1)
        near = (at @ normals.T - (trios[:, 0] * normals).sum(-1)).abs() < width[:, None]
        near &= normals.norm(dim=-1) > 0.5  # three points in a row span no plane
        best = near[:, (near * width[:, None].square()).sum(0).argmax()]
        if int(best.sum()) < max(3, FEWEST * len(points)):
            break
        inside = free.clone()
        inside[free] = best
        plane = _through(points, inside)
        free &= ~inside
        if _is_surface(plane, points, generator):
            found.append(plane)
    return found


def _through(points: Tensor, inside: Tensor) -> Plane:
    """The plane nearest to those points, least squares."""
    centre = points[inside].mean(0)
    normal = torch.linalg.svd(points[inside] - centre, full_matrices=False).Vh[2]
    return Plane(normal=normal, offset=normal @ centre, inside=inside)


def _is_surface(plane: Plane, points: Tensor, generator: torch.Generator) -> bool:
    """Whether the surface at half of the points of a plane lies in it, and does not merely cross it."""
    held = plane.inside.nonzero().squeeze(-1)
    some = held[torch.randint(len(held), (SAMPLED,), generator=generator)]
    return bool(((normals(points[some], points) @ plane.normal).abs() > LEVEL).float().mean() > 0.5)


def _fill(plane: Plane, still: Gaussians, views: Views) -> Gaussians:
    axes, inside = plane.axes(), still[plane.inside]
    flat = inside.means @ axes.T
    low, high = flat.quantile(0.01, 0), flat.quantile(0.99, 0)
    low, high = low - BEYOND * (high - low), high + BEYOND * (high - low)
    width = max(2 * float(inside.scales.exp().median()), float((high - low).max()) / CELLS)
    u, v = (torch.arange(float(a), float(b) + width, width) for a, b in zip(low, high, strict=True))
    grid = torch.cartesian_prod(u, v)
    points = grid @ axes + plane.offset * plane.normal
    found = evidence(points, views)
    there = found.there
    unseen = ~there & ~found.through & ~found.unknown
    if not unseen.any() or not there.any():
        return still[:0]
    known = grid[there | found.through]
    nearest = torch.cat([torch.cdist(part, known).argmin(-1) for part in grid[unseen].split(1024)])
    wanted = unseen.nonzero().squeeze(-1)[there[there | found.through][nearest]]
    if not len(wanted):
        return still[:0]
    count = min(NEAREST, len(flat))
    close = [torch.cdist(p, flat).topk(count, largest=False).indices for p in grid[wanted].split(1024)]
    colors = inside.colors[torch.cat(close)].mean(1)
    return Gaussians.from_points(points[wanted], colors, 0.5 * width, degree=still.degree)


def backdrop(views: Views) -> Tensor:
    """The colour ``[3]`` for what lies behind everything: the usual one of pixels without depth, or else of all."""
    assert views.depth is not None
    away = views.images[views.depth == 0]
    return (away if len(away) else views.images.flatten(0, 3)).median(0).values
