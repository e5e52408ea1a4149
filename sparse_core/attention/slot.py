"""The place of an attention in a model: dense until a method or a mask fills it, and dense again when it is emptied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_core.attention.attend import FixedMask
from sparse_core.attention.layer import AttentionLayer, DenseAttention
from sparse_core.attention.layout import Layout3D
from sparse_core.attention.masks import BlockMask, ColumnBlockMask


@dataclass
class SharedMasks:
    """Masks that outlive a pass: `step` is set by whoever counts the passes, and may begin again at 0."""

    every: int
    dense: int
    step: int = 0
    kept: dict[tuple[int, tuple[int, ...]], tuple[int, Any]] = field(default_factory=dict, repr=False)


_shared: ContextVar[SharedMasks | None] = ContextVar("shared_masks", default=None)


@contextmanager
def share_masks(every: int = 1, dense: int = 0) -> Iterator[SharedMasks]:
    """Inside the block, a mask serves `every` steps before it is made anew, and the first `dense` steps attend to all.

    For the steps of a denoising loop, between which attention moves little: set `.step` of what this yields before each;
    a step before the one that a mask was made in makes it anew.
    The masks are forgotten when the block ends.
    """
    if every < 1 or dense < 0:
        raise ValueError(f"every and dense: expected at least 1 and 0 steps, got {every} and {dense}")
    token = _shared.set(SharedMasks(every, dense))
    try:
        yield _shared.get()  # type: ignore[misc]
    finally:
        _shared.reset(token)


class AttentionSlot(nn.Module):
    """Attention of q, k, v [B, H, N, D] in a model, with the number and width of heads that a method must know.

    `fill` puts a layer in, `empty` takes it out again; without one the attention is dense. The model's own weights are
    never touched. condition: channels of what the model tells it besides tokens, such as its diffusion step, 0 for none.
    """

    def __init__(self, heads: int, width: int, kv_heads: int | None = None, condition: int = 0):
        super().__init__()
        self.heads, self.kv_heads, self.width, self.condition = heads, kv_heads or heads, width, condition
        self.layer: AttentionLayer = DenseAttention()
        self.block, self.causal = 1, False
        self._begin()

    def _begin(self) -> None:
        """No call yet: `calls` through the layer, (shape of q, mask) of the `last` one, `dense` calls by their reason."""
        self.calls, self.last, self.dense = 0, None, Counter()

    def __getstate__(self) -> dict[str, Any]:
        # Masks may hold functions that no file takes, and belong to tokens that a copy has not seen.
        return vars(self) | {"calls": 0, "last": None, "dense": Counter()}

    @property
    def filled(self) -> bool:
        """Whether something other than dense attention is in."""
        return not isinstance(self.layer, DenseAttention)

    def fill(self, layer: AttentionLayer, *, causal: bool = False) -> None:
        """Attend by `layer`; its config's block size, where it has one, is that of the tiles. causal: it never looks
        ahead, so that it may serve where causal attention is asked for."""
        config = getattr(layer, "config", None)
        self.block = getattr(config, "block", None) or getattr(config, "block_q", None) or 1
        self.layer, self.causal = layer, causal
        self._begin()

    def empty(self) -> None:
        """Attend densely again."""
        self.layer = DenseAttention()

    def stay_dense(self, reason: str) -> None:
        """Note a call that whoever holds the slot answers densely, for the report."""
        self.dense[reason] += 1

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout3D | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """[B, H, N, D]; with a layout the method sees the tokens in tiles, and what the layout calls sink is always kept
        by methods that choose blocks. A mask of one's own is read in the order that the tokens come in, as it is.

        condition [B, C]: for methods whose config has one.
        """
        if not self.filled:
            return self.layer(q, k, v)
        shared = _shared.get()
        if shared is not None and shared.step < shared.dense:
            self.stay_dense("the first steps of share_masks attend to everything")
            return DenseAttention().attend(q, k, v)
        layout = None if isinstance(self.layer, FixedMask) else layout
        tiles = layout.fit(self.block) if layout is not None and self.block > 1 else layout
        if tiles is not None:
            q, k, v = (tiles.to_tiles(x) for x in (q, k, v))
        told = (
            {"condition": condition} if getattr(getattr(self.layer, "config", None), "condition", 0) else {}
        )
        with torch.autocast(q.device.type, enabled=False):  # methods choose and normalise in float32
            mask = self._mask(q, k, v, tiles, shared, told)
            # Through the layer's call, so that hooks on it hear of the tokens.
            out = self.layer(q, k, v, mask=mask, **told)
        self.calls, self.last = self.calls + 1, (tuple(q.shape), mask)
        return out if tiles is None else tiles.from_tiles(out)

    def _mask(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout3D | None, shared: SharedMasks | None, told: dict[str, Any]
    ) -> Any:  # fmt: skip
        key = (id(self), tuple(q.shape))
        if shared is not None and key in shared.kept:
            made, mask = shared.kept[key]
            if 0 <= shared.step - made < shared.every:
                return mask
        mask = self.layer.mask(q, k, v, **told)
        if layout is not None and isinstance(mask, (BlockMask, ColumnBlockMask)):
            mask = layout.keep_sink(mask)
        if shared is not None:
            shared.kept[key] = (shared.step, mask)
        return mask
