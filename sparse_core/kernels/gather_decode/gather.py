"""Decoding over selected keys in plain torch: rows by `index_select`, which is several times faster than `gather`."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_core.kernels.softmax import softmax


def attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, Hq, D], log-sum-exp [B, Hq] and scores [B, Hq, n] of q [B, Hq, D] over the keys index [B, H, n]
    of k, v [B, Hkv, T, D], where H is Hq, or fewer and a group of query heads shares each list."""
    index = index[:, :, None].expand(-1, -1, q.shape[1] // index.shape[1], -1).flatten(1, 2)
    (b, hq, d), (hkv, length) = q.shape, k.shape[1:3]
    head = torch.arange(b * hq, device=q.device).view(b, hq, 1)
    base = (head // hq * hkv + head % hq // (hq // hkv)) * length
    rows = (base + index.clamp_min(0)).flatten()
    # An absent key stands for row 0, of which nothing may reach the sums, not even as 0 times NaN.
    dtype = torch.promote_types(q.dtype, torch.float32)
    near_k, near_v = (
        x.reshape(-1, d)
        .index_select(0, rows)
        .view(*index.shape, d)
        .to(dtype)
        .masked_fill((index < 0)[..., None], 0)
        for x in (k, v)
    )
    scores = (near_k @ q.to(dtype)[..., None])[..., 0] * scale
    scores = scores.masked_fill(index < 0, -torch.inf)
    weights, lse = softmax(scores)
    return (weights[..., None, :] @ near_v)[..., 0, :].to(q.dtype), lse.float(), scores.float()
