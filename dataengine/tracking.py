"""Rigid parts found in depth and colour, and their poses, where nobody gives them.

What moves is cut at its first frame into small parts. From frame to frame their poses are found together by Gauss-Newton:
points go to the nearest ones of the next frame, parts that touch keep touching (as the parts of one body do, and two
links at their joint). Then parts that moved as one become one body. The start of a fit, which refines the poses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataengine import rotations
from dataengine.gaussians import LOOSE, STATIC
from dataengine.initialize import moving_pixels, nearest, normals
from dataengine.views import Views


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """How to track; the unit of lengths is the median depth of what moves, whatever the size of a scene.

    Attributes:
        voxel: of the points of a frame.
        part: radius of a part.
        most: parts at most; what needs more to be covered is cut into so many, which are larger than `part`.
        fewest: points of a part.
        color: a difference of colours of one channel by 1 counts like this distance.
        reach: points further apart than this, at the end and the beginning of the search, are not the same.
        rounds: of the search, per frame.
        coupling: weight of the contact of two parts against the points of one.
        same: parts whose points one motion explains within this are one body.
    """

    voxel: float = 0.018
    part: float = 0.1
    most: int = 128
    fewest: int = 12
    color: float = 0.15
    reach: tuple[float, float] = (0.025, 0.19)
    rounds: int = 16
    coupling: float = 2.0
    same: float = 0.005


@dataclass(frozen=True, kw_only=True)
class Tracks:
    """K bodies that were found.

    Attributes:
        labels: int64 ``[T, V, H, W]`` as `Gaussians.body`: 0 static, b > 0 body b - 1, -1 moves, belongs to none.
        poses: ``[T, K, 4, 4]`` body to world.
    """

    labels: Tensor
    poses: Tensor


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What moves at a frame: voxels with centres, colours and normals, and the voxel of every moving pixel.

    Centres are in units of the median depth, as are those of a model, until the poses are found.
    """

    points: Tensor
    colors: Tensor
    normals: Tensor
    voxel: Tensor


@dataclass(kw_only=True)
class _Model:
    """The parts: points at frame 0 with colours, whose part each is, and the motion of parts from frame 0 to the last."""

    points: Tensor
    colors: Tensor
    part: Tensor
    contacts: Tensor  # [M, 3]: index of a point, its part, the other part that it touches


def track_bodies(views: Views, settings: Tracking | None = None) -> Tracks:
    """Find rigid bodies in `views` with depth, and their poses relative to the first frame.

    Raises ValueError for views without depth.
    """
    settings = settings or Tracking()
    if views.depth is None:
        raise ValueError("views: expected depth to find bodies in, got none; use polynomial")
    moving = moving_pixels(views)
    labels = torch.where(moving, LOOSE, STATIC)
    moving &= views.depth > 0
    world = torch.from_numpy(np.asarray(views.cameras.unproject(views.depth.numpy()))).float()
    unit = views.depth[moving].median() if moving.any() else torch.ones(())
    frames = [
        _voxels(world[t][moving[t]] / unit, views.images[t][moving[t]], settings) for t in range(len(views))
    ]
    if len(frames[0].points) < 8:
        return Tracks(labels=labels, poses=torch.eye(4).expand(len(views), 0, 4, 4))
    model = _parts(frames[0], settings)
    count = int(model.part.max()) + 1
    path, found = [torch.eye(4).repeat(count, 1, 1)], []
    for t, frame in enumerate(frames):
        if t:
            path.append(_follow(model, path, frame, settings))
        found.append(_adopt(model, path[-1], frame, settings))
    motion = torch.stack(path)
    body = _merge(model, motion, settings.same)
    for t, frame in enumerate(frames):
        part = found[t][frame.voxel]
        labels[t][moving[t]] = torch.where(part >= 0, body[part.clamp_min(0)] + 1, LOOSE)
    poses = _poses(model, motion, body)
    poses[..., :3, 3] *= unit
    return Tracks(labels=labels, poses=poses)


def _voxels(points: Tensor, colors: Tensor, settings: Tracking) -> _Frame:
    key = (points / settings.voxel).floor().long()
    _, group, count = torch.unique(key, dim=0, return_inverse=True, return_counts=True)
    means = [x.new_zeros(len(count), 3).index_add_(0, group, x) / count[:, None] for x in (points, colors)]
    return _Frame(points=means[0], colors=means[1], normals=normals(means[0], means[0]), voxel=group)


def _features(points: Tensor, colors: Tensor, settings: Tracking) -> Tensor:
    return torch.cat([points, settings.color * colors], -1)


