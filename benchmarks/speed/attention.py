"""Block-sparse attention against dense SDPA: forward, and forward with backward, by density and length.

    python -m benchmarks.speed.attention [--device cuda]

One thread, float32 on a CPU and bfloat16 on a GPU, random blocks per head. Writes `speed/attention.json`.
"""

from __future__ import annotations

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
from sparse_core.attention.masks import BlockMask, causal
from sparse_core.kernels.block_attention import block_sparse_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Which lengths and densities; `repeats` rounds in which the candidates take turns."""

    lengths: tuple[int, ...] = (4096, 8192)
    densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    block: int = 64
    heads: int = 4
    width: int = 64
    repeats: int = 3
    device: str = "cpu"
    case: str = "speed/attention"


def draw(settings: Attention, length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, [1, H, T, D]."""
    generator = torch.Generator().manual_seed(length)
    shape = (1, settings.heads, length, settings.width)
    return [torch.randn(shape, generator=generator).to(settings.device, dtype) for _ in range(4)]


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


def compare(settings: Attention, length: int, density: float, lower: bool) -> dict[str, float]:
    """Milliseconds of both, forward and with backward, and how many times faster ours is."""
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    mask, inputs = random_blocks(settings, length, density, lower), draw(settings, length, dtype)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, mask)  # type: ignore[return-value]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=lower)

    def train(attend: Attend) -> None:
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        attend(q, k, v).backward(inputs[3])

    forward = take_turns(
        {"ours": lambda: ours(*inputs[:3]), "dense": lambda: dense(*inputs[:3])},
        settings.repeats,
        settings.device,
    )
    both = take_turns(
        {"ours": lambda: train(ours), "dense": lambda: train(dense)}, settings.repeats, settings.device
    )
    allowed = (
        BlockMask.from_rule(causal, q_len=length, kv_len=length, block_size=settings.block) if lower else None
    )
    return {
        "density": mask.to("cpu").density(allowed),
        "forward_ms": forward["ours"], "forward_dense_ms": forward["dense"],
        "forward_times": forward["dense"] / forward["ours"],
        "training_ms": both["ours"], "training_dense_ms": both["dense"], "training_times": both["dense"] / both["ours"],
    }  # fmt: skip


def main(settings: Attention) -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    began, values = time.perf_counter(), {}
    for lower in (False, True):
        for length in settings.lengths:
            for density in settings.densities:
                row = compare(settings, length, density, lower)
                values[f"{'causal' if lower else 'full'} {length} {density}"] = row
                print(
                    f"{'causal' if lower else 'full':6} T {length} density {row['density']:.2f}: forward "
                    f"{row['forward_dense_ms']:.0f} -> {row['forward_ms']:.1f} ms, {row['forward_times']:.2f}x; training "
                    f"{row['training_dense_ms']:.0f} -> {row['training_ms']:.1f} ms, {row['training_times']:.2f}x",
                    flush=True,
                )
    values["errors"] = {str(lower): accuracy(settings, lower) for lower in (False, True)}
    print(values["errors"])
    print(write_result(settings.case, values, seconds=time.perf_counter() - began, device=settings.device))


def accuracy(settings: Attention, lower: bool) -> dict[str, float]:
    """Errors against the definition in float64, at a length that it can hold."""
    length = 1024
    mask, inputs = random_blocks(settings, length, 0.25, lower), draw(settings, length, torch.float32)

    def attend(implementation: str) -> Attend:
        return lambda q, k, v: block_sparse_attention(q, k, v, mask, implementation=implementation)  # type: ignore[arg-type, return-value]

    return errors(attend("auto"), attend("reference"), inputs)


if __name__ == "__main__":
    main(tyro.cli(Attention))
