"""Block-sparse attention in plain torch: the kept keys of some query blocks at a time, gathered. Any device, any dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_core.kernels.softmax import softmax

if TYPE_CHECKING:
    from sparse_core.attention.masks import BlockMask


SCORES = 2**22  # scores that are held at once


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, D] and log-sum-exp [B, Hq, Tq]; autograd follows the steps."""
    (bq, bk), device = mask.block_size, q.device
    mask = mask.to(device)
    count, index = mask.lists
    per_block = q.shape[0] * q.shape[1] * bq * index.shape[-1] * bk
    step = max(1, SCORES // max(1, per_block))
    parts = [
        _attend_blocks(
            q, k, v, mask, scale, count[:, :, first : first + step], index[:, :, first : first + step], first
        )
        for first in range(0, mask.shape[2], step)
    ]
    out, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return out.to(q.dtype), lse


def _attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, count: Tensor, index: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """The query blocks from `first` on, as many as `index` [B, H, n, cap] has."""
    (bq, bk), device, blocks = mask.block_size, q.device, index.shape[2]
    index = index[..., : max(1, int(count.max()))]
    listed = (torch.arange(index.shape[-1], device=device) < count[..., None]).repeat_interleave(bk, -1)
    j = (index[..., None] * bk + torch.arange(bk, device=device)).flatten(-2)
    j, listed = (x.expand(*q.shape[:2], -1, -1) for x in (j, listed & (j < mask.kv_len)))
    i = (first + torch.arange(blocks, device=device))[:, None] * bq + torch.arange(bq, device=device)
    b, h = (torch.arange(size, device=device) for size in q.shape[:2])
    b, h = b[:, None, None, None], h[:, None, None]
    keys = j.clamp_max(mask.kv_len - 1)
    group = q.shape[1] // k.shape[1]
    # Places beyond a row's list hold whatever; what is not listed must not reach the sums, not even as 0 times NaN.
    dtype = torch.promote_types(q.dtype, torch.float32)
    near_k, near_v = (x[b, h // group, keys].to(dtype).masked_fill(~listed[..., None], 0) for x in (k, v))
    near_q = q[b, h, i.clamp_max(mask.q_len - 1)].to(dtype)
    inside = (i < mask.q_len)[..., None] & listed[..., None, :]
    kept = inside & mask.to_rule()(
        b[..., None], h[..., None], i.clamp_max(mask.q_len - 1)[..., None], keys[..., None, :]
    )
    weights, lse = softmax((near_q @ near_k.mT * scale).masked_fill(~kept, -torch.inf))
    rows = slice(0, min(blocks * bq, mask.q_len - first * bq))
    return (weights @ near_v).flatten(2, 3)[:, :, rows], lse.float().flatten(2, 3)[:, :, rows]
