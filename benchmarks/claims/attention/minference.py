"""MInference 1.0: the search finds which pattern a head needs, and the pattern then serves prompts it never saw.

Three heads of T = 4096 tokens, each planted with one structure. Patterns are searched on one prompt and judged on
another: other tokens, other columns, other topics. The column head needs more blocks than the budget buys. The window
head is wider than any budgeted window: a vertical-slash may take the same shape, and loses there by a hundredth, only
because the FLOPs of its index count; were finding it free, it would be chosen for that head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.claims import Trial
from sparse_core.attention.column_attention import column_block_attention
from sparse_core.attention.masks import BlockMask, ColumnBlockMask, causal
from sparse_core.methods.attention.minference import (
    CANDIDATES,
    KINDS,
    Config,
    HeadPlan,
    MInferencePrefill,
    Pattern,
    fit_pattern,
    pattern_mask,
    prefill_flops,
    search_patterns,
    vertical_slash_index,
)

LENGTH, WIDTH, OFFSET, COLUMNS, BLOCK, TOPICS = 4096, 64, 700, 40, 64, 16
PLANTED = ("vertical_slash", "a_shape", "block_sparse")
SHARE = 0.2  # of the FLOPs of dense causal attention
BUDGET = SHARE * 4 * WIDTH * LENGTH * (LENGTH + 1) / 2

CLAIM = (
    "A search at equal FLOPs gives each head the pattern it was planted with, and the index that is found anew for every "
    "prompt keeps its attention."
)
THRESHOLD = (
    f"Every planted type is found at {SHARE} of dense FLOPs; on an unseen prompt each chosen pattern keeps at least 0.75 "
    "of the attention, both as it is and scaled to those FLOPs; at least 0.95 of the planted columns are in the index; "
    "the output is that of the same mask dense, within 2e-5, and no scaled pattern costs more than those FLOPs, nor "
    "one as it is more than twice as much (how many blocks diagonals meet differs by prompt). The controls fail: the "
    "best vertical-slash keeps under 0.75 of the block head's attention, and random blocks of equal work keep under "
    "0.3, their share of the work being 0.2."
)
SEEDS = 3
CONFIG = Config()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of x [T, D]."""
    angle = positions[:, None] * 10000.0 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2))
    first, second = x.chunk(2, -1)
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1
    )


