"""Attention over [batch, tokens, channels], with the implementation chosen for where it runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enerverse.model.component import start_at_zero


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q, k, v [B, H, N, D].

    On a CPU plain matrix products are used while training: the backward pass of the fused kernel costs six
    times its forward pass there.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype))


class SelfAttention(nn.Module):
    """Pre-normalised multi-head self-attention with a residual connection; its output starts at zero."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = start_at_zero(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = attend(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
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
        return x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
