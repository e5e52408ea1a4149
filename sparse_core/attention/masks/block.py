"""Blocks of keys per block of queries, in flex_attention's layout."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from sparse_core.attention import select
from sparse_core.attention.masks.lists import (
    blocks_of,
    check_blocks,
    check_force,
    check_kept,
    check_sizes,
    sizes_of,
    to_bitmap,
    to_lists,
)
from sparse_core.attention.masks.patterns import Rule, classify, distinct


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The rule of a decoder: a query looks at itself and at what came before."""
    return i >= j


def _exchanged(rule: Rule, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """A rule of the module, so that a mask which keeps its transpose can still be pickled."""
    return rule(b, h, j, i)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockMask:
    """Key blocks per query block, as index lists.

    kv_num [B, H, Kq] int32 counts, and the first so many of kv_idx [B, H, Kq, cap] int32 name, in ascending order, the
    key blocks in which `rule` decides token by token (without a rule they are full); full_kv_num, full_kv_idx: those
    of which every pair is kept. B and H may be 1 and then stand for all: every sample or head then has the mask of number
    0, which is also the one that the rule is asked about. block_size (bq, bk) in tokens; q_len and kv_len tokens, of which
    the last block may hold fewer. A query row without any key gives 0.
    """

    kv_num: Tensor
    kv_idx: Tensor
    full_kv_num: Tensor
    full_kv_idx: Tensor
    block_size: tuple[int, int]
    q_len: int
    kv_len: int
    rule: Rule | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, Kq, Kk] in blocks."""
        b, h, queries = self.kv_num.shape
        return b, h, queries, blocks_of(self.kv_len, self.block_size[1])

    @classmethod
    def from_dense_blocks(
        cls,
        blocks: Tensor,
        *,
        block_size: int | tuple[int, int],
        q_len: int,
        kv_len: int,
        full: Tensor | None = None,
        rule: Rule | None = None,
    ) -> BlockMask:
        """From bool [B, H, Kq, Kk] (leading axes may be missing): `blocks` are looked at, and of these `full` in every
        pair; with a rule and no `full`, the rule decides in every block. Raises ValueError for another shape."""
        size = check_sizes(block_size, q_len, kv_len)
        blocks = check_kept("blocks", blocks, size, q_len, kv_len)
        if full is None:
            full = torch.zeros_like(blocks) if rule is not None else blocks
        full = check_kept("full", full, size, q_len, kv_len) & blocks
        lists = (*to_lists(blocks & ~full), *to_lists(full))
        return cls(
            kv_num=lists[0], kv_idx=lists[1], full_kv_num=lists[2], full_kv_idx=lists[3],
            block_size=size, q_len=q_len, kv_len=kv_len, rule=rule,
        )  # fmt: skip

    @classmethod
    def from_topk(
        cls, scores: Tensor, k: int, *, block_size: int | tuple[int, int], q_len: int, kv_len: int,
        force: Tensor | None = None, rule: Rule | None = None,
    ) -> BlockMask:  # fmt: skip
        """The `k` key blocks of highest score [B, H, Kq, Kk] per query block, and those of `force` (bool, broadcasts)
        besides; scores of -inf are never taken, and of equal ones the lower index wins. Raises ValueError for what does
        not fit."""
        size = check_sizes(block_size, q_len, kv_len)
        check_blocks("scores", scores, size, q_len, kv_len)
        chosen = select.topk(scores, k)
        if force is not None:
            chosen = chosen | check_force(force, scores)
        return cls.from_dense_blocks(chosen, block_size=size, q_len=q_len, kv_len=kv_len, rule=rule)._settle()

    @classmethod
    def from_rule(
        cls, rule: Rule, *, q_len: int, kv_len: int, block_size: int | tuple[int, int] = 64, batch: int = 1,
        heads: int = 1, device: torch.device | str = "cpu",
    ) -> BlockMask:  # fmt: skip
        """Every block in which `rule` keeps a pair. It is asked about all pairs, some blocks at a time, of samples 0 to
        batch - 1 and heads 0 to heads - 1: a rule that reads the head needs as many."""
        size = check_sizes(block_size, q_len, kv_len)
        shape = (batch, heads, blocks_of(q_len, size[0]), blocks_of(kv_len, size[1]))
        everything = torch.ones(shape, dtype=torch.bool, device=device)
        mask = cls.from_dense_blocks(everything, block_size=size, q_len=q_len, kv_len=kv_len, rule=rule)
        return mask._settle()

    @classmethod
    def from_csr(
        cls, offsets: Tensor, columns: Tensor, *, block_size: int | tuple[int, int], q_len: int, kv_len: int,
        heads: int = 1, batch: int = 1, rule: Rule | None = None,
    ) -> BlockMask:  # fmt: skip
        """From compressed rows over all (sample, head, query block) in order: row r holds columns[offsets[r] :
        offsets[r + 1]], indices of key blocks; one that is named twice counts once. Raises ValueError for rows that are
        none."""
        size = check_sizes(block_size, q_len, kv_len)
        rows = batch * heads * blocks_of(q_len, size[0])
        if len(offsets) != rows + 1 or int(offsets[-1]) != len(columns):
            raise ValueError(
                f"offsets: expected {rows + 1} entries of which the last is {len(columns)}, got {len(offsets)} and "
                f"{int(offsets[-1])}; give one row per sample, head and query block"
            )
        if int(offsets[0]) or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"offsets: expected numbers that rise from 0 to the {len(columns)} columns, got some that fall or a first "
                f"of {int(offsets[0])}; sum up the blocks of each row"
            )
        blocks = torch.zeros(rows, blocks_of(kv_len, size[1]), dtype=torch.bool, device=columns.device)
        if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < blocks.shape[1]:
            raise ValueError(
                f"columns: expected blocks 0 to {blocks.shape[1] - 1}, got {int(columns.min())} to {int(columns.max())}"
            )
        owner = torch.repeat_interleave(torch.arange(rows, device=columns.device), offsets.diff())
        blocks[owner, columns.long()] = True
        blocks = blocks.view(batch, heads, -1, blocks.shape[1])
        return cls.from_dense_blocks(blocks, block_size=size, q_len=q_len, kv_len=kv_len, rule=rule)

    @cached_property
    def partial_blocks(self) -> Tensor:
        """bool [B, H, Kq, Kk]: blocks in which the rule decides."""
        return to_bitmap(self.kv_num, self.kv_idx, self.shape[-1])

    @cached_property
    def full_blocks(self) -> Tensor:
        """bool [B, H, Kq, Kk]: blocks that are kept whole."""
        return to_bitmap(self.full_kv_num, self.full_kv_idx, self.shape[-1])

    @property
    def blocks(self) -> Tensor:
        """bool [B, H, Kq, Kk]: blocks that are looked at, wholly or in part."""
        return self.partial_blocks | self.full_blocks

    def to_rule(self) -> Rule:
        """The whole mask as a rule: whether query i of sample b and head h looks at key j."""
        partial, full, (bq, bk) = self.partial_blocks, self.full_blocks, self.block_size

        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            place = (*self._own(b, h), i // bq, j // bk)
            return (partial[place] & self.decide(b, h, i, j)) | full[place]

        return rule

    def decide(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """What `rule` says, whether or not the pair lies in a block where it is asked; True without one. Where the mask
        has one sample or one head for all, it is asked about that one."""
        if self.rule is None:
            return torch.ones((), dtype=torch.bool, device=i.device)
        return torch.as_tensor(self.rule(*self._own(b, h), i, j), device=i.device).bool()

    def _own(self, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The sample and the head of this mask that stand for b and h."""
        samples, heads = self.shape[:2]
        return b if samples > 1 else b * 0, h if heads > 1 else h * 0

    def __or__(self, other: BlockMask) -> BlockMask:
        """Pairs that either mask keeps."""
        self._check_alike(other)
        full = self.full_blocks | other.full_blocks
        ours, theirs = self.to_rule(), other.to_rule()
        return self._combine(
            self.blocks | other.blocks, full, lambda b, h, i, j: ours(b, h, i, j) | theirs(b, h, i, j)
        )

    def __and__(self, other: BlockMask) -> BlockMask:
        """Pairs that both masks keep."""
        self._check_alike(other)
        full = self.full_blocks & other.full_blocks
        ours, theirs = self.to_rule(), other.to_rule()
        return self._combine(
            self.blocks & other.blocks, full, lambda b, h, i, j: ours(b, h, i, j) & theirs(b, h, i, j)
        )

    def _combine(self, blocks: Tensor, full: Tensor, rule: Rule) -> BlockMask:
        if not (blocks & ~full).any():
            rule = None  # type: ignore[assignment]
        return BlockMask.from_dense_blocks(
            blocks, full=full.expand_as(blocks), rule=rule, block_size=self.block_size,
            q_len=self.q_len, kv_len=self.kv_len,
        )._settle()  # fmt: skip

    def transpose(self) -> BlockMask:
        """Queries and keys exchanged: which query blocks look at each key block. Made once."""
        return self._transposed

    @cached_property
    def _transposed(self) -> BlockMask:
        return BlockMask.from_dense_blocks(
            self.blocks.mT, full=self.full_blocks.mT, block_size=(self.block_size[1], self.block_size[0]),
            q_len=self.kv_len, kv_len=self.q_len, rule=None if self.rule is None else partial(_exchanged, self.rule),
        )  # fmt: skip

    def to_csr(self) -> tuple[Tensor, Tensor]:
        """Offsets [B H Kq + 1] and columns int64 of the blocks that are looked at, rows in order of sample, head, query
        block."""
        rows = self.blocks.flatten(0, 2)
        zero = torch.zeros(1, dtype=torch.long, device=rows.device)
        return torch.cat([zero, rows.sum(1).cumsum(0)]), rows.nonzero()[:, 1]

    def density(self, allowed: BlockMask | None = None) -> float:
        """Kept pairs of a query and a key, as a share of all, or of those that `allowed` keeps."""
        everything = self.shape[0] * self.shape[1] * self.q_len * self.kv_len
        if allowed is not None:
            everything = (
                allowed.pairs().sum().item() * (self.shape[0] * self.shape[1]) / allowed.pairs().numel()
            )
        return float(self.pairs().sum().item() / max(1, everything))

    def pairs(self) -> Tensor:
        """Kept pairs [B, H] of a query and a key."""
        sizes = [
            sizes_of(length, block)
            for length, block in zip((self.q_len, self.kv_len), self.block_size, strict=True)
        ]
        area = (sizes[0][:, None] * sizes[1]).to(self.kv_num.device)
        whole = (self.full_blocks * area).sum((-2, -1))
        tiles, _ = self.tiles
        counts = torch.zeros_like(whole).flatten()
        if tiles.numel():
            owner = self.partial_blocks.flatten(0, 1).nonzero()[:, 0]
            counts.index_add_(0, owner, tiles.flatten(1).sum(1)[self.tiles[1]])
        return whole + counts.view_as(whole)

    @cached_property
    def tiles(self) -> tuple[Tensor, Tensor]:
        """The different token patterns of the partial blocks, bool [n, bq, bk], and which one each partial block has, in
        the order of `partial_blocks.nonzero()`. Pairs past the last token are False. A byte is held per pair of a pattern,
        so a rule after which no two blocks are alike needs as many as there are pairs in partial blocks."""
        return distinct(self.decide, self.partial_blocks, self.block_size, self.q_len, self.kv_len)

    @cached_property
    def lists(self) -> tuple[Tensor, Tensor]:
        """Counts [B, H, Kq] and ascending indices [B, H, Kq, cap] of all blocks that are looked at."""
        return to_lists(self.blocks)

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mask as compressed rows, in order of sample, head, query block: offsets [B H Kq + 1] and key blocks as in
        `to_csr`, and per entry -1 for a full block, else which of `tiles` it has."""
        offsets, columns = self.to_csr()
        pattern = torch.full(self.blocks.shape, -1, dtype=torch.long, device=columns.device)
        pattern[self.partial_blocks & ~self.full_blocks] = self.tiles[1]
        return offsets, columns, pattern[self.blocks]

    def _settle(self) -> BlockMask:
        """The same mask; blocks that the rule keeps whole are called full, and those it keeps nothing of are left out."""
        if self.rule is None:
            return self
        whole, some = classify(self.decide, self.partial_blocks, self.block_size, self.q_len, self.kv_len)
        full, partial = self.full_blocks | whole, some & ~whole
        rule = self.rule if partial.any() else None
        return BlockMask.from_dense_blocks(
            partial | full, full=full, rule=rule, block_size=self.block_size, q_len=self.q_len, kv_len=self.kv_len,
        )  # fmt: skip

    def to_token_mask(self) -> Tensor:
        """bool [B, H, q_len, kv_len]. For tests and the reference: it is as large as dense attention."""
        b, h = (torch.arange(size, device=self.kv_num.device) for size in self.shape[:2])
        i, j = (torch.arange(size, device=self.kv_num.device) for size in (self.q_len, self.kv_len))
        return self.to_rule()(b[:, None, None, None], h[:, None, None], i[:, None], j).expand(
            *self.shape[:2], self.q_len, self.kv_len
        )

    def to_torch(self) -> object:
        """The mask as a `torch.nn.attention.flex_attention.BlockMask`."""
        from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

        # Torch takes the length of the lists for the number of key blocks.
        lists = [
            torch.nn.functional.pad(x, (0, self.shape[3] - x.shape[-1]))
            for x in (self.kv_idx, self.full_kv_idx)
        ]
        return TorchBlockMask.from_kv_blocks(
            self.kv_num, lists[0], self.full_kv_num, lists[1], BLOCK_SIZE=self.block_size,
            mask_mod=self.to_rule(), seq_lengths=(self.q_len, self.kv_len),
        )  # fmt: skip

    def kv_efficient(self) -> bool:
        """Whether a key block that a query block does not look at is never looked at again further down, so that a
        decoder may drop it from its cache (S2-Attention, arXiv 2407.17678). The block on the diagonal may begin."""
        bq, bk = self.block_size
        rows = torch.arange(self.shape[2], device=self.kv_num.device)[:, None] * bq // bk
        below = rows > torch.arange(self.shape[3], device=self.kv_num.device)
        again = self.blocks[..., 1:, :] & ~self.blocks[..., :-1, :] & below[:-1]
        return not bool(again.any())

    def coverage(self, allowed: BlockMask | None = None) -> float:
        """Blocks that at least one head looks at, as a share of all, or of those that `allowed` looks at."""
        seen = self.blocks.any(1, keepdim=True)
        possible = (
            torch.ones_like(seen) if allowed is None else allowed.blocks.any(1, keepdim=True).expand_as(seen)
        )
        return float((seen & possible).sum() / possible.sum().clamp_min(1))

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with its lists on `device`; itself where they lie there, so that what it has worked out stays."""
        names = ("kv_num", "kv_idx", "full_kv_num", "full_kv_idx")
        moved = {name: getattr(self, name).to(device) for name in names}
        if all(moved[name] is getattr(self, name) for name in names):
            return self
        return replace(self, **moved)

    def _check_alike(self, other: BlockMask) -> None:
        if not isinstance(other, BlockMask):
            raise TypeError(f"masks: expected two of BlockMask, got one and {type(other).__name__}")
        ours, theirs = ((m.block_size, m.q_len, m.kv_len) for m in (self, other))
        if ours != theirs:
            raise ValueError(
                f"masks: expected equal block size and lengths, got {ours} and {theirs}; make them of one size"
            )
        if any(n != m and 1 not in (n, m) for n, m in zip(self.shape[:2], other.shape[:2], strict=True)):
            raise ValueError(
                f"masks: expected equal samples and heads, or 1, got {self.shape[:2]} and {other.shape[:2]}"
            )
