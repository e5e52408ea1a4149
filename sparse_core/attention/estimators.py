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
        counters.add(products=scores.numel())
        return scores
