"""TidalDecode: positions that one layer chose serve the layers after it, until another layer corrects them."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims import Trial
from sparse_core import counters
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.masks import IndexMask
from sparse_core.methods.attention.tidal import TidalSchedule, TidalState

CLAIM = "Positions that one layer chose keep attention in those above, and a second choice corrects them when they move."
THRESHOLD = (
    "mass of the sparse layers >= .95 of the best k keys, needles staying (A) or moving at layer 6 (B); without the "
    "second choice <= .6 in B; relative error of the outputs of sparse layers <= .25, where the best k keys have .08, "
    "and of dense ones <= 1e-5; bytes read are those of s + 2 of L dense layers and of k keys in the others, exactly"
)
SEEDS = 3
LAYERS, HEADS, LENGTH, WIDTH, TOPK, NEEDLES, MOVED = 12, 4, 4096, 64, 128, 8, 6
# The logit of a needle. Others have N(0, 1), which sum to T e^.5; at 9.2 the best k keys hold .93 of the attention.
LOGIT = 9.2
Layer = tuple[Tensor, Tensor, Tensor]


def draw(moves: bool, generator: torch.Generator) -> list[Layer]:
    """Query [1, H, 1, D], keys and values [1, H, T, D] of every layer; each head looks at needles of its own."""
    places = torch.rand(2, HEADS, LENGTH, generator=generator).topk(NEEDLES).indices
    layers = []
    for layer in range(LAYERS):
        q = torch.randn(1, HEADS, 1, WIDTH, generator=generator)
        k, v = (torch.randn(1, HEADS, LENGTH, WIDTH, generator=generator) for _ in range(2))
        found = places[int(moves and layer >= MOVED)]
        along = q[0] * LOGIT * WIDTH**0.5 / q[0].square().sum(-1, keepdim=True)
        k[0].scatter_(1, found[..., None].expand(-1, -1, WIDTH), along.expand(-1, NEEDLES, -1))
        layers.append((q, k, v))
    return layers


def decode(layers: list[Layer], schedule: TidalSchedule) -> dict[str, float]:
    """One step through all layers: mass of the sparse layers, that of the best keys and of the newest ones, relative error
    of their outputs and of those of the best keys, that of dense layers, all means, and bytes read over those that the
    schedule asks for."""
    state, found = TidalState(schedule), defaultdict[str, list[float]](list)
    with counters.count() as counter:
        for number, (q, k, v) in enumerate(layers):
            cache = KVCache(1, HEADS, WIDTH)
            cache.append(k, v)
            out = state.attend(number, q, cache)
            exact = F.scaled_dot_product_attention(q, k, v)
            if number in (*schedule.full, *schedule.select) or state.positions is None:
                found["dense error"].append(error(out, exact))
                continue
            scores = q @ k.mT * WIDTH**-0.5
            found["mass"].append(mass(scores, state.positions))
            best = IndexMask.from_topk(scores, TOPK)
            found["best"].append(mass(scores, best))
            newest = torch.arange(LENGTH - TOPK, LENGTH).expand(1, HEADS, 1, -1)
            found["newest"].append(mass(scores, IndexMask(index=newest, kv_len=LENGTH)))
            kept = F.scaled_dot_product_attention(q, k, v, attn_mask=best.to_token_mask())
            found["error"].append(error(out, exact))
            found["best error"].append(error(kept, exact))
    dense = len({*schedule.full, *schedule.select})
    expected = 2 * HEADS * WIDTH * 4 * (dense * LENGTH + (LAYERS - dense) * TOPK)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return means | {"bytes over schedule": counter.kv_bytes / expected}


def error(out: Tensor, exact: Tensor) -> float:
    """Size of the difference as a share of what it differs from."""
    return float((out - exact).norm() / exact.norm())


def mass(scores: Tensor, kept: IndexMask) -> float:
    """Share of the attention that the kept keys hold, mean over heads."""
    return float(scores.softmax(-1).gather(-1, kept.index.clamp_min(0)).sum(-1).mean())


def measure(seed: int) -> Trial:
    """Both cases with the second choice, and each without."""
    generator = torch.Generator().manual_seed(seed)
    twice, once = (
        TidalSchedule(num_layers=LAYERS, full=(0, 1), select=select, topk=TOPK)
        for select in ((2, MOVED), (2,))
    )
    stay, move = draw(False, generator), draw(True, generator)
    a, b = decode(stay, twice), decode(move, twice)
    a_once, b_once = decode(stay, once), decode(move, once)
    return Trial(
        value=b["mass"],
        control=b_once["mass"],
        oracle=b["best"],
        conditions={
            "mass in A": a["mass"] >= 0.95 * a["best"],
            "mass in B": b["mass"] >= 0.95 * b["best"],
            "positions are reused": b_once["mass"] <= 0.6,
            "outputs": max(a["error"], b["error"]) <= 0.25
            and max(a["dense error"], b["dense error"]) <= 1e-5,
            "bytes": all(run["bytes over schedule"] == 1 for run in (a, b, a_once, b_once)),
        },
        details={
            "mass in A": a["mass"],
            "mass of the best keys in A": a["best"],
            "mass in A without the second choice": a_once["mass"],
            "mass of the newest keys": b["newest"],
            "error in A": a["error"],
            "error in B": b["error"],
            "error of the best keys in B": b["best error"],
            "error of dense layers": max(a["dense error"], b["dense error"]),
            "error in B without the second choice": b_once["error"],
            "bytes over those of the schedule": b["bytes over schedule"],
            "bytes over those of dense layers": (4 * LENGTH + 8 * TOPK) / (LAYERS * LENGTH),
        },
    )
