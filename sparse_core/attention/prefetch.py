"""Reading a cache ahead: the keys that one layer will need are chosen and moved while the layer before it attends."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_core.attention.masks import IndexMask
from sparse_core.kernels.gather_decode import decode_attention


class SelectingCache(Protocol):
    """A `KVCache` that can say which of its keys a query head of q1 [B, Hq, 1, D] needs."""

    device: torch.device
    length: int
    offload: bool

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
    def select(self, q1: Tensor, topk: int) -> IndexMask: ...


@dataclass(frozen=True)
class _Moved:
    """Rows of a cache of `length` tokens on their way to the device: keys, values, the chosen ones of every query head."""

    length: int
    rows: Future[tuple[Tensor, Tensor, Tensor]]


class Prefetch:
    """Decoding of several layers whose caches, offloaded ones above all, are read one layer ahead, by a thread of its own
    and on CUDA a stream of its own. Use: `start(l + 1, guess)`, then `decode(l, q1)`; `start(0, q1)` before the first.

    What was appended to a cache after its start, such as the newest token, is attended to as well. Close it when done, or
    use it in a `with`.
    """

    def __init__(self, caches: Sequence[SelectingCache], topk: int):
        self.caches, self.topk = caches, topk
        self._moving: dict[int, _Moved] = {}
        self._thread = ThreadPoolExecutor(1, "prefetch")
        device = caches[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, layer: int, q1: Tensor) -> None:
        """Choose the keys of a layer by q1 [B, Hq, 1, D], its query or a guess of it, and begin to move them. RuntimeError
        where two layers are under way already."""
        if len(self._moving) == 2:
            raise RuntimeError(
                f"start: expected at most two layers under way, got {sorted(self._moving)}; decode one first"
            )
        cache = self.caches[layer]
        index = cache.select(q1, self.topk).index
        self._moving[layer] = _Moved(cache.length, self._thread.submit(self._move, cache, index, self._now()))

    def decode(self, layer: int, q1: Tensor) -> Tensor:
        """[B, Hq, 1, D]: exact attention over the keys that were moved, and those that are newer. RuntimeError where the
        layer was not started."""
        if layer not in self._moving:
            raise RuntimeError(f"decode: expected layer {layer} to be on its way, got none; start it first")
        moved, cache = self._moving.pop(layer), self.caches[layer]
        k, v, index = moved.rows.result()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            for x in (k, v, index):
                x.record_stream(torch.cuda.current_stream())
        new = torch.arange(moved.length, cache.length, device=cache.device)
        if len(new):
            pool = cache.rows(new.expand(*cache.shape[:2], -1))
            late = pool[2][..., None].expand(-1, -1, -1, k.shape[-1])
            at = torch.arange(len(new), device=cache.device) + k.shape[2]
            index = torch.cat([index, at.expand(*index.shape[:3], -1)], -1)
            k, v = (torch.cat([x, y.gather(2, late)], 2) for x, y in zip((k, v), pool, strict=False))
        return decode_attention(q1, (k, v), IndexMask(index=index, kv_len=k.shape[2]))  # type: ignore[return-value]

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _now(self) -> torch.cuda.Event | None:
        """On CUDA, when the choice is made."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    @torch.no_grad()
    def _move(
        self, cache: SelectingCache, index: Tensor, chosen: torch.cuda.Event | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, Hkv, n, D] on the device, and which of them each query head looks at, [B, Hq, 1, topk]."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            if chosen is not None:
                torch.cuda.current_stream().wait_event(chosen)
            flat = index.reshape(*cache.shape[:2], -1)
            k, v, rows = cache.rows(flat)
            if not cache.offload:
                at = rows.clamp_min(0)[..., None].expand(-1, -1, -1, k.shape[-1])
                k, v = k.gather(2, at), v.gather(2, at)
                rows = (
                    torch.arange(flat.shape[2], device=rows.device).expand_as(rows).masked_fill(rows < 0, -1)
                )
            return k, v, rows.reshape(index.shape)
