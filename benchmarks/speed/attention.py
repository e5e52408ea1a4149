"""Block-sparse attention against dense SDPA: forward, and forward with backward, by density and length.

    python -m benchmarks.speed.attention [--device cuda] [--rivals sdpa flash cudnn flex]

One thread, float32 on a CPU and bfloat16 on a GPU, random blocks per head; a rival that fails leaves its reason. Writes
`speed/attention.json`, after every row, so that a run which is cut off leaves what it has measured. At the lengths that
are timed on a GPU, the tensors of one call fill its cache, so nothing is flushed between calls.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from benchmarks.results_io import write_result
from benchmarks.speed import rivals
from benchmarks.speed.rivals import Attend, Rival
from benchmarks.speed.timing import take_turns
from sparse_core.attention.masks import BlockMask, causal
from sparse_core.kernels.block_attention import Implementation, block_sparse_attention

Kind = Literal["full", "causal"]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Which lengths and densities, and against what; `repeats` rounds in which the candidates take turns."""

    lengths: tuple[int, ...] = (4096, 8192)
    densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    kinds: tuple[Kind, ...] = ("full", "causal")
    block: int = 64
    heads: int = 4
    width: int = 64
    repeats: int = 3
    device: str = "cpu"
    rivals: tuple[Rival, ...] = ("sdpa",)
    implementation: Implementation = "auto"
    case: str = "speed/attention"


def precision(device: str) -> torch.dtype:
    """What is computed in: bfloat16 on a GPU, whose dense kernels take no float32."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def draw(settings: Attention, length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, [1, H, T, D]."""
    generator = torch.Generator(settings.device).manual_seed(length)
    shape = (1, settings.heads, length, settings.width)
    return [torch.randn(shape, generator=generator, device=settings.device).to(dtype) for _ in range(4)]


def random_blocks(settings: Attention, length: int, density: float, lower: bool) -> BlockMask:
    """That share of all blocks, or of those on and below the diagonal, which then is always kept."""
    generator = torch.Generator().manual_seed(round(1000 * density))
    n = -(-length // settings.block)
    sizes: dict[str, Any] = {"block_size": settings.block, "q_len": length, "kv_len": length}
    # The diagonal, half of whose pairs are in the past, is always kept: so much less of the rest.
    own = settings.block / (length + settings.block) if lower else 0.0
    drawn = torch.rand(1, settings.heads, n, n, generator=generator)
    blocks = drawn < (density if density == 1 else (density - own) / (1 - own))
    if not lower:
        return BlockMask.from_dense_blocks(blocks, **sizes).to(settings.device)
    blocks = blocks.tril() | torch.eye(n, dtype=torch.bool)
    full = blocks & ~torch.eye(n, dtype=torch.bool)
    return BlockMask.from_dense_blocks(blocks, full=full, rule=causal, **sizes).to(settings.device)


def errors(attend: Attend, exact: Attend, inputs: list[Tensor]) -> dict[str, float]:
    """Largest difference of output and gradients to `exact` in float64, relative to the largest value."""
    results = []
    for call, dtype in ((attend, inputs[0].dtype), (exact, torch.float64)):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
        out = call(q, k, v)
        out.backward(inputs[3].to(dtype))
        results.append([x.detach().double() for x in (out, q.grad, k.grad, v.grad)])  # type: ignore[union-attr]
    names = ("out", "dq", "dk", "dv")
    pairs = zip(names, *results, strict=True)
    return {name: float((ours - true).abs().max() / true.abs().max()) for name, ours, true in pairs}


def compare(settings: Attention, length: int, density: float, lower: bool) -> dict[str, Any]:
    """Milliseconds of all, forward and with backward, and how many times faster ours is. `failed`: why those that
    did not run did not; `differences`: of outputs that should be the same, relative to the largest value of ours;
    `lists_ms`: of making the lists of a new mask, which the Triton kernel does in every call."""
    mask = random_blocks(settings, length, density, lower)
    inputs = draw(settings, length, precision(settings.device))
    q, k, v = inputs[:3]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, mask, implementation=settings.implementation)  # type: ignore[return-value]

    def train(attend: Attend) -> None:
        # Fresh leaves, so that gradients are written and never added up.
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        attend(q, k, v).backward(inputs[3])

    calls = {"ours": ours} | {
        name: rivals.make(name, device=settings.device, lower=lower, mask=mask) for name in settings.rivals
    }
    lists = take_turns({"ms": lambda: replace(mask).rows}, settings.repeats, settings.device)
    row: dict[str, Any] = {"density": share(mask, lower), "lists_ms": lists["ms"], "failed": {}}
    for part, run in (("forward", lambda attend: attend(q, k, v)), ("training", train)):
        failed: dict[str, str] = {}
        took = take_turns(
            {name: partial(run, call) for name, call in calls.items()},
            settings.repeats,
            settings.device,
            failed,
        )
        row |= _ratios(part, took)
        row["failed"] |= {f"{part} {name}": why for name, why in failed.items()}
        if part == "forward" and "ours" in took:
            same = [name for name in took if name == "flex" or (density == 1 and name != "ours")]
            row["differences"] = _differences(ours(q, k, v), {name: calls[name](q, k, v) for name in same})
    if "sdpa" in settings.rivals:
        row["sdpa_backend"] = rivals.chosen_backend(q, k, v, lower)
    return row


