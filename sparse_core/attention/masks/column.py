"""Blocks of keys and, besides, single keys that a whole block of queries looks at."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_core.attention.masks.block import BlockMask


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnBlockMask:
    """A BlockMask and loose columns: single keys per query block, none of which lies in a block that it looks at.

    columns [B, H, n] int64: keys that some query block of a head lists, ascending, and -1 in empty places at the end;
    listed [B, H, Kq, n] bool: which query block lists which; full [B, H, Kq, n] bool: for which of these every query of
    the block looks at the key, while in the others the rule of `blocks` decides. B and H may be 1 and then stand for
    all. `from_columns` makes one from any columns.
    """

    blocks: BlockMask
    columns: Tensor
    listed: Tensor
    full: Tensor
    _loose: dict[int, BlockMask] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        expected = (*self.columns.shape[:2], self.blocks.shape[2], self.columns.shape[-1])
        if self.columns.ndim != 3 or not tuple(self.listed.shape) == tuple(self.full.shape) == expected:
            raise ValueError(
                f"columns, listed, full: expected [B, H, n] and twice [B, H, {self.blocks.shape[2]}, n], got "
                f"{list(self.columns.shape)}, {list(self.listed.shape)} and {list(self.full.shape)}"
            )

    @classmethod
    def from_columns(
        cls, blocks: BlockMask, columns: Tensor, *, listed: Tensor | None = None, full: Tensor | None = None
    ) -> ColumnBlockMask:
        """From columns [B, H, n] in any order, below 0 where a place is empty; a key that is named twice counts once.

        listed bool [B, H, Kq, n]: the query blocks that look at them, all unless given; full as in the class, and without
        it the rule decides everywhere, if there is one. A query block does not list a key of a block that it looks at:
        there the same rule has decided. Leading axes of 1 are spread. Raises ValueError for other shapes and keys that
        there are not.
        """
        columns, listed, full = _check(blocks, columns, listed, full)
        places = columns.clamp_min(0) // blocks.block_size[1]
        seen = blocks.blocks.expand(*columns.shape[:2], -1, -1)
        covered = seen.gather(-1, places[:, :, None].expand(listed.shape))
        listed = listed & ~covered & (columns >= 0)[:, :, None]
        kept, place = _ascending(columns, listed.any(2))
        into = place[:, :, None].expand(listed.shape)
        spread = [_or_into(x, into, kept.shape[-1]) for x in (listed, listed & full)]
        return cls(blocks=blocks, columns=kept, listed=spread[0], full=spread[1])

    @property
    def q_len(self) -> int:
        """Queries."""
        return self.blocks.q_len

    @property
    def kv_len(self) -> int:
        """Keys."""
        return self.blocks.kv_len

    def loose(self, size: int = 1) -> BlockMask:
        """The loose part over the short sequence of keys that `columns` names, in blocks of `size` keys. It is made once
        for each size; ValueError where there are no columns."""
        if size not in self._loose:
            spare = -self.columns.shape[-1] % size
            listed, full = (
                torch.nn.functional.pad(x, (0, spare), value=fill).unflatten(-1, (-1, size))
                for x, fill in ((self.listed, False), (self.full, True))
            )
            self._loose[size] = BlockMask.from_dense_blocks(
                listed.any(-1), full=full.all(-1), rule=self._rule, q_len=self.q_len, kv_len=self.columns.shape[-1],
                block_size=(self.blocks.block_size[0], size),
            )  # fmt: skip
        return self._loose[size]

    def _rule(self, b: Tensor, h: Tensor, i: Tensor, c: Tensor) -> Tensor:
        """Whether query i looks at the key that place c of `columns` names; c may lie past the last place."""
        samples, heads, n = self.columns.shape
        sample, head, c = b if samples > 1 else b * 0, h if heads > 1 else h * 0, c.clamp_max(n - 1)
        row = i // self.blocks.block_size[0]
        listed, full = (x[sample, head, row, c] for x in (self.listed, self.full))
        return listed & (full | self.blocks.decide(b, h, i, self.columns[sample, head, c]))

    def pairs(self) -> Tensor:
        """Kept pairs [B, H] of a query and a key."""
        return self.blocks.pairs() + (self.loose().pairs() if self.columns.shape[-1] else 0)

    def work(self) -> Tensor:
        """Pairs [B, H] that a kernel multiplies: all of a block that is looked at, kept or not, and every listed column
        times the queries of its block."""
        (bq, bk), device = self.blocks.block_size, self.columns.device
        rows, keys = (
            (length - torch.arange(0, length, size, device=device)).clamp_max(size)
            for length, size in ((self.q_len, bq), (self.kv_len, bk))
        )
        near = (self.blocks.blocks * keys).sum(-1)
        return ((near + self.listed.sum(-1)) * rows).sum(-1)

    def density(self, allowed: BlockMask | None = None) -> float:
        """Kept pairs as a share of all, or of those that `allowed` keeps."""
        everything = self.q_len * self.kv_len if allowed is None else float(allowed.pairs().double().mean())
        return float(self.pairs().double().mean()) / max(1, everything)

    def to_token_mask(self) -> Tensor:
        """bool [B, H, q_len, kv_len]. For tests and the reference: it is as large as dense attention."""
        near = self.blocks.to_token_mask()
        if not self.columns.shape[-1]:
            return near
        loose = self.loose().to_token_mask()
        place = self.columns.masked_fill(self.columns < 0, self.kv_len)[:, :, None].expand(loose.shape)
        return near | _or_into(loose, place, self.kv_len)

    def to(self, device: torch.device | str) -> ColumnBlockMask:
        """The same mask on `device`; itself where it lies there, so that what it has worked out stays."""
        names = ("blocks", "columns", "listed", "full")
        moved = {name: getattr(self, name).to(device) for name in names}
        if all(moved[name] is getattr(self, name) for name in names):
            return self
        return replace(self, **moved, _loose={})


def _check(
    blocks: BlockMask, columns: Tensor, listed: Tensor | None, full: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns [B, H, n], listed and full [B, H, Kq, n] of the sizes that all of them have together."""
    if columns.ndim != 3 or columns.is_floating_point():
        raise ValueError(f"columns: expected integers [B, H, n], got {columns.dtype} {list(columns.shape)}")
    if columns.numel() and int(columns.max()) >= blocks.kv_len:
        raise ValueError(f"columns: expected keys 0 to {blocks.kv_len - 1}, got {int(columns.max())}")
    rows, n, device = blocks.shape[2], columns.shape[-1], columns.device
    if listed is None:
        listed = torch.ones(1, 1, rows, n, dtype=torch.bool, device=device)
    if full is None:
        full = torch.full((1, 1, rows, n), blocks.rule is None, dtype=torch.bool, device=device)
    for name, value in (("listed", listed), ("full", full)):
        if value.ndim != 4 or tuple(value.shape[2:]) != (rows, n):
            raise ValueError(f"{name}: expected [B, H, {rows}, {n}], got {list(value.shape)}")
    leading = [tuple(x.shape[:2]) for x in (columns, listed, full)] + [blocks.shape[:2]]
    try:
        b, h = torch.broadcast_shapes(*leading)
    except RuntimeError:
        raise ValueError(f"B, H: expected sizes that agree or are 1, got {leading}") from None
    return (
        columns.long().expand(b, h, n),
        listed.expand(b, h, rows, n),
        full.expand(b, h, rows, n),
    )


