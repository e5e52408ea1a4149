"""The definition of attention within clusters: dense attention under the mask of each cluster, and the mean of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_core import counters

if TYPE_CHECKING:
    from sparse_core.attention.masks import ClusterMask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: ClusterMask, scale: float) -> Tensor:
    """Output [B, H, Tq, D]; autograd follows the steps."""
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    scores = q.to(dtype) @ k.mT * scale
    counters.reach(peak_tile_bytes=scores.numel() * scores.element_size())
    total, times = torch.zeros_like(q, dtype=dtype), torch.zeros_like(scores[..., :1])
    for kept in mask.to_token_masks().unbind(2):
        some = kept.any(-1, keepdim=True)
        near = scores.masked_fill(~kept, -torch.inf).masked_fill(~some, 0)
        total = total + near.softmax(-1).masked_fill(~some, 0) @ v
        times = times + some
    return (total / times.clamp_min(1)).to(q.dtype)