def share(mask: BlockMask, lower: bool) -> float:
    """Kept pairs, of all or of those on and below the diagonal. Counted without a mask of all pairs."""
    length = mask.q_len
    return mask.to("cpu").density() * (2 * length / (length + 1) if lower else 1)


def _ratios(part: str, took: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by candidate, and how often ours fits into each rival; torch's own choice goes by the name `dense`."""
    found = {}
    for name, ms in took.items():
        label = {"ours": "", "sdpa": "dense_"}.get(name, f"{name}_")
        found[f"{part}_{label}ms"] = ms
        if name != "ours" and "ours" in took:
            found[f"{part}_times" if name == "sdpa" else f"{part}_over_{name}"] = ms / took["ours"]
    return found


def _differences(ours: Tensor, others: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((out - ours).abs().max() / ours.abs().max()) for name, out in others.items()}


def main(settings: Attention) -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    began, values = time.perf_counter(), {}
    values["errors"] = {
        str(kind == "causal"): accuracy(settings, kind == "causal") for kind in settings.kinds
    }
    print(values["errors"])
    path = None
    for kind in settings.kinds:
        for length in settings.lengths:
            if "flex" in settings.rivals:
                rivals.forget()
            for density in settings.densities:
                row = compare(settings, length, density, kind == "causal")
                values[f"{kind} {length} {density}"] = row
                print(f"{kind:6} T {length} density {row['density']:.2f}: {describe(row)}", flush=True)
                path = write_result(
                    settings.case, values, seconds=time.perf_counter() - began, device=settings.device
                )
    print(path)


def describe(row: Mapping[str, Any]) -> str:
    """One row in words."""
    parts = []
    for part in ("forward", "training"):
        ratios = [
            f"{row[key]:.2f}x {'sdpa' if key.endswith('times') else key.removeprefix(f'{part}_over_')}"
            for key in row
            if key == f"{part}_times" or key.startswith(f"{part}_over_")
        ]
        if f"{part}_ms" in row:
            parts.append(f"{part} {row[f'{part}_ms']:.1f} ms, " + ", ".join(ratios))
    parts += [f"{name} failed: {why}" for name, why in row["failed"].items()]
    return "; ".join(parts)


def accuracy(settings: Attention, lower: bool) -> dict[str, float]:
    """Errors against the definition in float64, at a length that it can hold."""
    length = min(1024, *settings.lengths)
    mask, inputs = (
        random_blocks(settings, length, 0.25, lower),
        draw(settings, length, precision(settings.device)),
    )

    def attend(implementation: Implementation) -> Attend:
        return lambda q, k, v: block_sparse_attention(q, k, v, mask, implementation=implementation)  # type: ignore[return-value]

    return errors(attend(settings.implementation), attend("reference"), inputs)


if __name__ == "__main__":
    main(tyro.cli(Attention))