def _parts(frame: _Frame, settings: Tracking) -> _Model:
    """Cut at points as far apart as can be, then two rounds of k-means."""
    features = _features(frame.points, frame.colors, settings)
    seeds, distance = features[:1], (features - features[0]).norm(dim=-1)
    while len(seeds) < settings.most and float(distance.max()) > settings.part:
        seeds = torch.cat([seeds, features[distance.argmax()][None]])
        distance = torch.minimum(distance, (features - seeds[-1]).norm(dim=-1))
    for _ in range(2):
        part, _ = nearest(features, seeds)
        seeds = torch.stack(
            [features[part == k].mean(0) if (part == k).any() else seeds[k] for k in range(len(seeds))]
        )
    sizes = torch.bincount(nearest(features, seeds)[0], minlength=len(seeds))
    seeds = seeds[sizes >= min(settings.fewest, int(sizes.max()))]
    _, part = torch.unique(nearest(features, seeds)[0], return_inverse=True)
    contacts = _contacts(frame.points, part, 2 * settings.voxel)
    return _Model(points=frame.points, colors=frame.colors, part=part, contacts=contacts)


def _contacts(points: Tensor, part: Tensor, near: float) -> Tensor:
    """``[M, 3]``: a point, its part, and the part of the nearest point of another, where that is `near`."""
    from scipy.spatial import KDTree

    pairs = torch.from_numpy(KDTree(points.numpy()).query_pairs(near, output_type="ndarray")).long()
    pairs = torch.cat([pairs, pairs.flip(1)])
    pairs = pairs[part[pairs[:, 0]] != part[pairs[:, 1]]]
    gap = (points[pairs[:, 0]] - points[pairs[:, 1]]).norm(dim=-1)
    pairs = pairs[gap.argsort()]
    _, first = np.unique(pairs[:, 0].numpy(), return_index=True)  # of every point the nearest
    point, other = pairs[torch.from_numpy(first)].unbind(-1)
    return torch.stack([point, part[point], part[other]], -1)


def _move(motion: Tensor, points: Tensor, part: Tensor) -> Tensor:
    return torch.einsum("nij,nj->ni", motion[part, :3, :3], points) + motion[part, :3, 3]


def _follow(model: _Model, path: list[Tensor], frame: _Frame, settings: Tracking) -> Tensor:
    """The motions ``[K, 4, 4]`` of the parts from frame 0 to `frame`."""
    motion = path[-1]
    if len(path) > 1:  # as they went on before
        motion = _rigid(path[-1] @ torch.linalg.inv(path[-2]) @ path[-1])
    if len(frame.points) < 9:
        return path[-1]
    target = _features(frame.points, frame.colors, settings)
    for reach in torch.linspace(settings.reach[1], settings.reach[0], settings.rounds).tolist():
        motion = _step(model, motion, frame, target, reach, settings)
    return motion


def _rigid(motion: Tensor) -> Tensor:
    """The nearest rigid motions."""
    turn = rotations.to_matrix(rotations.from_matrix(motion[:, :3, :3]))
    return torch.cat([torch.cat([turn, motion[:, :3, 3:]], -1), motion[:, 3:]], -2)


def _step(
    model: _Model, motion: Tensor, frame: _Frame, target: Tensor, reach: float, settings: Tracking
) -> Tensor:
    """One step of Gauss-Newton for all parts at once."""
    count = len(motion)
    at = _move(motion, model.points, model.part)
    ours = _features(at, model.colors, settings)
    to, far = nearest(ours, target)
    back, gap = nearest(target, ours)
    # Pairs from our points to the frame's and from the frame's to ours.
    mine, theirs = torch.cat([torch.arange(len(at)), back]), torch.cat([to, torch.arange(len(target))])
    weight = (1 - (torch.cat([far, gap]) / reach).square()).clamp_min(0).square()
    total = at.new_zeros(count, 3).index_add_(0, model.part, at)
    centre = total / torch.bincount(model.part, minlength=count).clamp_min(1)[:, None]
    residual, normal = at[mine] - frame.points[theirs], frame.normals[theirs]
    shape = weight[:, None, None] * (normal[:, :, None] * normal[:, None] + 0.2 * torch.eye(3))
    slope = _slope(at[mine] - centre[model.part[mine]])
    blocks = at.new_zeros(count, 6, 6).index_add_(0, model.part[mine], slope.mT @ shape @ slope)
    right = at.new_zeros(count, 6).index_add_(
        0, model.part[mine], (slope.mT @ shape @ residual[..., None])[..., 0]
    )
    matrix = at.new_zeros(count, count, 6, 6)
    matrix[range(count), range(count)] = blocks + torch.diag(at.new_tensor([1e-2] * 3 + [1.0] * 3))
    _couple(matrix, right, model, motion, centre, settings.coupling)
    whole = matrix.transpose(1, 2).reshape(6 * count, 6 * count)
    twist = -torch.linalg.solve(whole, right.reshape(-1)).view(count, 6)
    turn = rotations.to_matrix(rotations.from_vector(twist[:, :3]))
    moved = torch.eye(4).repeat(count, 1, 1)
    moved[:, :3, :3] = turn
    moved[:, :3, 3] = centre + twist[:, 3:] - (turn @ centre[..., None])[..., 0]
    return moved @ motion


