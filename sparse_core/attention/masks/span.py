"""A sink and a window per head: the mask that is two numbers, whatever the length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_core.attention.masks.block import BlockMask
from sparse_core.attention.masks.index import IndexMask


@dataclass(frozen=True, kw_only=True)
class SpanPlan:
    """Per head h, the first keys and those near the query (an A-shape, or a plain window where the sink is 0):

        keep(i, j, h) = j < sink[h]  or  |floor(i / unit) - floor(j / unit)| < window[h] / unit,   and j <= i when causal.

    sink, window: tokens per head, whole units. unit: the window moves that many tokens at a time, so that with units of a
    block every block but those on the diagonal is kept whole or not at all. Raises ValueError for anything else.
    """

    sink: tuple[int, ...]
    window: tuple[int, ...]
    unit: int = 1
    causal: bool = True

    def __post_init__(self) -> None:
        if not self.window or len(self.sink) != len(self.window):
            raise ValueError(
                f"sink, window: expected one of each per head, got {len(self.sink)} and {len(self.window)}"
            )
        if self.unit < 1 or any(size % self.unit for size in (*self.sink, *self.window)):
            raise ValueError(
                f"sink, window: expected whole units of {self.unit} tokens, got {self.sink} and {self.window}"
            )
        if min(self.sink) < 0 or min(self.window) < 1:
            raise ValueError(
                f"sink, window: expected at least 0 and one unit, got {min(self.sink)} and {min(self.window)}"
            )

    @classmethod
    def uniform(cls, heads: int, *, sink: int, window: int, unit: int = 1, causal: bool = True) -> SpanPlan:
        """The same span for every head."""
        return cls(sink=(sink,) * heads, window=(window,) * heads, unit=unit, causal=causal)

    @property
    def heads(self) -> int:
        """Heads that have a span."""
        return len(self.window)

    def for_heads(self, heads: int) -> SpanPlan:
        """The plan of `heads` query heads, of which groups share each span. ValueError where they do not divide."""
        if heads % self.heads:
            raise ValueError(
                f"heads: expected a multiple of the {self.heads} heads of the plan, got {heads}; plan for this model"
            )
        sink, window = (
            tuple(size for size in sizes for _ in range(heads // self.heads))
            for sizes in (self.sink, self.window)
        )
        return replace(self, sink=sink, window=window)

    def _edges(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """First key and one past the last of the window of queries at positions i [n], each [H, n]."""
        window = torch.tensor(self.window, device=i.device)[:, None]
        own = i // self.unit * self.unit
        last = (i + 1).expand(self.heads, -1) if self.causal else own + window
        return (own + self.unit - window).clamp_min(0), last

    def to_block_mask(self, q_len: int, kv_len: int, block: int | tuple[int, int] = 64) -> BlockMask:
        """The mask of `q_len` queries, which when causal are the last of the `kv_len` tokens; blocks are classed by
        arithmetic, and no pair of tokens is looked at. Raises ValueError for causal queries without their own key."""
        bq, bk = (block, block) if isinstance(block, int) else block
        shift = self._shift(q_len, kv_len)
        i, j = torch.arange(0, q_len, bq), torch.arange(0, kv_len, bk)
        i_last, j_last = (i + bq).clamp_max(q_len) - 1 + shift, (j + bk).clamp_max(kv_len) - 1
        (begin, end), (last_begin, last_end) = (
            [edge[..., None] for edge in self._edges(rows)] for rows in (i + shift, i_last)
        )
        sink = torch.tensor(self.sink)[:, None, None]
        # The windows of neighbouring rows touch, so those of a block of rows are one interval.
        some = ((j_last >= begin) & (j < last_end)) | (j < sink)
        # Full: no key lies between the sink and the last row's window, and none after the first row's.
        full = torch.maximum(j, sink) >= torch.minimum(j_last + 1, last_begin)
        if self.causal:
            some, full = some & (j <= i_last[:, None]), full & (j_last < end)
        else:
            full = full & ((j_last < end) | (j_last < sink))
        return BlockMask.from_dense_blocks(
            some[None], full=full[None], rule=self._rule(shift), block_size=(bq, bk), q_len=q_len, kv_len=kv_len
        )  # fmt: skip

    def _shift(self, q_len: int, kv_len: int) -> int:
        """Position of the first query."""
        if self.causal and kv_len < q_len:
            raise ValueError(
                f"kv_len: expected at least as many keys as the {q_len} queries of a causal mask, got {kv_len}"
            )
        return kv_len - q_len if self.causal else 0

    def _rule(self, shift: int):
        sink, window, unit = torch.tensor(self.sink), torch.tensor(self.window) // self.unit, self.unit
        causal, last = self.causal, self.heads - 1

        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            h, i = h.clamp_max(last), i + shift
            near = (i // unit - j // unit).abs() < window.to(h.device)[h]
            kept = near | (j < sink.to(h.device)[h])
            return kept & (j <= i) if causal else kept

        return rule

    def to_index(self, length: int, device: torch.device | str = "cpu") -> IndexMask:
        """The keys [1, H, 1, n] that a query at the last of `length` positions looks at."""
        begin = self._edges(torch.tensor([length - 1], device=device))[0]
        sink = torch.minimum(torch.tensor(self.sink, device=device)[:, None], begin)
        count = sink + length - begin
        place = torch.arange(int(count.max()), device=device)
        index = torch.where(place < sink, place, begin - sink + place).masked_fill(place >= count, -1)
        return IndexMask(index=index[None, :, None], kv_len=length, distinct=True)

    def unneeded_pages(self, length: int, page: int) -> Tensor:
        """bool [H, P]: pages of a cache of `length` tokens that its newest query and all later ones leave out."""
        first = torch.arange(0, length, page)
        begin = self._edges(torch.tensor([length - 1]))[0]
        return (first >= torch.tensor(self.sink)[:, None]) & (first + page <= begin)

    def pairs(self, length: int) -> Tensor:
        """Kept pairs [H] of a query and a key among `length` tokens."""
        begin, end = self._edges(torch.arange(length))
        seen = torch.arange(1, length + 1) if self.causal else torch.tensor(length)
        sink, end = torch.minimum(torch.tensor(self.sink)[:, None], seen), end.clamp_max(length)
        return (sink + end - begin - (torch.minimum(sink, end) - begin).clamp_min(0)).sum(1)

    def densities(self, length: int) -> Tensor:
        """Kept pairs as a share [H] of those that may be kept, in float64."""
        possible = length * (length + 1) // 2 if self.causal else length * length
        return self.pairs(length).double() / possible

    def density(self, length: int) -> float:
        """Kept pairs of all heads as a share of those that may be kept."""
        return float(self.densities(length).mean())

    def kv_densities(self, length: int) -> Tensor:
        """Keys that a decoder must hold as a share [H] of `length`, in float64."""
        held = torch.tensor(self.sink) + torch.tensor(self.window)
        return held.clamp_max(length).double() / length

    def to_token_mask(self, q_len: int, kv_len: int) -> Tensor:
        """bool [1, H, q_len, kv_len]. For tests and the reference: it is as large as dense attention."""
        h = torch.arange(self.heads)[:, None, None]
        i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
        return self._rule(self._shift(q_len, kv_len))(h, h, i, j)[None]
