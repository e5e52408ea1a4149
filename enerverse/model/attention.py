"""Attention over [batch, tokens, channels]; self-attention has a slot that a sparse method may fill."""

from __future__ import annotations

from torch import Tensor, nn

from enerverse.model.component import start_at_zero
from sparse_core.attention.layer import dense_attention
from sparse_core.attention.layout import Layout3D
from sparse_core.attention.slot import AttentionSlot


class SelfAttention(nn.Module):
    """Pre-normalised multi-head self-attention with a residual connection; its output starts at zero. condition: channels
    that the method in its slot may be told besides the tokens."""

    def __init__(self, width: int, heads: int, condition: int = 0):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = start_at_zero(nn.Linear(width, width))
        self.slot = AttentionSlot(heads, width // heads, condition=condition)

    def forward(self, x: Tensor, layout: Layout3D | None = None, condition: Tensor | None = None) -> Tensor:
        """x [B, N, C] -> [B, N, C]; layout: how the tokens lie in space and time, for methods that choose blocks;
        condition [B, E]: for methods that take one."""
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = self.slot(q, k, v, layout, condition).transpose(1, 2).reshape(batch, tokens, width)
        return x + self.out(mixed)


class CrossAttention(nn.Module):
    """Queries from the action tokens, keys and values from the condition; residual, output starts at zero."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_context = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.keys = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = start_at_zero(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, N, C], context [B, S, C] -> [B, N, C]."""
        q = self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = self.keys(self.norm_context(context)).chunk(2, -1)
        k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (keys, values))
        return x + self.out(dense_attention(q, k, v).transpose(1, 2).flatten(2))