def _ascending(columns: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """The keys of columns [B, H, n] that are used, each once, ascending, -1 behind them, [B, H, m]; and where each column
    went [B, H, n], m for those that are not used."""
    order = columns.masked_fill(~used, torch.iinfo(torch.long).max).sort(dim=-1, stable=True)
    first = torch.ones_like(used)
    first[..., 1:] = order.values[..., 1:] != order.values[..., :-1]
    kept = used.gather(-1, order.indices)
    rank = (first & kept).cumsum(-1) - 1
    m = int(rank.max()) + 1 if rank.numel() else 0
    rank = rank.masked_fill(~kept, m)
    found = columns.new_full((*columns.shape[:2], m + 1), -1).scatter_(
        -1, rank, order.values.masked_fill(~kept, -1)
    )
    place = torch.empty_like(rank).scatter_(-1, order.indices, rank)
    return found[..., :m], place


def _or_into(x: Tensor, place: Tensor, size: int) -> Tensor:
    """bool [.., size]: whether any entry of x that `place` puts there is True; places of `size` are dropped."""
    counts = torch.zeros(*x.shape[:-1], size + 1, dtype=torch.uint8, device=x.device)
    return counts.scatter_reduce_(-1, place, x.to(torch.uint8), "amax")[..., :size].bool()
