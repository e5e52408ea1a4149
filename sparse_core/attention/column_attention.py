"""Attention over blocks of keys and loose columns, with one softmax over both."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_core.attention.estimators import share_heads
from sparse_core.attention.masks import ColumnBlockMask
from sparse_core.attention.merge import merge_lse
from sparse_core.kernels.block_attention import Implementation, block_sparse_attention


def column_block_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnBlockMask, *, scale: float | None = None, return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale q k^T) v over the pairs that `mask` keeps, differentiable; see `block_sparse_attention`.

    q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D]. Loose columns are gathered per query head into one short sequence, whose part
    is merged with that of the blocks by the log-sum-exps. Returns [B, Hq, Tq, D] in the dtype of q, and with `return_lse`
    [B, Hq, Tq] in float32; a query row without any key gives 0 and -inf. Raises ValueError for what does not fit.
    """
    mask = mask.to(q.device)
    parts = [_part(q, k, v, mask.blocks, scale, implementation)]
    if mask.columns.shape[-1]:
        keys, values = _gather(k, mask.columns, q.shape[1]), _gather(v, mask.columns, q.shape[1])
        # The CPU kernel packs single keys into tiles itself; triton wants blocks of at least 16.
        loose = mask.loose(16 if q.is_cuda else 1)
        parts.append(_part(q, keys, values, loose, scale, implementation))
    out, lse = merge_lse(parts) if len(parts) > 1 else parts[0]
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def _part(q, k, v, mask, scale, implementation) -> tuple[Tensor, Tensor]:
    return block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True, implementation=implementation)  # type: ignore[return-value]


def _gather(x: Tensor, columns: Tensor, heads: int) -> Tensor:
    """Rows [B, Hq, n, D] of keys or values x [B, Hkv, T, D]; an empty place holds the first row, which nobody lists."""
    columns = columns.clamp_min(0).expand(x.shape[0], heads, -1)
    b = torch.arange(x.shape[0], device=x.device)[:, None, None]
    owner = share_heads(torch.arange(x.shape[1], device=x.device)[None], heads)[0]
    return x[b, owner[:, None], columns]
