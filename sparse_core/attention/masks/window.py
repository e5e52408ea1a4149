"""A window around every query."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_core.attention.masks.block import BlockMask


def window_mask(there: Tensor, size: int, *, causal: bool = True, skip_self: bool = False) -> BlockMask:
    """Blocks of about half of `size` tokens that see themselves and the block before (and after, unless causal).

    there: bool [B, T], which tokens exist; others see nothing and are not seen. skip_self: no token looks at itself unless
    it sees nothing else. The mask's blocks are powers of two of at least 16 tokens.
    """
    length, whole = there.shape[1], bool(there.all())
    block = 1 << (max(16, size // 2).bit_length() - 1)
    at = torch.arange(-(-length // block), device=there.device)
    near = ((at[:, None] - at).abs() <= 1) & ((at[:, None] >= at) if causal else True)
    shape = (len(there), 1, len(at), len(at))
    lone = _lone(there, block, causal)
    # A rule is asked for whole blocks, the last of which may be ragged.
    there, lone = (F.pad(x, (0, -length % block)) for x in (there, lone))

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        b = b if len(there) > 1 else b * 0
        kept = there[b, i] & there[b, j]
        if causal:
            kept = kept & (i >= j)
        return kept & ((i != j) | lone[b, i]) if skip_self else kept

    if whole and not causal and not skip_self:
        return BlockMask.from_dense_blocks(near, block_size=block, q_len=length, kv_len=length)
    full = near & (at[:, None] != at) if whole else torch.zeros_like(near)
    return BlockMask.from_dense_blocks(
        near.expand(shape), full=full.expand(shape), rule=rule, block_size=block, q_len=length, kv_len=length
    )


def _lone(there: Tensor, block: int, causal: bool) -> Tensor:
    """bool [B, T]: tokens that see no other."""
    at = torch.arange(there.shape[1], device=there.device)
    before = F.pad(there.long().cumsum(1), (1, 0))
    begin = (at // block - 1).clamp_min(0) * block
    end = at if causal else ((at // block + 2) * block).clamp_max(there.shape[1])
    return before[:, end] - before[:, begin] <= (0 if causal else 1)
