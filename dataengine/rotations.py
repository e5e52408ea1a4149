"""Rotations in torch: quaternions wxyz, matrices and rotation vectors (radians)."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(first: Tensor, second: Tensor) -> Tensor:
    """Quaternion of `second` followed by `first`: ``[.., 4]``, wxyz."""
    w1, x1, y1, z1 = first.unbind(-1)
    w2, x2, y2, z2 = second.unbind(-1)
    return torch.stack(
        [
            w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
            w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
            w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
            w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
        ],
        -1,
    )


def to_matrix(quats: Tensor) -> Tensor:
    """Rotation matrices ``[.., 3, 3]`` of quaternions ``[.., 4]`` of any length but 0."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def from_matrix(matrices: Tensor) -> Tensor:
    """Unit quaternions ``[.., 4]``, w >= 0, of rotation matrices ``[.., 3, 3]``.

    Shepperd 1978: of the four ways to take the root, the one whose root is largest.
    """
    m = matrices
    trace = m.diagonal(dim1=-2, dim2=-1).sum(-1)
    xx, yy, zz = m.diagonal(dim1=-2, dim2=-1).unbind(-1)
    squares = torch.stack([1 + trace, 1 + 2 * xx - trace, 1 + 2 * yy - trace, 1 + 2 * zz - trace], -1)
    sums, differences = m + m.mT, m - m.mT
    candidates = torch.stack(
        [
            torch.stack([squares[..., 0], differences[..., 2, 1], differences[..., 0, 2], differences[..., 1, 0]], -1),
            torch.stack([differences[..., 2, 1], squares[..., 1], sums[..., 0, 1], sums[..., 0, 2]], -1),
            torch.stack([differences[..., 0, 2], sums[..., 0, 1], squares[..., 2], sums[..., 1, 2]], -1),
            torch.stack([differences[..., 1, 0], sums[..., 0, 2], sums[..., 1, 2], squares[..., 3]], -1),
        ],
        -2,
    )  # fmt: skip
    best = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quats = torch.nn.functional.normalize(candidates.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(quats[..., :1] < 0, -quats, quats)


def from_vector(vectors: Tensor) -> Tensor:
    """Unit quaternions ``[.., 4]`` of rotation vectors ``[.., 3]``; smooth at 0."""
    half = 0.5 * (vectors.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return torch.cat([half.cos(), 0.5 * vectors * torch.sinc(half / torch.pi)], -1)


def to_vector(quats: Tensor) -> Tensor:
    """Rotation vectors ``[.., 3]`` of at most half a turn, of quaternions ``[.., 4]`` of any length but 0."""
    w, axis = quats[..., :1], quats[..., 1:]
    length = axis.norm(dim=-1, keepdim=True)
    half = torch.atan2(length, w.abs())
    return torch.where(w < 0, -axis, axis) * torch.where(length > 0, 2 * half / length, 0.0)


def unwrap(vectors: Tensor) -> Tensor:
    """The same rotations as the vectors ``[T, .., 3]``, each by as many whole turns more as bring it nearest to the one
    before."""
    found = [vectors[0]]
    for vector in vectors[1:]:
        angle = vector.norm(dim=-1, keepdim=True)
        axis = vector / angle.clamp_min(1e-12)
        turns = (((found[-1] * axis).sum(-1, keepdim=True) - angle) / (2 * torch.pi)).round()
        found.append(vector + 2 * torch.pi * turns * axis)
    return torch.stack(found)
