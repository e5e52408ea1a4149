"""From what a linear attention says of each row to a narrow map of attention, by convolutions (SEA, arXiv 2310.01777)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_core import counters


class MapDecoder(nn.Module):
    """Rows x [B, H, T, width] -> scores [B, H, T, K]: a narrow map per row, then convolutions over (query, column) whose
    channels are all heads. Looking both ways it halves rows and columns; causal convolutions see no later row."""

    def __init__(self, heads: int, width: int, cells: int, causal: bool):
        super().__init__()
        self.causal, self.down, self.splits = causal, 4 if causal else 2, 2 if causal else 4
        channels = heads * self.splits
        self.row = nn.Linear(width, cells // self.down * self.splits)
        ways: list[dict[str, Any]] = [{"stride": (2, 1), "padding": 1}, {"padding": 1}, {"padding": 1}]
        if causal:
            ways = [{"padding": (0, 1), "dilation": (dilation, 1)} for dilation in (1, 2, 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, out, 3, **way)
            for out, way in zip((channels, channels, heads), ways, strict=True)
        )
        self.norm = nn.LayerNorm(cells) if causal else nn.Identity()

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """there bool [B or 1, T]: rows that are tokens; the others may not reach their neighbours."""
        length, there, stride = x.shape[2], there[:, None, :, None], 1 if self.causal else 2
        x = self.row(x).unflatten(-1, (self.splits, -1)).transpose(2, 3).flatten(1, 2)
        x = F.relu(self._convolve(0, x * there))
        x = F.relu(self._convolve(1, x * there[:, :, ::stride]))
        x = F.interpolate(x, scale_factor=(stride, self.down))[:, :, :length]
        return self._convolve(2, self.norm(x) * there)

    def _convolve(self, index: int, x: Tensor) -> Tensor:
        conv: Any = self.convs[index]
        x = conv(F.pad(x, (0, 0, 2 * conv.dilation[0], 0)) if self.causal else x)
        counters.add(multiply_adds=x.numel() * conv.weight[0].numel())
        return x
