"""Attention over compressed rows of keys in plain torch: the keys of some rows at a time, gathered. Any device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_core.kernels.softmax import softmax

if TYPE_CHECKING:
    from sparse_core.attention.masks import TokenCSR

GATHERED = 2**22  # floats of keys that are gathered at once


def attend(q: Tensor, k: Tensor, v: Tensor, mask: TokenCSR, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, D] and log-sum-exp [B, Hq, Tq]; autograd follows the steps."""
    mask = mask.to(q.device)
    (b, hq, tq, d), longest = q.shape, max(1, int(mask.counts.max()))
    step = max(1, GATHERED // (longest * d))
    parts = [
        _attend_rows(
            q, k, v, mask, scale, torch.arange(first, min(b * hq * tq, first + step), device=q.device)
        )
        for first in range(0, max(1, b * hq * tq), step)
    ]
    out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return out.view(q.shape).to(q.dtype), lse.view(b, hq, tq)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: TokenCSR, scale: float, task: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows `task` [n], counted over samples, query heads and queries: [n, D] and [n]."""
    hq, tq = q.shape[1:3]
    sample, head, query = task // (hq * tq), task // tq % hq, task % tq
    row = ((sample if mask.batch > 1 else 0) * mask.heads + (head if mask.heads > 1 else 0)) * tq + query
    first, count = mask.crow[row], mask.crow[row + 1] - mask.crow[row]
    place = torch.arange(max(1, int(count.max())) if len(count) else 1, device=q.device)
    listed = place < count[:, None]
    entry = torch.where(listed, first[:, None] + place, 0)
    key = mask.col[entry] if len(mask.col) else entry
    owner, group = sample[:, None], (head // (hq // k.shape[1]))[:, None]
    # Places beyond a row's list hold whatever; what is not listed must not reach the sums, not even as 0 times NaN.
    dtype = torch.promote_types(q.dtype, torch.float32)
    near_k, near_v = (x[owner, group, key].to(dtype).masked_fill(~listed[..., None], 0) for x in (k, v))
    near_q = q[sample, head, query].to(dtype)
    scores = (near_k @ near_q[..., None])[..., 0] * scale
    weights, lse = softmax(scores.masked_fill(~listed, -torch.inf))
    return (weights[:, None] @ near_v)[:, 0], lse.float()
