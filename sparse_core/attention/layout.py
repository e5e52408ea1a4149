"""Video tokens in tiles: a block of a mask is then a small cube of space and time, not a strip of one row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from sparse_core.attention.masks import BlockMask, ColumnBlockMask


@dataclass(frozen=True, kw_only=True)
class Layout3D:
    """Tokens of `views` views of `frames` pictures of height x width cells, in that order of axes, and `sink` tokens
    (an instruction, a memory) in front of them.

    tile (views, frames, height, width) divides these sizes; its product is the block size of masks. In tiles the sink
    comes last, so that every tile begins with a block. Raises ValueError for tiles that do not divide.
    """

    frames: int = 1
    height: int = 1
    width: int = 1
    views: int = 1
    sink: int = 0
    tile: tuple[int, int, int, int] = (1, 1, 1, 1)

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or self.sink < 0:
            raise ValueError(
                f"grid: expected at least 1 each and sink 0 or more, got {self.grid} and {self.sink}"
            )
        if any(part < 1 or size % part for size, part in zip(self.grid, self.tile, strict=True)):
            raise ValueError(
                f"tile: expected sizes that divide views x frames x height x width {self.grid}, got {self.tile}; "
                "Layout3D.fit finds some"
            )

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(views, frames, height, width)."""
        return self.views, self.frames, self.height, self.width

    @property
    def tokens(self) -> int:
        """All tokens, the sink included."""
        return self.sink + math.prod(self.grid)

    @property
    def block(self) -> int:
        """Tokens of a tile."""
        return math.prod(self.tile)

    def fit(self, block: int) -> Layout3D:
        """The same tokens in the most cubic tiles of at most `block` tokens that divide the grid and the block. Raises
        ValueError for a block of no tokens."""
        if block < 1:
            raise ValueError(f"block: expected at least 1 token, got {block}")
        parts = [[n for n in range(1, size + 1) if size % n == 0] for size in self.grid]
        fitting = [tile for tile in product(*parts) if block % math.prod(tile) == 0]
        # Largest first, then the one whose sides are most alike, then pictures before frames before views.
        best = max(fitting, key=lambda tile: (math.prod(tile), -max(tile[1:]), -tile[0], -tile[1]))
        return replace(self, tile=best)

    @cached_property
    def order(self) -> Tensor:
        """[N] int64: the token that comes at each place in tiles."""
        cells = torch.arange(math.prod(self.grid)).view(
            [n for size, part in zip(self.grid, self.tile, strict=True) for n in (size // part, part)]
        )
        tiles = cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten() + self.sink
        return torch.cat([tiles, torch.arange(self.sink)])

    @cached_property
    def places(self) -> Tensor:
        """[N] int64: the place of each token in tiles, the inverse of `order`."""
        return self.order.argsort()

    def to_tiles(self, x: Tensor) -> Tensor:
        """Tokens x [.., N, D] in the order of tiles."""
        self._check(x)
        return x[..., self.order.to(x.device), :]

    def from_tiles(self, x: Tensor) -> Tensor:
        """Tokens [.., N, D] back in their own order."""
        self._check(x)
        return x[..., self.places.to(x.device), :]

    def _check(self, x: Tensor) -> None:
        if x.shape[-2] != self.tokens:
            raise ValueError(f"tokens: expected {self.tokens} for {self}, got {x.shape[-2]}")

    def keep_sink(self, mask: BlockMask | ColumnBlockMask) -> BlockMask | ColumnBlockMask:
        """The mask, in tiles, with the sink seen by every token and seeing every token."""
        if not self.sink:
            return mask
        if isinstance(mask, ColumnBlockMask):
            blocks = self.keep_sink(mask.blocks)
            assert isinstance(blocks, BlockMask)
            return ColumnBlockMask.from_columns(blocks, mask.columns, listed=mask.listed, full=mask.full)
        (bq, bk), cells = mask.block_size, self.tokens - self.sink
        if (mask.q_len, mask.kv_len) != (self.tokens, self.tokens):
            raise ValueError(f"mask: expected one of {self.tokens} tokens, got {mask.q_len} x {mask.kv_len}")
        # A block that the sink shares with the last cells is kept whole.
        extra = torch.zeros_like(mask.blocks)
        extra[..., cells // bk :] = True
        extra[..., cells // bq :, :] = True
        return BlockMask.from_dense_blocks(
            mask.blocks | extra, full=mask.full_blocks | extra, rule=mask.rule, block_size=mask.block_size,
            q_len=mask.q_len, kv_len=mask.kv_len,
        )  # fmt: skip
