"""Cheap guesses of where attention will lie: scores of key blocks per query block, for `select`."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_core import counters

Pool = Literal["avg", "max", "min"]


class MaskEstimator(Protocol):
    """score(q [B, Hq, Tq, D], k [B, Hkv, Tk, D]) -> [B, Hq, Kq, Kk], high where attention is expected."""

    def score(self, q: Tensor, k: Tensor) -> Tensor: ...


def pool_blocks(x: Tensor, block: int, kind: Pool = "avg") -> Tensor:
    """Blocks of `block` tokens of x [B, H, T, D] as one row each, [B, H, K, D] in float32; the last one may be ragged."""
    spare = -x.shape[2] % block
    if kind == "avg":
        size = (x.shape[2] - torch.arange(0, x.shape[2], block, device=x.device)).clamp_max(block)
        return F.pad(x.float(), (0, 0, 0, spare)).unflatten(2, (-1, block)).sum(3) / size[:, None]
    fill = -torch.inf if kind == "max" else torch.inf
    rows = F.pad(x.float(), (0, 0, 0, spare), value=fill).unflatten(2, (-1, block))
    return rows.amax(3) if kind == "max" else rows.amin(3)


def share_heads(k: Tensor, heads: int) -> Tensor:
    """Keys or values [B, Hkv, ..] with each head repeated for the query heads it serves. ValueError where they do not
    divide."""
    if heads % k.shape[1]:
        raise ValueError(
            f"heads: expected a multiple of the {k.shape[1]} key-value heads, got {heads} query heads"
        )
    return k.repeat_interleave(heads // k.shape[1], 1)


class MeanPool:
    """Mean query times mean key of two blocks (the block-sparse heads of MInference, arXiv 2407.02490)."""

    def __init__(self, block: int | tuple[int, int] = 64):
        self.block = (block, block) if isinstance(block, int) else block

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, Hq, Kq, Kk]."""
        rows, columns = pool_blocks(q, self.block[0]), share_heads(pool_blocks(k, self.block[1]), q.shape[1])
        scores = rows @ columns.mT * q.shape[-1] ** -0.5
        counters.add(products=scores.numel(), multiply_adds=scores.numel() * q.shape[-1])
        return scores


def vertical_slash_scores(
    q: Tensor, k: Tensor, rows: Tensor, *, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention of the queries `rows` [n] of q [B, Hq, T, D] over k [B, Hkv, T, D], summed down columns and diagonals
    (MInference, arXiv 2407.02490).

    Columns [B, Hq, T] are keys. Diagonals hold the pairs of one offset, query minus key: [B, Hq, T] of 0 to T - 1, and if
    not causal [B, Hq, 2 T - 1] of 1 - T to T - 1.
    """
    length, device = k.shape[2], q.device
    keys = torch.arange(length, device=device)
    scores = q[:, :, rows].float() @ share_heads(k, q.shape[1]).float().mT * q.shape[-1] ** -0.5
    counters.add(products=scores.numel(), multiply_adds=scores.numel() * q.shape[-1])
    if causal:
        scores = scores.masked_fill(keys > rows[:, None], -torch.inf)
    weights = scores.softmax(-1)
    # Row i's pair of offset s is key i - s; gathering, unlike adding in place, sums in one order on every device.
    at = rows[:, None] - torch.arange(0 if causal else 1 - length, length, device=device)
    along = weights.gather(-1, at.clamp(0, length - 1).expand(*weights.shape[:2], -1, -1))
    return weights.sum(2), along.masked_fill((at < 0) | (at >= length), 0).sum(2)
