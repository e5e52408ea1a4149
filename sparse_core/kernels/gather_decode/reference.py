"""The definition of decoding over selected keys: one query per head, and the keys that an index names."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_core.kernels.softmax import softmax


def attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, Hq, D], log-sum-exp [B, Hq] and scores [B, Hq, n] of q [B, Hq, D] over the keys index [B, H, n] of
    k, v [B, Hkv, T, D], where H is Hq, or fewer and a group of query heads shares each list; entries below 0 are absent,
    and a head without any gives 0 and -inf."""
    index = index[:, :, None].expand(-1, -1, q.shape[1] // index.shape[1], -1).flatten(1, 2)
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    rows = index.clamp_min(0)[..., None].expand(-1, -1, -1, k.shape[-1])
    near_k, near_v = (x.gather(2, rows).masked_fill((index < 0)[..., None], 0) for x in (k, v))
    scores = (near_k @ q.to(dtype)[..., None])[..., 0] * scale
    scores = scores.masked_fill(index < 0, -torch.inf)
    weights, lse = softmax(scores)
    return (weights[..., None, :] @ near_v)[..., 0, :].to(q.dtype), lse.float(), scores.float()
