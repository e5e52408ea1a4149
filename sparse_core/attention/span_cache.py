"""Keys and values of heads that each remember a span: rings of different size, side by side in one buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_core.attention.masks import SpanPlan


class SpanKVCache:
    """The first `sink` and the last `window` keys and values of every key-value head, and no others.

    spans: of the query heads or of the key-value heads; a key-value head holds what its hungriest query head needs. All
    memory, sum over heads of sink + window rows [B, D], is taken at once and never grows. Logical positions never change:
    position t is the t-th token that was ever appended. Raises ValueError for sizes that are none and for spans that look
    ahead.
    """

    def __init__(
        self, spans: SpanPlan, batch: int, kv_heads: int, width: int, *, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        if min(batch, kv_heads, width) < 1:
            raise ValueError(
                f"batch, kv_heads, width: expected at least 1 each, got {batch}, {kv_heads}, {width}"
            )
        if not spans.causal:
            raise ValueError("spans: expected causal ones, got a plan that looks ahead; set causal=True")
        if spans.heads % kv_heads:
            raise ValueError(
                f"spans: expected a multiple of the {kv_heads} key-value heads, got {spans.heads} heads"
            )
        self.spans, self.length = spans, 0
        self._sink, self._window = (
            torch.tensor(sizes, device=device).view(kv_heads, -1).amax(1, keepdim=True)
            for sizes in (spans.sink, spans.window)
        )
        ends = (self._sink + self._window).cumsum(0)
        self._first = ends - self._sink - self._window
        self._pool = [
            torch.zeros(batch, 1, int(ends[-1]), width, dtype=dtype, device=device) for _ in range(2)
        ]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, T, D]: T tokens were appended, some of which every head has given up."""
        batch, _, _, width = self._pool[0].shape
        return batch, len(self._first), self.length, width

    @property
    def bytes(self) -> int:
        """Bytes that keys and values take."""
        return sum(x.numel() * x.element_size() for x in self._pool)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add n tokens [B, H, n, D]; of these, only what a head will still hold is written."""
        batch, heads, _, width = self.shape
        if k.ndim != 4 or k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (batch, heads, width):
            raise ValueError(
                f"k, v: expected both [{batch}, {heads}, n, {width}], got {list(k.shape)} and {list(v.shape)}"
            )
        start, self.length = self.length, self.length + k.shape[2]
        places = self._places(torch.arange(start, self.length, device=self._first.device).expand(heads, -1))
        head, token = (places >= 0).nonzero(as_tuple=True)
        for pool, x in zip(self._pool, (k, v), strict=True):
            pool[:, 0, places[head, token]] = x[:, head, token].to(pool)

    def _places(self, positions: Tensor) -> Tensor:
        """Rows of the buffer of positions [.., H, n]; -1 where a head has none, or not any more."""
        ring = self._sink + (positions - self._sink) % self._window
        held = (positions < self._sink) | (positions >= self.length - self._window)
        places = self._first + torch.where(positions < self._sink, positions, ring)
        return places.masked_fill(~held | (positions < 0), -1)

    def held(self) -> Tensor:
        """bool [H, T]: tokens that are still there."""
        positions = torch.arange(self.length, device=self._first.device)
        return self._places(positions.expand(len(self._first), -1)) >= 0

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, 1, P, D] of all heads, and the rows that logical positions [B, H, n] lie in (-1: absent)."""
        if not self.length:
            raise ValueError("cache: expected at least one token, got none; prefill it first")
        if positions.numel() and int(positions.max()) >= self.length:
            raise ValueError(f"positions: expected at most {self.length - 1}, got {int(positions.max())}")
        return self._pool[0], self._pool[1], self._places(positions.to(self._first.device))
