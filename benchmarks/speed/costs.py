"""What attention costs besides arithmetic: memory, the first call, threads, half precision, and how cost grows.

    python -m benchmarks.speed.costs

Writes `speed/costs.json`. Memory and first calls are measured in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from benchmarks.results_io import write_result
from benchmarks.speed.attention import Attention, draw, random_blocks
from benchmarks.speed.timing import take_turns
from sparse_core import BlockMask, block_sparse_attention, get_method, list_methods
from sparse_core.sparsify import make_layer

Part = Literal["all", "memory", "first_call", "mask_memory"]
LONG = 20_000
MEBIBYTE = 2**20
LONG_OPTIONS: dict[str, dict[str, Any]] = {
    "attention/moa": {"density": 0.1},
    "attention/routing": {"num_clusters": 40, "window": 500},
    "attention/seer": {"selection": "ratio", "amount": 0.1},
    "attention/minference": {"pattern": "block_sparse", "share": 0.1},
}


@dataclass(frozen=True, kw_only=True)
class Costs:
    """part and what: for the processes that this program starts itself."""

    part: Part = "all"
    what: str = ""
    case: str = "speed/costs"


def alone(part: Part, what: str, **environment: str) -> dict[str, float]:
    """One part in a fresh process."""
    words = [sys.executable, "-m", "benchmarks.speed.costs", "--part", part, "--what", what]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return json.loads(done.stdout.splitlines()[-1])


def resident() -> int:
    """Largest resident bytes of this process so far."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def measure_memory(what: str) -> dict[str, float]:
    """MiB that one forward and backward pass at T 8192, density .1, adds: `dense` or `ours`."""
    settings = Attention()
    inputs = draw(settings, 8192, torch.float32)
    mask = random_blocks(settings, 8192, 0.1, False)

    def attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
        if what == "dense":
            return F.scaled_dot_product_attention(q, k, v)
        return block_sparse_attention(q, k, v, blocks)  # type: ignore[return-value]

    warm = [x[:, :, :128].clone().requires_grad_() for x in inputs[:3]]
    attend(warm[0], warm[1], warm[2], random_blocks(settings, 128, 1.0, False)).sum().backward()
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    before = resident()
    attend(q, k, v, mask).backward(inputs[3])
    return {"mib": (resident() - before) / MEBIBYTE}


def measure_first_call(what: str) -> dict[str, float]:
    """Seconds of the first forward, or forward and backward, of a process."""
    settings = Attention()
    inputs = [x.requires_grad_() for x in draw(settings, 256, torch.float32)[:3]]
    mask = random_blocks(settings, 256, 0.5, False)
    began = time.perf_counter()
    block_sparse_attention(inputs[0], inputs[1], inputs[2], mask).sum().backward()  # type: ignore[union-attr]
    return {"seconds": time.perf_counter() - began}


def measure_mask_memory(name: str) -> dict[str, float]:
    """MiB that one head of 20,000 tokens adds, mask and attention, and the seconds of that."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, LONG, 64, generator=generator) for _ in range(3))
    layer = make_layer(name, 1, 1, 64, **LONG_OPTIONS.get(name, {}), causal=True)
    if name == "attention/routing":
        layer.train()(q[:, :, :1000], k[:, :, :1000], v[:, :, :1000])
    layer.eval()
    with torch.no_grad():
        layer(q[:, :, :1000], k[:, :, :1000], v[:, :, :1000])
        before, began = resident(), time.perf_counter()
        layer(q, k, v)
    return {"mib": (resident() - before) / MEBIBYTE, "seconds": time.perf_counter() - began}


def half_precision(length: int = 4096) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and of training in float32 and in bfloat16, by density."""
    settings, found = Attention(), {}
    for density in (0.25, 0.1):
        mask, calls = random_blocks(settings, length, density, False), {}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            inputs = draw(settings, length, dtype)
            calls[f"forward {name}"] = _forward(inputs, mask)
            calls[f"training {name}"] = _training(inputs, mask)
        took = take_turns(calls, 5)
        found[str(density)] = took | {
            f"{kind}_times": took[f"{kind} float32"] / took[f"{kind} bfloat16"]
            for kind in ("forward", "training")
        }
    return found


def _forward(inputs: list[Tensor], mask: BlockMask) -> Callable[[], object]:
    return lambda: block_sparse_attention(inputs[0], inputs[1], inputs[2], mask)


def _training(inputs: list[Tensor], mask: BlockMask) -> Callable[[], object]:
    def train() -> None:
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        block_sparse_attention(q, k, v, mask).backward(inputs[3])  # type: ignore[union-attr]

    return train


def two_threads(length: int = 8192) -> dict[str, float]:
    """How many times faster two threads are, by the clock: the machine must be idle."""
    settings, found = Attention(), {}
    mask, inputs = random_blocks(settings, length, 0.25, False), draw(settings, length, torch.float32)
    for kind, call in (("forward", _forward(inputs, mask)), ("training", _training(inputs, mask))):
        best = {1: float("inf"), 2: float("inf")}
        for _ in range(6):
            for count in best:
                os.environ["SPARSE_CORE_THREADS"] = str(count)
                began = time.perf_counter()
                call()
                best[count] = min(best[count], time.perf_counter() - began)
        del os.environ["SPARSE_CORE_THREADS"]
        found[kind] = best[1] / best[2]
    return found


def growth() -> dict[str, list[list[float]]]:
    """[what it is, milliseconds of a forward pass] over kept blocks, tokens at density .25, and heads."""
    found: dict[str, list[list[float]]] = {"density": [], "tokens": [], "heads": []}
    for density in (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0):
        found["density"].append([density, _milliseconds(Attention(), 4096, density)])
    for length in (512, 1024, 2048, 4096, 8192):
        found["tokens"].append([length, _milliseconds(Attention(), length, 0.25)])
    for heads in (1, 2, 4, 8, 16):
        found["heads"].append([heads, _milliseconds(Attention(heads=heads), 2048, 0.25)])
    return found


def _milliseconds(settings: Attention, length: int, density: float) -> float:
    inputs, mask = draw(settings, length, torch.float32), random_blocks(settings, length, density, False)
    return take_turns({"ours": _forward(inputs, mask)}, 4)["ours"]


def measure_all() -> dict[str, Any]:
    """Everything, one after another."""
    values: dict[str, Any] = {}
    values["memory"] = {what: alone("memory", what)["mib"] for what in ("dense", "ours")}
    with tempfile.TemporaryDirectory() as cache:
        values["first_call"] = {
            what: alone("first_call", what, NUMBA_CACHE_DIR=cache)["seconds"]
            for what in ("compiled", "cached")
        }
    names = [name for name in list_methods() if get_method(name).layer is not None]
    values["mask_memory"] = {name: alone("mask_memory", name) for name in names}
    for name, part in (("half_precision", half_precision), ("two_threads", two_threads), ("growth", growth)):
        values[name] = part()
    return values


def main(settings: Costs) -> None:
    """Measure everything and write the result file, or one part and print it."""
    torch.set_num_threads(1)
    if settings.part != "all":
        parts = {
            "memory": measure_memory,
            "first_call": measure_first_call,
            "mask_memory": measure_mask_memory,
        }
        print(json.dumps(parts[settings.part](settings.what)))
        return
    began = time.perf_counter()
    values = measure_all()
    print(json.dumps(values, indent=1))
    print(write_result(settings.case, values, seconds=time.perf_counter() - began))


if __name__ == "__main__":
    main(tyro.cli(Costs))
