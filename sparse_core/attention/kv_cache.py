"""Keys and values of one layer for decoding: pages, side caches, eviction per head, and an optional home in host memory.

A cache grows by whole pages: by as many as a prefill needs, and then by an eighth of what it holds at a time, so that it
never holds much more than that. A page of a head may be given back, and its place is taken by a later one, so that a head
which forgets needs constant memory. Logical positions never change: position t is the t-th token that was ever appended.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Summary = Callable[[Tensor, Tensor], Tensor]
"""Of keys and values [B, H, n, D] of n new tokens: what a side cache keeps of them, [B, H, n, ..]."""


class KVCache:
    """Pages of keys and values [B, H, T, D].

    page: tokens per page, a power of two. offload: keep both in host memory and move what is read to `device`. Raises
    ValueError for sizes that are none and tokens that do not fit.
    """

    def __init__(
        self, batch: int, heads: int, width: int, *, page: int = 16, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu", offload: bool = False,
    ):  # fmt: skip
        if page < 1 or page & (page - 1):
            raise ValueError(f"page: expected a power of two, got {page}")
        if min(batch, heads, width) < 1:
            raise ValueError(f"batch, heads, width: expected at least 1 each, got {batch}, {heads}, {width}")
        self.page, self.length, self.offload = page, 0, offload
        self.device, home = torch.device(device), torch.device("cpu" if offload else device)
        self._pool = [torch.empty(batch, heads, 0, width, dtype=dtype, device=home) for _ in range(2)]
        self._table = torch.empty(
            batch, heads, 0, dtype=torch.long, device=home
        )  # logical page -> page of the pool, or -1
        self._free = torch.empty(batch, heads, 0, dtype=torch.bool, device=home)  # pages of the pool
        self._side: dict[str, tuple[Summary, list[Tensor]]] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, H, T, D]: T tokens were appended, some of which a head may have given back."""
        batch, heads, _, width = self._pool[0].shape
        return batch, heads, self.length, width

    @property
    def bytes(self) -> int:
        """Bytes that keys, values and side caches hold, spare pages included."""
        side = [part for _, parts in self._side.values() for part in parts]
        return sum(x.numel() * x.element_size() for x in (*self._pool, *side))

    def keep_beside(self, name: str, summary: Summary) -> None:
        """Keep `summary` of every token that is appended from now on; `side(name)` reads it."""
        if self.length:
            raise ValueError(
                f"{name}: expected an empty cache, got one of {self.length} tokens; add it before the first"
            )
        self._side[name] = (summary, [])

    def side(self, name: str) -> Tensor:
        """What the side cache `name` holds, [B, H, T, ..]."""
        if name not in self._side:
            raise ValueError(f"side: expected one of {', '.join(self._side) or 'none'}, got {name!r}")
        _, parts = self._side[name]
        if len(parts) > 1:
            parts[:] = [torch.cat(parts, 2)]
        if not parts:
            raise ValueError("cache: expected at least one token, got none; prefill it first")
        return parts[0]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add n tokens [B, H, n, D], without what they were computed from; where a side cache refuses them, the cache
        stays as it was."""
        self._check(k, v)
        k, v = k.detach(), v.detach()
        kept = {name: summary(k, v) for name, (summary, _) in self._side.items()}
        end = self.length + k.shape[2]
        self._open_pages(-(-end // self.page) - self._table.shape[2])
        self._write(self.length, k, v)
        for name, part in kept.items():
            self._side[name][1].append(part)
        self.length = end

    def rewrite(self, first: int, k: Tensor, v: Tensor) -> None:
        """Put keys and values [B, H, n, D] in place of those of the tokens from `first` on; all must still be held."""
        self._check(k, v)
        last = first + k.shape[2]
        if not 0 <= first < last <= self.length or not bool(self.held()[..., first:last].all()):
            raise ValueError(
                f"rewrite: expected tokens that are held, of {self.length}, got {first} to {last - 1}"
            )
        self._write(first, k, v)
        for name, (summary, _) in self._side.items():
            self.side(name)[:, :, first:last] = summary(k, v)

    def _check(self, k: Tensor, v: Tensor) -> None:
        batch, heads, _, width = self.shape
        if k.ndim != 4 or k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (batch, heads, width):
            raise ValueError(
                f"k, v: expected both [{batch}, {heads}, n, {width}], got {list(k.shape)} and {list(v.shape)}"
            )

    def _write(self, first: int, k: Tensor, v: Tensor) -> None:
        places = self._places(torch.arange(first, first + k.shape[2], device=self._table.device))
        for pool, x in zip(self._pool, (k, v), strict=True):
            pool.scatter_(2, places[..., None].expand(-1, -1, -1, pool.shape[3]), x.to(pool))

    def _open_pages(self, count: int) -> None:
        """Give every head the first `count` free pages of the pool for its next logical pages."""
        if count < 1:
            return
        missing = count - int(self._free.sum(2).min())
        if missing > 0:
            self._grow(max(missing, self._free.shape[2] // 8))
        if count == 1:
            chosen = self._free.to(torch.uint8).argmax(2, keepdim=True)
        else:
            first = self._free & (self._free.cumsum(2) <= count)
            chosen = first.nonzero()[:, 2].view(*self._free.shape[:2], count)
        self._free.scatter_(2, chosen, False)
        self._table = torch.cat([self._table, chosen], 2)

    def _grow(self, pages: int) -> None:
        batch, heads = self._free.shape[:2]
        for index, pool in enumerate(self._pool):
            spare = pool.new_zeros(batch, heads, pages * self.page, pool.shape[3])
            self._pool[index] = torch.cat([pool, spare], 2)
        self._free = torch.cat([self._free, self._free.new_ones(batch, heads, pages)], 2)

    def _places(self, positions: Tensor) -> Tensor:
        """Rows of the pool of logical positions [n] or [B, H, n]; -1 for a page given back and for positions below 0."""
        positions = positions.expand(*self._table.shape[:2], -1)
        page = self._table.gather(2, positions.clamp_min(0) // self.page)
        return torch.where((positions < 0) | (page < 0), -1, page * self.page + positions % self.page)

    def evict(self, pages: Tensor) -> None:
        """Give back the logical pages that bool [B, H, n] marks; the one that is still being filled stays."""
        marked = (
            pages[..., : self._table.shape[2]]
            .to(self._table.device)
            .expand(*self._table.shape[:2], -1)
            .clone()
        )
        if self.length % self.page and marked.shape[2] == self._table.shape[2]:
            marked[..., -1] = False
        gone = torch.zeros_like(self._table, dtype=torch.bool)
        gone[..., : marked.shape[2]] = marked
        held = torch.where(gone & (self._table >= 0), self._table, self._free.shape[2])
        freed = torch.cat([self._free, self._free.new_zeros(*self._free.shape[:2], 1)], 2).scatter_(
            2, held, True
        )
        self._free = freed[..., :-1].contiguous()
        self._table = self._table.masked_fill(gone, -1)

    def held(self) -> Tensor:
        """bool [B, H, T]: tokens that are still there."""
        return (self._table >= 0).repeat_interleave(self.page, 2)[..., : self.length]

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the pool [B, H, P, D], and the rows that logical positions [B, H, n] lie in (-1: absent).

        Of an offloaded cache only those rows come, moved to the device, and are numbered anew.
        """
        if not self.length:
            raise ValueError("cache: expected at least one token, got none; prefill it first")
        if positions.numel() and int(positions.max()) >= self.length:
            raise ValueError(f"positions: expected at most {self.length - 1}, got {int(positions.max())}")
        places = self._places(positions.to(self._table.device))
        if not self.offload:
            return self._pool[0], self._pool[1], places
        index = places.clamp_min(0)[..., None].expand(-1, -1, -1, self.shape[3])
        moved = [pool.gather(2, index).to(self.device, non_blocking=True) for pool in self._pool]
        numbered = torch.arange(places.shape[2]).expand_as(places).masked_fill(places < 0, -1)
        return moved[0], moved[1], numbered.to(self.device)

    @property
    def keys(self) -> Tensor:
        """Keys [B, H, T, D] in order; zeros where a page was given back."""
        return self._in_order(self._pool[0])

    @property
    def values(self) -> Tensor:
        """Values [B, H, T, D] in order; zeros where a page was given back."""
        return self._in_order(self._pool[1])

    def _in_order(self, pool: Tensor) -> Tensor:
        places = self._places(torch.arange(self.length, device=pool.device))
        found = pool.gather(2, places.clamp_min(0)[..., None].expand(-1, -1, -1, pool.shape[3]))
        return found.masked_fill((places < 0)[..., None], 0).to(self.device)
