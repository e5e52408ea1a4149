"""Blocks of the video UNet. Activations are token-major, [B, V, T, h, w, C], so every layer is a dense
product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enerverse.model.attention import SelfAttention
from enerverse.model.component import start_at_zero
from sparse_core.attention.layout import Layout3D


def fourier_features(values: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features [..., width] of real `values` [...]."""
    frequencies = torch.exp(
        -math.log(max_period)
        * torch.arange(width // 2, device=values.device, dtype=torch.float32)
        / (width // 2)
    )
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class FrameConv(nn.Module):
    """2-D convolution of every frame of x [B, V, T, h, w, C]."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0)

    def forward(self, x: Tensor) -> Tensor:
        # A token-major tensor seen as channels-last: no copy.
        y = self.conv(x.flatten(0, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y.reshape(*x.shape[:3], *y.shape[1:])


class TemporalConv(nn.Module):
    """Convolution (3, 1, 1) along time of x [B, V, T, h, w, C]; starts at zero.

    A frame's cells are laid out as one row, so the (3, 1, 1) convolution is a 2-D one of kernel (3, 1)
    without a copy.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = start_at_zero(nn.Conv2d(width, width, (3, 1), padding=(1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1).flatten(2, 3).permute(0, 3, 1, 2)
        return self.conv(rows).permute(0, 2, 3, 1).reshape(x.shape)


class Modulation(nn.Module):
    """LayerNorm whose scale and shift come from a per-frame embedding [B, T, E] (FiLM)."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = start_at_zero(nn.Linear(embedding, 2 * width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, None, :, None, None].chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class SpaceTimeBlock(nn.Module):
    """Spatial and temporal convolution, then attention over time, then joint over all views of one frame.

    Time comes first: what the memory shows at a place has reached the future frames before their places look at each
    other, so one block is enough to carry a cue from memory to the whole picture.

    With `attention=False` a block is its spatial convolution alone, for the finest grid of a small model.
    The temporal attention is bidirectional inside the window; the joint spatial attention is how views see
    each other (EnerVerse, arXiv 2501.01895, section 3.1 and appendix F). Sparse methods see views and places in
    tiles, and over time always keep the `memory` frames at the beginning of the window.
    """

    def __init__(self, width: int, embedding: int, heads: int, *, attention: bool = True, memory: int = 0):
        super().__init__()
        self.memory = memory
        self.modulate = Modulation(width, embedding)
        self.spatial = FrameConv(width, width)
        self.temporal = TemporalConv(width) if attention else None
        self.views = SelfAttention(width, heads, embedding) if attention else None
        self.time = SelfAttention(width, heads) if attention else None
        if self.temporal is None:
            start_at_zero(self.spatial)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, V, T, h, w, C], embedding [B, T, E] -> [B, V, T, h, w, C]."""
        h = self.spatial(F.silu(self.modulate(x, embedding)))
        if self.temporal is None:
            return x + h
        return self._attend_views(self._attend_time(x + self.temporal(F.silu(h))), embedding)

    def _attend_views(self, x: Tensor, embedding: Tensor) -> Tensor:
        assert self.views is not None
        b, v, t, h, w, c = x.shape
        tokens = x.transpose(1, 2).reshape(b * t, v * h * w, c)
        mixed = self.views(tokens, Layout3D(views=v, height=h, width=w), embedding.flatten(0, 1))
        return mixed.view(b, t, v, h, w, c).transpose(1, 2)

    def _attend_time(self, x: Tensor) -> Tensor:
        assert self.time is not None
        b, v, t, h, w, c = x.shape
        tokens = x.permute(0, 1, 3, 4, 2, 5).reshape(b * v * h * w, t, c)
        mixed = self.time(tokens, Layout3D(frames=t - self.memory, sink=self.memory))
        return mixed.view(b, v, h, w, t, c).permute(0, 1, 4, 2, 3, 5)


class Downsample(nn.Module):
    """Halve the grid: a 2x2 patch becomes one token."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.merge = FrameConv(inputs, outputs, kernel=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(x)


class Upsample(nn.Module):
    """Double the grid: one token becomes a 2x2 patch."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.split = nn.Linear(inputs, 4 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        b, v, t, h, w, _ = x.shape
        y = self.split(x).view(b, v, t, h, w, 2, 2, -1)
        return y.permute(0, 1, 2, 3, 5, 4, 6, 7).reshape(b, v, t, 2 * h, 2 * w, -1)