def _slope(arm: Tensor) -> Tensor:
    """How a point ``arm`` from the centre moves with a small turn and shift: ``[n, 3, 6]``."""
    x, y, z = arm.unbind(-1)
    zero = torch.zeros_like(x)
    turn = torch.stack([zero, z, -y, -z, zero, x, y, -x, zero], -1).view(-1, 3, 3)
    return torch.cat([turn, torch.eye(3).expand(len(arm), 3, 3)], -1)


def _couple(
    matrix: Tensor, right: Tensor, model: _Model, motion: Tensor, centre: Tensor, weight: float
) -> None:
    """Where two parts touch, a point must be at one place by the motions of both; adds to the normal equations."""
    if not len(model.contacts):
        return
    point, first, second = model.contacts.unbind(-1)
    one, two = (_move(motion, model.points[point], part) for part in (first, second))
    a, b = _slope(one - centre[first]), -_slope(two - centre[second])
    gap = weight * (one - two)[..., None]
    for i, here in ((first, a), (second, b)):
        right.index_add_(0, i, (here.mT @ gap)[..., 0])
        for j, there in ((first, a), (second, b)):
            matrix.index_put_((i, j), weight * here.mT @ there, accumulate=True)


def _adopt(model: _Model, motion: Tensor, frame: _Frame, settings: Tracking) -> Tensor:
    """The part of every voxel of a frame, -1 far from all; those that lie beside the model become part of it."""
    if not len(frame.points):
        return torch.zeros(0, dtype=torch.long)
    at = _move(motion, model.points, model.part)
    beside, gap = nearest(
        _features(frame.points, frame.colors, settings), _features(at, model.colors, settings)
    )
    part = torch.where(gap < settings.part, model.part[beside], -1)
    new = (part >= 0) & (gap > 1.5 * settings.voxel)
    if new.any():
        back = _move(torch.linalg.inv(motion), frame.points[new], part[new])
        model.points, model.colors = (
            torch.cat([model.points, back]),
            torch.cat([model.colors, frame.colors[new]]),
        )
        model.part = torch.cat([model.part, part[new]])
    return part


def _merge(model: _Model, motion: Tensor, same: float) -> Tensor:
    """The body ``[K]`` of every part: the two neighbours that one motion explains best become one, again and again."""
    body = torch.arange(motion.shape[1])
    pairs = {(min(a, b), max(a, b)) for a, b in model.contacts[:, 1:].tolist()}
    error = {pair: _misfit(model, motion, body, pair) for pair in pairs}
    while error:
        best = min(error, key=lambda pair: error[pair])
        if error.pop(best) > same:
            break
        kept, gone = best
        body[body == gone] = kept
        stale = {pair for pair in error if kept in pair or gone in pair}
        renamed = {tuple(sorted(kept if k == gone else k for k in pair)) for pair in stale}
        error = {pair: value for pair, value in error.items() if pair not in stale}
        error |= {pair: _misfit(model, motion, body, pair) for pair in renamed}
    return torch.unique(body, return_inverse=True)[1]


def _misfit(model: _Model, motion: Tensor, body: Tensor, pair: tuple[int, int]) -> float:
    """The largest over the frames of the root mean square distance of the points of two bodies to one rigid motion."""
    mine = torch.isin(body[model.part], torch.tensor(pair)).nonzero().squeeze(-1)
    second = (body[model.part[mine]] == pair[1]).long()
    weight = 1.0 / torch.bincount(second, minlength=2)[second]  # a small part counts like a large one
    rest = model.points[mine]
    there = torch.stack([_move(moved, rest, model.part[mine]) for moved in motion])
    turn, shift = kabsch(rest, there, weight)
    error = (rest @ turn.mT + shift[:, None] - there).square().sum(-1)
    return float(((error @ weight) / weight.sum()).max().sqrt())


def kabsch(source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rotations ``[T, 3, 3]`` and shifts ``[T, 3]`` that take `source` ``[n, 3]`` nearest to `target`
    ``[T, n, 3]``, with weights ``[n]`` (Kabsch 1976)."""
    share = (weight / weight.sum())[:, None]
    a, b = (share * source).sum(0), (share * target).sum(1)
    u, _, vh = torch.linalg.svd((share * (source - a)).T @ (target - b[:, None]))
    flip = torch.ones_like(b)
    flip[:, 2] = torch.linalg.det(vh.mT @ u.mT).sign()
    turn = (vh.mT * flip[:, None]) @ u.mT
    return turn, b - turn @ a


def _poses(model: _Model, motion: Tensor, body: Tensor) -> Tensor:
    """Poses ``[T, bodies, 4, 4]`` whose origins are the middles of the bodies at frame 0."""
    poses = torch.eye(4).repeat(len(motion), int(body.max()) + 1, 1, 1)
    for b in range(poses.shape[1]):
        mine = body[model.part] == b
        rest, part = model.points[mine], model.part[mine]
        there = torch.stack([_move(moved, rest, part) for moved in motion])
        turn, shift = kabsch(rest, there, torch.ones(len(rest)))
        poses[:, b, :3, :3], poses[:, b, :3, 3] = turn, turn @ rest.mean(0) + shift
    return poses