def draw_columns(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A head that looks OFFSET tokens back, and at COLUMNS tokens of as many different blocks; and which these are."""
    blocks = torch.randperm(LENGTH // BLOCK, generator=generator)[:COLUMNS]
    columns = (blocks * BLOCK + torch.randint(BLOCK, (COLUMNS,), generator=generator)).sort().values
    positions, pairs = torch.arange(LENGTH).float(), torch.zeros(WIDTH)
    pairs[: WIDTH // 2 - 1] = 1  # the last pair of channels is left to the columns
    q, k = (rotate(pairs.expand(LENGTH, -1), positions - back) for back in (OFFSET, 0))
    q, k = add_noise(3.5 * q, k, 0.3, generator)
    q[:, -1], k[:, -1] = 8.0, 0.0
    k[columns], k[columns, -1] = 0.0, 11.5
    return q, k, columns


def draw_window(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A head that looks at the first 4 tokens, and back as far as rotations of Gaussian rates agree: some 500 tokens.

    The rates are quantiles, not draws, or the window of some seeds would be too wide for any pattern.
    """
    rates = torch.special.ndtri((torch.arange(WIDTH // 2 - 1) + 0.5) / (WIDTH // 2 - 1))
    angle = torch.arange(LENGTH)[:, None] * rates / 500
    waves = torch.cat([angle.cos(), angle.sin()], -1)
    q, k = torch.zeros(2, LENGTH, WIDTH)
    q[:, :-2], k[:, :-2] = waves, 8 * 8 * waves / waves.shape[1] * 2
    q[:, -1], k[:4, :-2], k[:4, -1] = 8.0, 0, 11.5
    return add_noise(q, k, 0.1, generator)


def draw_topics(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A head whose blocks look at earlier blocks of the same topic."""
    topics = torch.randn(TOPICS, WIDTH, generator=generator) * 1.2
    own = topics[torch.randint(TOPICS, (LENGTH // BLOCK,), generator=generator)].repeat_interleave(BLOCK, 0)
    return add_noise(own, own, 0.5, generator)


def add_noise(q: Tensor, k: Tensor, size: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return tuple(x + size * torch.randn(x.shape, generator=generator) for x in (q, k))  # type: ignore[return-value]


def draw_prompt(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [1, 3, T, D] of the heads PLANTED, and the planted columns of the first."""
    generator = torch.Generator().manual_seed(seed)
    q, k, columns = draw_columns(generator)
    heads = [(q, k), draw_window(generator), draw_topics(generator)]
    q, k = (torch.stack(part)[None] for part in zip(*heads, strict=True))
    return q, k, torch.randn(q.shape, generator=generator), columns


def kept_mass(q: Tensor, k: Tensor, v: Tensor, mask: ColumnBlockMask) -> Tensor:
    """Mean attention [H] that a mask keeps."""
    everything = pattern_mask(q, k, [Pattern("a_shape", (LENGTH, LENGTH))] * q.shape[1], CONFIG)
    _, ours = column_block_attention(q, k, v, mask, return_lse=True)
    _, exact = column_block_attention(q, k, v, everything, return_lse=True)
    return (ours - exact).exp().mean((0, 2))


def dense_error(q: Tensor, k: Tensor, v: Tensor, mask: ColumnBlockMask, out: Tensor) -> float:
    """Largest difference from dense attention with the same mask of tokens, head by head."""
    tokens, worst = mask.to_token_mask(), 0.0
    for head in range(q.shape[1]):
        scores = (q[0, head] @ k[0, head].T * WIDTH**-0.5).masked_fill(~tokens[0, head], -torch.inf)
        exact = scores.softmax(-1).nan_to_num(0) @ v[0, head]
        worst = max(worst, float((out[0, head] - exact).abs().max()))
    return worst


def random_mask(seed: int, work: Tensor) -> ColumnBlockMask:
    """Random blocks of the past per head, as many as `work` [H] pairs pay for on average."""
    generator, blocks = torch.Generator().manual_seed(seed), LENGTH // BLOCK
    share = work[:, None, None] / (LENGTH * (LENGTH + BLOCK) / 2)
    chosen = torch.rand(len(work), blocks, blocks, generator=generator) < share
    chosen = chosen & torch.ones(blocks, blocks).tril().bool()
    made = BlockMask.from_dense_blocks(
        chosen,
        full=chosen & ~torch.eye(blocks).bool(),
        rule=causal,
        block_size=BLOCK,
        q_len=LENGTH,
        kv_len=LENGTH,
    )
    return ColumnBlockMask.from_columns(made, torch.zeros(1, 1, 0, dtype=torch.long))


def best_mass(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    """The most attention [H] that any candidate of a kind keeps within the budget."""
    found = []
    for head in range(q.shape[1]):
        one_q, one_k, one_v = (x[:, head : head + 1] for x in (q, k, v))
        fitted = [
            fit_pattern(one_q, one_k, pattern, BUDGET, CONFIG)
            for pattern in CANDIDATES
            if pattern.kind == kind
        ]
        masks = [pattern_mask(one_q, one_k, [pattern], CONFIG) for pattern in set(fitted) if pattern]
        found.append(max(float(kept_mass(one_q, one_k, one_v, mask)) for mask in masks))
    return torch.tensor(found)


def measure(seed: int) -> Trial:
    """Search on one prompt, judge on another."""
    q, k, v, _ = draw_prompt(2 * seed)
    plan = search_patterns(q, k, v, CANDIDATES, BUDGET, config=CONFIG)
    frozen = MInferencePrefill(plan, CONFIG).mask(q, k, v)
    q, k, v, columns = draw_prompt(2 * seed + 1)
    prefill = MInferencePrefill(plan, CONFIG)
    mask = prefill.mask(q, k, v)
    mass, error = kept_mass(q, k, v, mask), dense_error(q, k, v, mask, prefill.attend(q, k, v, mask))
    flops = prefill_flops(mask, plan.patterns, WIDTH, CONFIG)[0] / BUDGET
    scaled = refit(q, k, plan)
    equal_mask = pattern_mask(q, k, scaled, CONFIG)
    equal = kept_mass(q, k, v, equal_mask)
    cost = float(prefill_flops(equal_mask, scaled, WIDTH, CONFIG).max()) / BUDGET
    recall = column_recall(q, k, plan, columns)
    by_kind = {kind: best_mass(q, k, v, kind) for kind in KINDS}
    random = kept_mass(q, k, v, random_mask(seed, mask.work()[0]))
    right = sum(pattern.kind == kind for pattern, kind in zip(plan.patterns, PLANTED, strict=True))
    always = float(by_kind["vertical_slash"][2])
    details = {
        "planted types found": float(right),
        "column recall": recall,
        "largest error against the dense mask": error,
        "most FLOPs over budget, scaled": cost,
        "random mask": float(random.mean()),
        **{f"FLOPs over budget, {kind}": float(x) for kind, x in zip(PLANTED, flops, strict=True)},
        **{f"mass, {kind}": float(x) for kind, x in zip(PLANTED, mass, strict=True)},
        **{f"mass at equal FLOPs, {kind}": float(x) for kind, x in zip(PLANTED, equal, strict=True)},
        **{
            f"{kind} on {head}": float(x)
            for kind in KINDS
            for head, x in zip(PLANTED, by_kind[kind], strict=True)
        },
        "frozen mask on vertical_slash": float(kept_mass(q, k, v, frozen)[0]),
    }
    conditions = {
        "planted types": right == len(PLANTED),
        "mass": float(mass.min()) >= 0.75 and float(equal.min()) >= 0.75,
        "FLOPs": cost <= 1 and float(flops.max()) <= 2,
        "columns": recall >= 0.95,
        "outputs": error <= 2e-5,
        "one pattern for all fails": always < 0.75,
        "random blocks fail": float(random.mean()) < 0.3,
    }
    return Trial(value=float(equal.min()), control=always, conditions=conditions, details=details)


def refit(q: Tensor, k: Tensor, plan: HeadPlan) -> list[Pattern]:
    """The plan's patterns scaled to the budget once more: how many blocks so many diagonals meet differs by prompt."""
    fitted = [
        fit_pattern(q[:, head : head + 1], k[:, head : head + 1], pattern, BUDGET, CONFIG)
        for head, pattern in enumerate(plan.patterns)
    ]
    return [pattern for pattern in fitted if pattern is not None]


def column_recall(q: Tensor, k: Tensor, plan: HeadPlan, columns: Tensor) -> float:
    """Planted columns of the first head that the index of its plan names."""
    if plan.patterns[0].kind != "vertical_slash":
        return 0.0
    n_v, n_s = plan.patterns[0].sizes
    found, _ = vertical_slash_index(q[:, :1], k[:, :1], n_v, n_s)
    return float(torch.isin(columns, found).float().mean())
