"""HiP attention: a tree search finds keys that have locality, at a logarithmic price, and cannot find those without."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.claims import Trial
from sparse_core.methods.attention.hip import hip_mask

CLAIM = "Where neighbouring keys are alike, a tree search of 2 k log2(T / k) products per row finds what attention needs."
THRESHOLD = (
    "keys AR(1) with rho .9: mass >= .95 and >= 4 times that of random blocks of equal number; rho 0: mass <= .85, "
    "where a whole scan has .99; products per row that are really multiplied <= 1.1 * 2 k log2(L / k); no query keeps "
    "more than the budget and its own block"
)
SEEDS = 3
LENGTH, WIDTH, BUDGET, BLOCK_Q, BLOCK_K = 4096, 64, 512, 32, 2
FIRST = LENGTH // 2  # rows from here on are judged: earlier ones see little more than the budget


def draw(rho: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries [T - FIRST, D] that each ask for one random earlier key, and keys [T, D] of unit variance."""
    noise = torch.randn(LENGTH, WIDTH, generator=generator)
    keys = [noise[0]]
    for step in noise[1:]:
        keys.append(rho * keys[-1] + math.sqrt(1 - rho**2) * step)
    rows = torch.arange(FIRST, LENGTH)
    wanted = (torch.rand(len(rows), generator=generator) * (rows + 1)).long()
    return 2 * torch.stack(keys)[wanted], torch.stack(keys)


def mass(weights: Tensor, blocks: Tensor) -> float:
    """Share of the attention [rows, T] that key blocks [query blocks, key blocks] keep."""
    per_block = weights.unflatten(1, (-1, BLOCK_K)).sum(-1)
    return float((per_block * blocks.repeat_interleave(BLOCK_Q, 0)).sum(1).mean())


def best_blocks(scores: Tensor, kept: Tensor) -> Tensor:
    """As many blocks per query block as `kept` has, those of highest score."""
    order = scores.sort(dim=-1, descending=True).indices
    taken = torch.arange(scores.shape[-1]) < kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order, taken)


def measure_keys(rho: float, generator: torch.Generator) -> dict[str, float]:
    """Mass of the search, of random blocks and of a whole scan, products over their bound, and the most keys of a query.

    Products are those that torch multiplies, whatever the method says of itself.
    """
    q, k = draw(rho, generator)
    with FlopCounterMode(display=False) as meter:
        mask = hip_mask(
            q[None, None], k[None, None], budget=BUDGET, block_q=BLOCK_Q, block_k=BLOCK_K, window=0, sink=0
        )
    kept = mask.blocks[0, 0]
    ends = torch.arange(FIRST, LENGTH) + 1
    seen = torch.arange(LENGTH) < ends[:, None]
    scores = (q @ k.T / math.sqrt(WIDTH)).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1)
    per_block = scores.unflatten(0, (-1, BLOCK_Q)).amax(1).unflatten(1, (-1, BLOCK_K)).amax(-1)
    chance = torch.rand(kept.shape, generator=generator).masked_fill(per_block == -torch.inf, -torch.inf)
    return {
        "found": mass(weights, kept),
        "random": mass(weights, best_blocks(chance, kept)),
        "scan": mass(weights, best_blocks(per_block, kept)),
        "products": meter.get_total_flops()
        / (2 * WIDTH)
        / float((2 * BUDGET * (ends / BUDGET).log2()).sum()),
        "kept": float(kept.sum(-1).max()) * BLOCK_K,
    }


def measure(seed: int) -> Trial:
    """Both kinds of keys."""
    generator = torch.Generator().manual_seed(seed)
    near, loose = measure_keys(0.9, generator), measure_keys(0.0, generator)
    return Trial(
        value=near["found"],
        control=near["random"],
        oracle=near["scan"],
        conditions={
            "finds keys with locality": near["found"] >= max(0.95, 4 * near["random"]),
            "misses keys without": loose["found"] <= 0.85,
            "multiplies as a tree": min(near["products"], loose["products"]) > 0
            and max(near["products"], loose["products"]) <= 1.1,
            "keeps the budget": max(near["kept"], loose["kept"]) <= BUDGET + BLOCK_Q,
        },
        details={
            "most keys of a query": max(near["kept"], loose["kept"]),
            "mass without locality": loose["found"],
            "mass of a whole scan without locality": loose["scan"],
            "products over 2 k log2(L / k)": near["products"],
            "products over 2 k log2(L / k) without locality": loose["products"],
        },
    )
