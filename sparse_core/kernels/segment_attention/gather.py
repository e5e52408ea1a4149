"""Attention within clusters in plain torch: the rows of some clusters at a time, gathered, attended to and added back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_core import counters

if TYPE_CHECKING:
    from sparse_core.attention.masks import ClusterMask

SCORES = 2**24  # pairs that are looked at in one go


def attend(q: Tensor, k: Tensor, v: Tensor, mask: ClusterMask, scale: float) -> Tensor:
    """Output [B, H, Tq, D]; autograd follows the steps and keeps the gathered rows, never the scores of all pairs."""
    b, h, length, d = q.shape
    per_cluster = b * h * mask.q_index.shape[-1] * mask.k_index.shape[-1]
    step = max(1, SCORES // max(1, per_cluster))
    parts = [
        _attend_clusters(q, k, v, mask, scale, first, min(first + step, mask.shape[2]))
        for first in range(0, mask.shape[2], step)
    ]
    rows, out = (torch.cat(part) for part in zip(*parts, strict=True))
    total = out.new_zeros(b * h * length + 1, d).index_add(0, rows, out)
    times = out.new_zeros(b * h * length + 1).index_add(0, rows, torch.ones_like(out[:, 0]))
    mean = total / times.clamp_min(1)[:, None]
    return mean[:-1].view(b, h, length, d).to(q.dtype)


def _attend_clusters(
    q: Tensor, k: Tensor, v: Tensor, mask: ClusterMask, scale: float, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """The rows of the output that these clusters add to, and what they add [rows, D], in float32 at least; what no token
    gets goes to one row past the last."""
    b, h, length, _ = q.shape
    kept = mask.kept(first, last).expand(b, h, -1, -1, -1).flatten(0, 1)
    counters.reach(peak_tile_bytes=kept.numel() * q.element_size())
    some = kept.any(-1)
    q_index, k_index = (
        index[:, :, first:last].expand(b, h, -1, -1).flatten(0, 1) for index in (mask.q_index, mask.k_index)
    )
    heads = torch.arange(b * h, device=q.device)
    near_q = _rows(q, q_index, heads)
    head_of_k = heads // h * k.shape[1] + heads % h // (h // k.shape[1])
    near_k, near_v = (_rows(x, k_index, head_of_k) for x in (k, v))
    # A row without any key attends to all of them and is thrown away: a softmax over nothing has NaN gradients.
    out = F.scaled_dot_product_attention(
        near_q, near_k, near_v, attn_mask=kept | ~some[..., None], scale=scale
    )
    rows = (heads[:, None, None] * length + q_index).masked_fill(~some, b * h * length)
    return rows.flatten(), out.to(torch.promote_types(q.dtype, torch.float32)).flatten(0, 2)


def _rows(x: Tensor, index: Tensor, heads: Tensor) -> Tensor:
    """Rows [N, C, w, D] of x [B, H, T, D] at index [N, C, w], from the head of (sample, head) order that `heads` [N]
    gives; empty places are 0, of which nothing may reach the sums, not even as 0 times NaN."""
    places = heads[:, None, None] * x.shape[2] + index.clamp_min(0)
    found = x.reshape(-1, x.shape[-1]).index_select(0, places.flatten()).view(*index.shape, -1)
    return found.masked_fill((index < 0)[..., None], 0)
