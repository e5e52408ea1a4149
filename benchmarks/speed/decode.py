"""Decoding over selected keys against dense decoding, and a whole stack of layers under TidalDecode's schedule.

    python -m benchmarks.speed.decode

One query, one thread, float32. Selections rotate, since one that is used again lies in the cache of the processor. The
dense side is torch's SDPA, and besides our own kernel over every key: SDPA decodes slowly on a CPU. Writes
`speed/decode.json`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from benchmarks.results_io import write_result
from benchmarks.speed.timing import take_turns
from sparse_core import IndexMask, KVCache, decode_attention
from sparse_core.methods.attention.tidal import TidalSchedule, TidalState

PAGE = 16


@dataclass(frozen=True, kw_only=True)
class Decode:
    """A cache of `length` keys, of which 1 / `share` are read."""

    length: int = 32768
    heads: int = 8
    width: int = 128
    share: int = 16
    layers: int = 12
    repeats: int = 12
    case: str = "speed/decode"


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """One of `calls` after another."""
    rotation = itertools.cycle(calls)
    return lambda: next(rotation)()


def selections(settings: Decode, kind: str, count: int = 12) -> list[IndexMask]:
    """Random tokens, or random pages of 16, of every head."""
    generator, page = torch.Generator().manual_seed(0), PAGE if kind == "pages" else 1
    pages = settings.length // page
    found = []
    for _ in range(count):
        order = torch.rand(1, settings.heads, 1, pages, generator=generator).argsort(-1)
        chosen = order[..., : pages // settings.share]
        found.append(IndexMask.from_pages(chosen, page, settings.length))
    return found


def compare(settings: Decode) -> dict[str, Any]:
    """Milliseconds of one step: dense both ways, random tokens, random pages."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(1, settings.heads, n, settings.width, generator=generator)
        for n in (1, settings.length, settings.length)
    )
    every = IndexMask(
        index=torch.arange(settings.length).expand(1, settings.heads, 1, -1), kv_len=settings.length
    )
    calls: dict[str, Callable[[], object]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "own_dense": lambda: decode_attention(q, (k, v), every),
    }
    for kind in ("random", "pages"):
        calls[kind] = in_turn([_step(q, k, v, chosen) for chosen in selections(settings, kind)])
    took = take_turns(calls, settings.repeats)
    for kind in ("random", "pages"):
        print(
            f"{kind}: {took['sdpa']:.1f} -> {took[kind]:.2f} ms, {took['sdpa'] / took[kind]:.1f}x over SDPA, "
            f"{took['own_dense'] / took[kind]:.1f}x over a good dense loop"
        )
    return {
        "ms": took,
        "over_sdpa": {kind: took["sdpa"] / took[kind] for kind in ("random", "pages")},
        "over_own_dense": {kind: took["own_dense"] / took[kind] for kind in ("random", "pages")},
    }


def _step(q: Tensor, k: Tensor, v: Tensor, chosen: IndexMask) -> Callable[[], object]:
    return lambda: decode_attention(q, (k, v), chosen)


def stack(settings: Decode) -> dict[str, float]:
    """Milliseconds of the attentions of one step through all layers: SDPA in each, and TidalDecode's schedule."""
    generator = torch.Generator().manual_seed(2)
    heads = settings.heads // 2  # so that twelve layers fit in memory
    caches = []
    for _ in range(settings.layers):
        cache = KVCache(1, heads, settings.width)
        cache.append(
            *(torch.randn(1, heads, settings.length, settings.width, generator=generator) for _ in range(2))
        )
        caches.append(cache)
    q = torch.randn(settings.layers, 1, heads, 1, settings.width, generator=generator)
    schedule = TidalSchedule(num_layers=settings.layers, full=(0, 1), select=(2, 7), topk=256)

    def dense() -> None:
        for layer, cache in enumerate(caches):
            F.scaled_dot_product_attention(q[layer], cache.keys, cache.values)

    pairs = [(cache.keys, cache.values) for cache in caches]

    def contiguous() -> None:
        for layer, (k, v) in enumerate(pairs):
            F.scaled_dot_product_attention(q[layer], k, v)

    def tidal() -> None:
        state = TidalState(schedule)
        for layer, cache in enumerate(caches):
            state.attend(layer, q[layer], cache)

    took = take_turns(
        {"dense_from_cache": dense, "sdpa": contiguous, "tidal": tidal}, max(3, settings.repeats // 4)
    )
    print(
        f"{settings.layers} layers: {took['sdpa']:.0f} -> {took['tidal']:.0f} ms, {took['sdpa'] / took['tidal']:.2f}x"
    )
    return took | {"times": took["sdpa"] / took["tidal"]}


def main(settings: Decode) -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    with torch.no_grad():
        values = {"step": compare(settings), "stack": stack(settings)}
    print(write_result(settings.case, values, seconds=time.perf_counter() - began))


if __name__ == "__main__":
    main(tyro.cli(Decode))
