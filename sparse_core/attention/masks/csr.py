"""Single keys per query in compressed rows, for rows of unequal length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_core.attention.masks.block import BlockMask
from sparse_core.attention.masks.index import IndexMask


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenCSR:
    """Single keys per query, as compressed rows in order of sample, head, query.

    Row r looks at the keys col[crow[r] : crow[r + 1]], in ascending order; crow [B H Tq + 1] and col [n] are int64, and
    there are q_len queries and kv_len keys. batch B and heads H may be 1 and then stand for all. An empty row gives 0.
    """

    crow: Tensor
    col: Tensor
    q_len: int
    kv_len: int
    batch: int = 1
    heads: int = 1

    def __post_init__(self) -> None:
        rows, last = self.batch * self.heads * self.q_len, self.kv_len - 1
        if self.crow.shape != (rows + 1,) or self.col.ndim != 1:
            raise ValueError(
                f"crow: expected {rows + 1} offsets for {self.batch} samples, {self.heads} heads and {self.q_len} queries "
                f"and col [n], got {list(self.crow.shape)} and {list(self.col.shape)}; give one row per query"
            )
        if self.crow.dtype != torch.int64 or self.col.dtype != torch.int64:
            raise ValueError(f"crow, col: expected int64, got {self.crow.dtype} and {self.col.dtype}")
        if int(self.crow[0]) or int(self.crow[-1]) != len(self.col) or bool((self.crow.diff() < 0).any()):
            raise ValueError(
                f"crow: expected offsets that rise from 0 to the {len(self.col)} keys of col, got {int(self.crow[0])} to "
                f"{int(self.crow[-1])}; sum up the keys of each row"
            )
        if len(self.col) and not 0 <= int(self.col.min()) <= int(self.col.max()) <= last:
            raise ValueError(
                f"col: expected keys 0 to {last}, got {int(self.col.min())} to {int(self.col.max())}"
            )
        if bool((self.codes.diff() <= 0).any()):
            raise ValueError(
                "col: expected ascending keys in every row, got some out of order or twice; sort them"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, Tq, Tk] in tokens."""
        return self.batch, self.heads, self.q_len, self.kv_len

    @property
    def counts(self) -> Tensor:
        """Keys of each query [B, H, Tq]."""
        return self.crow.diff().view(self.batch, self.heads, self.q_len)

    @property
    def codes(self) -> Tensor:
        """row kv_len + key of every kept pair [n], ascending."""
        rows = torch.arange(len(self.crow) - 1, device=self.col.device)
        return (
            torch.repeat_interleave(rows, self.crow.diff(), output_size=len(self.col)) * self.kv_len
            + self.col
        )

    @classmethod
    def from_token_mask(cls, mask: Tensor) -> TokenCSR:
        """From bool [B, H, Tq, Tk], which is as large as dense attention: for tests, and short sequences."""
        if mask.ndim != 4 or mask.dtype != torch.bool:
            raise ValueError(f"mask: expected bool [B, H, Tq, Tk], got {mask.dtype} {list(mask.shape)}")
        batch, heads, q_len, kv_len = mask.shape
        crow = _offsets(mask.sum(-1).flatten())
        col = mask.nonzero()[:, 3]
        return cls(crow=crow, col=col, q_len=q_len, kv_len=kv_len, batch=batch, heads=heads)

    @classmethod
    def from_index(cls, mask: IndexMask) -> TokenCSR:
        """The keys that a list per query names; one that is named twice counts once."""
        batch, heads, q_len, count = mask.index.shape
        rows = torch.arange(batch * heads * q_len, device=mask.index.device)[:, None].expand(-1, count)
        index = mask.index.reshape(-1, count)
        codes = (rows * mask.kv_len + index)[index >= 0].unique()  # in ascending order
        counts = torch.bincount(codes // mask.kv_len, minlength=len(rows))
        return cls(
            crow=_offsets(counts),
            col=codes % mask.kv_len,
            q_len=q_len,
            kv_len=mask.kv_len,
            batch=batch,
            heads=heads,
        )

    @classmethod
    def from_cells(cls, cells: Tensor, lengths: Tensor, kv_len: int) -> TokenCSR:
        """From a mask of fewer columns, stretched over the keys that each row may see.

        cells bool [B, H, Tq, K]; lengths int64 [Tq] or [B, Tq], at most kv_len. Of a row that may see the first L keys,
        cell c covers the keys floor(c L / K) to floor((c + 1) L / K), without the last; with L < K some cover none.
        """
        if cells.ndim != 4 or cells.dtype != torch.bool:
            raise ValueError(f"cells: expected bool [B, H, Tq, K], got {cells.dtype} {list(cells.shape)}")
        batch, heads, q_len, count = cells.shape
        if int(lengths.min()) < 0 or int(lengths.max()) > kv_len:
            raise ValueError(
                f"lengths: expected 0 to the {kv_len} keys, got {int(lengths.min())} to {int(lengths.max())}"
            )
        b, h, i, c = cells.nonzero().unbind(1)
        seen = lengths.expand(batch, q_len)[b, i]
        start = c * seen // count
        size = (c + 1) * seen // count - start
        keys = torch.zeros(batch * heads * q_len, dtype=torch.long, device=cells.device)
        keys.index_add_(0, (b * heads + h) * q_len + i, size)
        crow = _offsets(keys)
        before = size.cumsum(0) - size
        shift = torch.repeat_interleave(start - before, size)
        col = shift + torch.arange(len(shift), device=cells.device)
        return cls(crow=crow, col=col, q_len=q_len, kv_len=kv_len, batch=batch, heads=heads)

    def pairs(self) -> Tensor:
        """Kept pairs [B, H] of a query and a key."""
        return self.counts.sum(-1)

    def density(self, *, causal: bool = False) -> float:
        """Kept pairs as a share of all, or of those that a causal mask allows, whose queries are the last tokens."""
        everything = self.q_len * self.kv_len
        if causal:
            everything -= self.q_len * (self.q_len - 1) // 2
        return len(self.col) / max(1, self.batch * self.heads * everything)

    def to_token_mask(self) -> Tensor:
        """bool [B, H, Tq, Tk]. For tests and the reference: it is as large as dense attention."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.col.device)
        mask.view(-1)[self.codes] = True
        return mask

    def to_block_mask(self, block_size: int | tuple[int, int] = 64) -> BlockMask:
        """The same pairs as blocks in which a rule decides, so that other kernels can be held against this mask."""
        size = (block_size, block_size) if isinstance(block_size, int) else block_size
        codes = self.codes
        row, key = codes // self.kv_len, self.col
        grid = (-(-self.q_len // size[0]), -(-self.kv_len // size[1]))
        blocks = torch.zeros(self.batch, self.heads, *grid, dtype=torch.bool, device=codes.device)
        head, query = row // self.q_len, row % self.q_len
        blocks.flatten(0, 1)[head, query // size[0], key // size[1]] = True
        b1, h1 = int(self.batch > 1), int(self.heads > 1)

        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            code = (((b * b1) * self.heads + h * h1) * self.q_len + i) * self.kv_len + j
            if not len(codes):
                return torch.zeros_like(code, dtype=torch.bool)
            return codes[torch.searchsorted(codes, code).clamp_max(len(codes) - 1)] == code

        return BlockMask.from_dense_blocks(
            blocks, rule=rule, block_size=block_size, q_len=self.q_len, kv_len=self.kv_len
        )

    def to(self, device: torch.device | str) -> TokenCSR:
        """The same mask with its rows on `device`; itself where they lie there, which needs no check."""
        crow, col = self.crow.to(device), self.col.to(device)
        return self if crow is self.crow and col is self.col else replace(self, crow=crow, col=col)


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
