"""MInference: the offline search tells a head's pattern at equal cost, and the pattern keeps that head's attention."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.claims import Trial
from sparse_core.methods.attention.minference import (
    Config,
    HeadPlan,
    MInferencePrefill,
    Pattern,
    search_patterns,
    vertical_slash_index,
)

CLAIM = "at equal floating-point operations the search finds each head's planted pattern, and the index its columns"
THRESHOLD = (
    "the planted kind for all three heads; each pattern keeps >= .75 of the attention; >= .95 of the planted columns "
    "found; output within 2e-5 of dense attention under the same mask; a plan of vertical and slash for every head keeps "
    "less than half as much of the block head"
)
SEEDS = 3
TOKENS, WIDTH, OFFSET, COLUMNS, SHARE = 4096, 64, 700, 40, 0.2
KINDS = ("vertical_slash", "a_shape", "block_sparse")
CANDIDATES = (
    Pattern("a_shape", (100, 800)),
    Pattern("vertical_slash", (100, 100)),
    Pattern("vertical_slash", (30, 800)),
    Pattern("vertical_slash", (500, 100)),
    Pattern("block_sparse", (100,)),
)


def draw_heads(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [1, 3, T, D] of a vertical-slash, a sink-and-window and a block head, and the planted columns [40]."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    columns = torch.randperm(TOKENS // 2, generator=generator)[:COLUMNS].sort().values
    q, k = 0.3 * noise(3, TOKENS, WIDTH), 0.3 * noise(3, TOKENS, WIDTH)
    half, root, place = WIDTH // 2, WIDTH**0.5, torch.arange(TOKENS).float()
    # Head 0: rotary pairs peak where query minus key is OFFSET, and one channel marks the columns.
    turns = torch.rand(half // 2, generator=generator) * torch.pi
    for x, shift in ((q[0], -OFFSET), (k[0], 0)):
        angles = (place[:, None] + shift) * turns
        x[:, :half] = torch.cat([angles.cos(), angles.sin()], -1) * (0.6 * root) ** 0.5
        x[:, half] = 0
    q[0, :, half] = k[0, columns, half] = (6.5 * root) ** 0.5
    # Head 1: a slow rotation that favours near keys, and the first tokens.
    slow = torch.rand(half // 2, generator=generator) * 0.01
    for x in (q[1], k[1]):
        angles = place[:, None] * slow
        x[:, :half] = torch.cat([angles.cos(), angles.sin()], -1) * (1.2 * root) ** 0.5
        x[:, half] = 0
    q[1, :, half] = (22 * root) ** 0.5
    k[1, :4, half] = (22 * root) ** 0.5
    # Head 2: a text of topics, one per 64 tokens in random order; a query looks at earlier tokens of its topic.
    topics = torch.randint(0, 12, (TOKENS // 64,), generator=generator).repeat_interleave(64)
    centres = torch.nn.functional.normalize(noise(12, WIDTH), dim=-1)
    q[2] += centres[topics] * (9 * root) ** 0.5
    k[2] += centres[topics] * (9 * root) ** 0.5
    return q[None], k[None], noise(1, 3, TOKENS, WIDTH), columns


def kept_mass(q: Tensor, k: Tensor, keep: Tensor) -> float:
    """Share of causal attention of one head that bool [T, T] keeps."""
    future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    weights = (q @ k.T * WIDTH**-0.5).masked_fill(future, -torch.inf).softmax(-1)
    return float((weights * keep).sum(-1).mean())


def masses(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan) -> tuple[list[float], float]:
    """What a plan keeps of each head, and the largest difference to dense attention under its mask."""
    layer, kept, error = MInferencePrefill(plan, Config()), [], 0.0
    mask = layer.mask(q, k, v)
    out, tokens = layer.attend(q, k, v, mask), mask.to_token_mask()
    for head in range(q.shape[1]):
        keep = tokens[0, head]
        kept.append(kept_mass(q[0, head], k[0, head], keep))
        exact = torch.nn.functional.scaled_dot_product_attention(
            q[0, head], k[0, head], v[0, head], attn_mask=keep
        )
        error = max(error, float((out[0, head] - exact).abs().max()))
    return kept, error


def measure(seed: int) -> Trial:
    """One set of heads."""
    q, k, v, columns = draw_heads(seed)
    budget = 4.0 * WIDTH * SHARE * TOKENS * TOKENS / 2
    plan = search_patterns(q, k, v, CANDIDATES, budget)
    kept, error = masses(q, k, v, plan)
    slash = max((p for p in CANDIDATES if p.kind == "vertical_slash"), key=lambda p: p.sizes[1])
    fixed = search_patterns(q, k, v, [slash], budget)
    always, _ = masses(q, k, v, fixed)
    found = vertical_slash_index(q[:, :1], k[:, :1], *plan.patterns[0].sizes[:2])[0].flatten().tolist()
    recall = len(set(found) & set(columns.tolist())) / COLUMNS
    kinds = tuple(pattern.kind for pattern in plan.patterns)
    passed = (
        kinds == KINDS and min(kept) >= 0.75 and recall >= 0.95 and error <= 2e-5 and always[2] < kept[2] / 2
    )
    return Trial(
        value=min(kept), control=always[2], passed=passed,
        details={
            "found": float(sum(a == b for a, b in zip(kinds, KINDS, strict=True))), "recall": recall, "error": error,
            **{f"kept_{kind}": mass for kind, mass in zip(KINDS, kept, strict=True)},
            **{f"always_slash_{kind}": mass for kind, mass in zip(KINDS, always, strict=True)},
        },
    )  # fmt: skip
