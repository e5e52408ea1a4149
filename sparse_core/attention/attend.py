"""Attention under any mask: each kind goes to the kernel that reads it."""

from __future__ import annotations

from torch import Tensor

from sparse_core.attention.column_attention import column_block_attention
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.masks import BlockMask, ClusterMask, ColumnBlockMask, IndexMask, SpanPlan, TokenCSR
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.csr_attention import csr_attention
from sparse_core.kernels.segment_attention import segment_attention

Mask = BlockMask | ColumnBlockMask | TokenCSR | IndexMask | SpanPlan | ClusterMask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attention [B, Hq, Tq, D] of q over k, v [B, Hkv, Tk, D] under `mask`, with gradients.

    Raises TypeError for what is no mask, ValueError for one that does not fit.
    """
    if isinstance(mask, SpanPlan):
        mask = mask.for_heads(q.shape[1]).to_block_mask(q.shape[2], k.shape[2])
    if isinstance(mask, IndexMask):
        mask = TokenCSR.from_index(mask)
    if isinstance(mask, BlockMask):
        return block_sparse_attention(q, k, v, mask.to(q.device))  # type: ignore[return-value]
    if isinstance(mask, ColumnBlockMask):
        return column_block_attention(q, k, v, mask)  # type: ignore[return-value]
    if isinstance(mask, ClusterMask):
        return segment_attention(q, k, v, mask)
    if not isinstance(mask, TokenCSR):
        raise TypeError(f"mask: expected one of sparse_core.attention.masks, got {type(mask).__name__}")
    return csr_attention(q, k, v, mask.to(q.device))  # type: ignore[return-value]


class FixedMask(AttentionLayer):
    """Attention under one given mask, whatever the tokens."""

    def __init__(self, mask: Mask):
        super().__init__()
        self.given = mask

    def mask(self, q: Tensor, k: Tensor, v: Tensor) -> Mask:
        """The mask that was given; spans as the blocks that they are at this length."""
        if isinstance(self.given, SpanPlan):
            return self.given.for_heads(q.shape[1]).to_block_mask(q.shape[2], k.shape[2])
        return self.given

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """[B, Hq, T, D]."""
        return attend(q, k, v, mask)
