"""Single keys per query."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexMask:
    """Single keys per query: index [B, H, Tq, n] int64 of keys, below 0 where a place is empty; kv_len keys in all.

    H may be that of the query heads, or of the key-value heads, whose whole group then shares the keys. A key that is
    named twice counts once: its later places become empty. distinct: it is known that there are none, and nobody looks.
    """

    index: Tensor
    kv_len: int
    distinct: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.index.is_floating_point() or self.index.dtype == torch.bool:
            raise ValueError(f"index: expected integers, got {self.index.dtype}; name keys by their number")
        if self.index.ndim != 4:
            raise ValueError(f"index: expected [B, H, Tq, n], got {list(self.index.shape)}")
        if self.index.numel() and int(self.index.max()) >= self.kv_len:
            raise ValueError(f"index: expected keys 0 to {self.kv_len - 1}, got {int(self.index.max())}")
        if not self.distinct:
            object.__setattr__(self, "index", _name_once(self.index, self.kv_len))

    @classmethod
    def from_topk(cls, scores: Tensor, k: int, force: Tensor | None = None) -> IndexMask:
        """The `k` keys of highest score [B, H, Tq, T] per query, those of `force` (bool, broadcasts) before all others;
        scores of -inf are never taken, and of equal ones the lower index wins."""
        if k < 1:
            raise ValueError(f"k: expected at least one key per query, got {k}")
        if scores.isnan().any():
            raise ValueError("scores: expected numbers, got NaN; check what made them")
        if force is not None:
            scores = scores.masked_fill(force, torch.inf)
        order = _highest(scores, k)
        index = order.masked_fill(scores.gather(-1, order) == -torch.inf, -1)
        return cls(index=index, kv_len=scores.shape[-1], distinct=True)

    @classmethod
    def from_pages(cls, pages: Tensor, page: int, kv_len: int) -> IndexMask:
        """All keys of `pages` [B, H, Tq, n], of `page` keys each; the last one may be ragged."""
        pages = _name_once(pages, -(-kv_len // page))
        index = pages[..., None] * page + torch.arange(page, device=pages.device)
        index = index.masked_fill((pages[..., None] < 0) | (index >= kv_len), -1)
        return cls(index=index.flatten(-2), kv_len=kv_len, distinct=True)

    def density(self) -> float:
        """Named keys as a share of all."""
        return float((self.index >= 0).sum() / max(1, self.index[..., 0].numel() * self.kv_len))

    def to_token_mask(self) -> Tensor:
        """bool [B, H, Tq, kv_len]. For tests and the reference."""
        mask = torch.zeros(*self.index.shape[:3], self.kv_len + 1, dtype=torch.bool, device=self.index.device)
        return mask.scatter_(-1, self.index.clamp_min(-1) % (self.kv_len + 1), True)[..., : self.kv_len]


def _name_once(index: Tensor, length: int) -> Tensor:
    """The index [.., n] of keys below `length`, with -1 wherever an earlier place names the same key."""
    key = index.masked_fill(index < 0, length)
    if bool(((key[..., 1:] > key[..., :-1]) | (key[..., 1:] == length)).all()):
        return index  # ascending, as many lists are
    order = key.sort(dim=-1, stable=True)
    again = (order.values[..., 1:] == order.values[..., :-1]) & (order.values[..., 1:] < length)
    if not bool(again.any()):
        return index
    again = torch.nn.functional.pad(again, (1, 0))
    return index.masked_fill(torch.zeros_like(again).scatter_(-1, order.indices, again), -1)


def _highest(scores: Tensor, k: int) -> Tensor:
    """The first `k` of every row in descending order, the lower index first of equal scores."""
    if k < scores.shape[-1]:
        values, index = scores.topk(k, sorted=False)
        # Sorting few is much faster than sorting all, but which of several k-th scores `topk` takes is left open.
        if not ((scores >= values.amin(-1, keepdim=True)).sum(-1) > k).any():
            index = index.sort(dim=-1).values
            order = scores.gather(-1, index).sort(dim=-1, descending=True, stable=True).indices
            return index.gather(-1, order)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
