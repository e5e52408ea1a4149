"""The definition of block-sparse attention, in as few words as torch has for it. Every other implementation must agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_core.kernels.softmax import softmax

if TYPE_CHECKING:
    from sparse_core.attention.masks import BlockMask, TokenCSR


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | TokenCSR, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, D] and log-sum-exp [B, Hq, Tq] of the scores that `mask` keeps; a row of which none is kept gives
    0 and -inf. Key-value heads serve Hq / Hkv query heads each. Builds [Tq, Tk] scores."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    kept = mask.to_token_mask().to(q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    weights, lse = softmax((q.to(dtype) @ k.to(dtype).mT * scale).masked_fill(~kept, -torch.inf))
    return (weights @ v.to(dtype)).to(q.dtype), lse.float()
