"""Decoding over selected keys against dense decoding, and a whole stack of layers under TidalDecode's schedule.

    python -m benchmarks.speed.decode [--device cuda --batch 8 --heads 32 --dense sdpa flash cudnn flex products own_dense]

One query per head; one thread and float32 on a CPU, bfloat16 on a GPU. Selections rotate, since one that is used again
lies in the cache of the processor. The dense side is torch's SDPA, and besides a good loop over every key: our own kernel
(`own_dense`), since SDPA decodes slowly on a CPU and need not cut the keys of a head into parts on a GPU; and there also
flex_attention, which does, and two plain products. A rival that fails leaves its reason. Writes `speed/decode.json`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from benchmarks.results_io import write_result
from benchmarks.speed import rivals
from benchmarks.speed.attention import precision
from benchmarks.speed.rivals import Rival
from benchmarks.speed.timing import take_turns
from sparse_core import IndexMask, KVCache, decode_attention
from sparse_core.methods.attention.tidal import TidalSchedule, TidalState

PAGE = 16
KINDS = ("random", "pages")
Dense = Rival | Literal["own_dense"]


@dataclass(frozen=True, kw_only=True)
class Decode:
    """A cache of `length` keys, of which 1 / `share` are read; `dense`: what reads all of them. The stack has one sequence
    and half of the heads, so that its layers fit in memory."""

    length: int = 32768
    batch: int = 1
    heads: int = 8
    width: int = 128
    share: int = 16
    layers: int = 12
    repeats: int = 12
    device: str = "cpu"
    dense: tuple[Dense, ...] = ("sdpa", "own_dense")
    case: str = "speed/decode"


def draw(settings: Decode, generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers on the device, in what is computed in there."""
    dtype = precision(settings.device)
    return torch.randn(shape, generator=generator, device=settings.device, dtype=dtype)


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """One of `calls` after another."""
    rotation = itertools.cycle(calls)
    return lambda: next(rotation)()


def selections(settings: Decode, kind: str, count: int = 12) -> list[IndexMask]:
    """Random tokens, or random pages of 16, of every head."""
    generator, page = torch.Generator(settings.device).manual_seed(0), PAGE if kind == "pages" else 1
    pages = settings.length // page
    found = []
    for _ in range(count):
        shape = (settings.batch, settings.heads, 1, pages)
        order = torch.rand(shape, generator=generator, device=settings.device).argsort(-1)
        chosen = order[..., : pages // settings.share]
        found.append(IndexMask.from_pages(chosen, page, settings.length))
    return found


def compare(settings: Decode) -> dict[str, Any]:
    """Milliseconds of one step: dense in every way, random tokens, random pages; how many times faster those are than each
    dense way and than the fastest; `failed`: the reasons of those that did not run."""
    generator = torch.Generator(settings.device).manual_seed(1)
    q, k, v = (
        draw(settings, generator, settings.batch, settings.heads, n, settings.width)
        for n in (1, settings.length, settings.length)
    )
    calls = {name: _dense_step(settings, name, q, k, v) for name in settings.dense}
    for kind in KINDS:
        calls[kind] = in_turn([_step(q, k, v, chosen) for chosen in selections(settings, kind)])
    if "flex" in settings.dense:
        rivals.forget()
    failed: dict[str, str] = {}
    took = take_turns(calls, settings.repeats, settings.device, failed)
    values: dict[str, Any] = {"ms": took, "failed": failed, "sdpa_backend": rivals.chosen_backend(q, k, v)}
    dense = {name: took[name] for name in settings.dense if name in took}
    if dense:
        dense["best_dense"] = min(dense.values())
    for name, ms in dense.items():
        values[f"over_{name}"] = {kind: ms / took[kind] for kind in KINDS if kind in took}
    for kind in KINDS:
        if kind in took:
            ratios = ", ".join(f"{ms / took[kind]:.1f}x over {name}" for name, ms in dense.items())
            print(f"{kind}: {took[kind]:.2f} ms, {ratios}")
    for name, why in failed.items():
        print(f"{name} failed: {why}")
    return values


def _dense_step(settings: Decode, name: Dense, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    if name == "own_dense":
        every = torch.arange(settings.length, device=settings.device).expand(1, settings.heads, 1, -1)
        return _step(q, k, v, IndexMask(index=every, kv_len=settings.length))
    attend = rivals.make(name, device=settings.device)
    return lambda: attend(q, k, v)


def _step(q: Tensor, k: Tensor, v: Tensor, chosen: IndexMask) -> Callable[[], object]:
    return lambda: decode_attention(q, (k, v), chosen)


def stack(settings: Decode) -> dict[str, Any]:
    """Milliseconds of the attentions of one step through all layers: SDPA in each, and TidalDecode's schedule."""
    generator = torch.Generator(settings.device).manual_seed(2)
    heads = settings.heads // 2  # so that twelve layers fit in memory
    caches = []
    for _ in range(settings.layers):
        cache = KVCache(1, heads, settings.width, device=settings.device, dtype=precision(settings.device))
        cache.append(
            *(draw(settings, generator, 1, heads, settings.length, settings.width) for _ in range(2))
        )
        caches.append(cache)
    q = draw(settings, generator, settings.layers, 1, heads, 1, settings.width)
    schedule = TidalSchedule(num_layers=settings.layers, full=(0, 1), select=(2, 7), topk=256)
    attend = rivals.make("sdpa", device=settings.device)

    def dense() -> None:
        for layer, cache in enumerate(caches):
            attend(q[layer], cache.keys, cache.values)

    pairs = [(cache.keys, cache.values) for cache in caches]

    def contiguous() -> None:
        for layer, (k, v) in enumerate(pairs):
            attend(q[layer], k, v)

    def tidal() -> None:
        state = TidalState(schedule)
        for layer, cache in enumerate(caches):
            state.attend(layer, q[layer], cache)

    failed: dict[str, str] = {}
    took = take_turns(
        {"dense_from_cache": dense, "sdpa": contiguous, "tidal": tidal},
        max(3, settings.repeats // 4),
        settings.device,
        failed,
    )
    if "sdpa" in took and "tidal" in took:
        times = took["sdpa"] / took["tidal"]
        print(f"{settings.layers} layers: {took['sdpa']:.1f} -> {took['tidal']:.1f} ms, {times:.2f}x")
        return took | {"times": times, "failed": failed}
    return took | {"failed": failed}


def main(settings: Decode) -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    began, values = time.perf_counter(), {}
    with torch.no_grad():
        for name, measure in (("step", compare), ("stack", stack)):
            values[name] = measure(settings)
            path = write_result(
                settings.case, values, seconds=time.perf_counter() - began, device=settings.device
            )
    print(path)


if __name__ == "__main__":
    main(tyro.cli(Decode))
