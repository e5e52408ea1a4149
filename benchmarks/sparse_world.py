"""What sparse attention costs the shipped world model in picture quality, and saves in attention's multiply-adds.

    python -m benchmarks.sparse_world --run runs/tiny

puts methods, without any training, into the attention over views and places, imagines held-out windows by their true
actions and writes `sparse_world.json`. The data are the recipe's `test` split
(`python -m enerverse.recipes.tiny --until data`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from benchmarks.results_io import write_result
from enerverse.evaluate.imagination import (
    SPANS,
    Window,
    copy_last,
    gain,
    held_out_windows,
    imagine_window,
    measure,
    pool,
)
from enerverse.loading import load_world
from enerverse.pipelines import EnerVersePipeline
from enerverse.recipes.tiny import read_split
from sparse_core import BlockMask, count, sparsify

PLACES = r"\.views\."
TOKENS, BLOCK = 48, 4


@dataclass(frozen=True, kw_only=True)
class SparseWorld:
    """run: folder of the recipe's data. world: checkpoint folder, the shipped one when not given. windows: per episode."""

    run: Path = Path("runs/tiny")
    world: Path | None = None
    windows: int = 1
    steps: int = 5
    seed: int = 0


def random_blocks(heads: int, density: float, seed: int = 0) -> BlockMask:
    """The control: so many key blocks of every row, drawn once, and the diagonal."""
    blocks = TOKENS // BLOCK
    scores = torch.rand(1, heads, blocks, blocks, generator=torch.Generator().manual_seed(seed))
    scores.diagonal(dim1=-2, dim2=-1).fill_(2)
    return BlockMask.from_topk(scores, round(density * blocks), block_size=BLOCK, q_len=TOKENS, kv_len=TOKENS)


def settings_by_name(heads: int) -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Name -> method or mask, its options, and how many denoising steps share a mask."""
    small = {"block_q": 4, "block_k": 2, "window": 0, "sink": 0}
    pooled = {"pattern": "block_sparse", "block": BLOCK, "slash_block": BLOCK}
    return {
        "minference, half of the blocks": ("attention/minference", {**pooled, "share": 0.5}, 1),
        "minference, a quarter": ("attention/minference", {**pooled, "share": 0.25}, 1),
        "minference, a quarter, one mask for 5 steps": (
            "attention/minference", {**pooled, "share": 0.25}, 5,
        ),
        "hip, 24 of 48 tokens": ("attention/hip", {"budget": 24, **small}, 1),
        "hip, 12 of 48 tokens": ("attention/hip", {"budget": 12, **small}, 1),
        "hip, 12 of 48 tokens, one mask for 5 steps": ("attention/hip", {"budget": 12, **small}, 5),
        "s2, own view and a shard": ("attention/s2", {"block": 16, "local_blocks": 1, "stride": 3}, 1),
        "moa, uniform spans, half": ("attention/moa", {"block": BLOCK, "sink": BLOCK, "density": 0.5}, 1),
        "moa, uniform spans, a quarter": ("attention/moa", {"block": BLOCK, "sink": BLOCK, "density": 0.25}, 1),
        "random blocks, half (control)": (random_blocks(heads, 0.5), {}, 1),
        "random blocks, a quarter (control)": (random_blocks(heads, 0.25), {}, 1),
    }  # fmt: skip


@contextmanager
def attention(pipe: EnerVersePipeline, method: Any, options: dict[str, Any], shared: int) -> Iterator[None]:
    """The pipeline with this attention inside the block."""
    handle = sparsify(pipe.unet, method, PLACES, **options)
    pipe.unet.register_to_config(mask_steps=shared)
    try:
        yield
    finally:
        handle.detach()
        pipe.unet.register_to_config(mask_steps=1)


def score(settings: SparseWorld, windows: list[Window], imagine: Callable[..., Any], name: str) -> np.ndarray:
    """Sums per window and span [windows, spans, columns]."""
    rows = []
    for index, window in enumerate(tqdm(windows, desc=name, disable=None)):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
        measured = measure(imagine(window, generator), window)
        rows.append(np.stack([measured[span] for span in SPANS]))
    return np.stack(rows)


def cost(imagine: Callable[..., Any], window: Window) -> tuple[int, float]:
    """Multiply-adds of all attentions for one window, choosing included, and the least seconds of three."""
    with count() as counted:
        imagine(window, torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(3):
        began = time.process_time()
        imagine(window, torch.Generator().manual_seed(0))
        seconds.append(time.process_time() - began)
    return counted.multiply_adds, min(seconds)


def main(settings: SparseWorld) -> None:
    torch.set_num_threads(1)
    began = time.perf_counter()
    pipe = load_world(settings.world)
    pipe.set_progress_bar_config(disable=True)
    windows, groups = [], []
    for task, dataset in read_split(settings.run, "test").items():
        for window in held_out_windows(pipe, dataset, settings.windows):
            windows.append(window)
            groups.append(f"{task}/{window.episode.index}")

    def imagine(window: Window, generator: torch.Generator) -> Any:
        return imagine_window(pipe, window, told="actions", generator=generator, steps=settings.steps)[0]

    copied = score(settings, windows, lambda window, _: copy_last(window), "copying")
    dense = score(settings, windows, imagine, "dense")
    dense_cost, dense_seconds = cost(imagine, windows[0])
    values: dict[str, Any] = {"dense": _row(dense, dense, copied, groups) | {"attention": 1.0, "time": 1.0}}
    heads = next(part.heads for name, part in pipe.unet.named_modules() if name.endswith("views"))
    for name, (method, options, shared) in settings_by_name(heads).items():
        with attention(pipe, method, options, shared):
            sums = score(settings, windows, imagine, name)
            multiply_adds, seconds = cost(imagine, windows[0])
        values[name] = _row(sums, dense, copied, groups) | {
            "attention": round(multiply_adds / dense_cost, 3), "time": round(seconds / dense_seconds, 2),
        }  # fmt: skip
        print(name, values[name], flush=True)
    print(write_result("sparse_world", values, seconds=time.perf_counter() - began))


def _row(sums: np.ndarray, dense: np.ndarray, copied: np.ndarray, groups: list[str]) -> dict[str, Any]:
    """PSNR on moving pixels over all 16 frames, what is lost to dense attention, and what is gained over copying."""
    whole = [x.sum(1) for x in (sums, dense, copied)]
    lost = gain(whole[0], whole[1], np.array(groups))
    over = gain(whole[0], whole[2], np.array(groups))
    return {
        "psnr_moving": round(pool(whole[0])["psnr_moving"], 3),
        "against_dense": round(lost.estimate, 3),
        "against_dense_interval": [round(lost.low, 3), round(lost.high, 3)],
        "over_copying": round(over.estimate, 3),
    }


if __name__ == "__main__":
    main(tyro.cli(SparseWorld))
