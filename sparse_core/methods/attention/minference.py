"""MInference 1.0 (arXiv 2407.02490): each head prefills with the sparse pattern that an offline search found to suit it.

A head keeps query i's key j if j is not in the future and, by its pattern,

    a_shape (sink, local)       j < sink  or  i - j < local
    vertical_slash (n_v, n_s)   j in columns  or  i - j in slashes
    block_sparse (top,)         the block of j is among the `top` of mean(q block) mean(k block)

where columns and slashes are the n_v and n_s of largest attention from the last 64 queries of this very prompt; the first
30 columns and the nearest 100 diagonals come first. The search scales every candidate to equal kernel FLOPs, and takes
the one whose output is nearest to dense attention. All heads of a plan run as one mask.

Without `causal` (ours) the queries that vote are spread evenly, offsets have a sign, and windows reach both ways.

Fidelity: adapted. Windows, sinks and slashes are rounded up to whole blocks of keys, since whole blocks are what a kernel
multiplies; these lie on a grid, where the paper's may begin anywhere. FLOPs here include those of finding the index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_core.attention import select
from sparse_core.attention.calibrate import check_model, model_hash, read_plan, write_plan
from sparse_core.attention.column_attention import column_block_attention
from sparse_core.attention.estimators import MeanPool, vertical_slash_scores
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.masks import BlockMask, ColumnBlockMask, causal
from sparse_core.registry import Method, Place, register

KINDS = {"a_shape": ("sink", "local"), "vertical_slash": ("vertical", "slash"), "block_sparse": ("top",)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """block: queries per block, and keys per block of block-sparse heads; slash_block: keys per block of slashes and
    windows; last_q queries vote; sink columns and local diagonals are forced; layers before starting_layer are dense;
    pattern: a kind of `KINDS` for heads without a plan, by which they keep a share of the keys, more where slashes are
    rounded up to blocks (a share of 0.25 is 0.6 of the pairs of 2000 random tokens); objective: what the search compares,
    outputs that are off by more than tolerance, or the attention that is lost."""

    block: int = 64
    slash_block: int = 16
    last_q: int = 64
    sink: int = 30
    local: int = 100
    starting_layer: int = 0
    pattern: str = "vertical_slash"
    share: float = 0.25
    objective: Literal["output", "mass"] = "output"
    tolerance: float = 5e-3
    causal: bool = True

    def __post_init__(self) -> None:
        for name in ("block", "slash_block"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two, got {size}")
        if self.last_q < 1 or min(self.sink, self.local, self.starting_layer) < 0:
            raise ValueError("last_q: expected at least 1, and sink, local, starting_layer 0 or more")
        if not 0 < self.share <= 1 or self.tolerance <= 0:
            raise ValueError(
                f"share, tolerance: expected within (0, 1] and above 0, got {self.share}, {self.tolerance}"
            )
        if self.pattern not in KINDS:
            raise ValueError(f"pattern: expected one of {', '.join(KINDS)}, got {self.pattern!r}")
        if self.objective not in ("output", "mass"):
            raise ValueError(f"objective: expected 'output' or 'mass', got {self.objective!r}")


@dataclass(frozen=True)
class Pattern:
    """What one head keeps: a kind of `KINDS` and its sizes, in tokens, for block_sparse in blocks."""

    kind: str
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise KeyError(f"pattern: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if len(self.sizes) != len(KINDS[self.kind]) or min(self.sizes) < 0 or max(self.sizes) < 1:
            raise ValueError(f"{self.kind}: expected {' and '.join(KINDS[self.kind])}, got {self.sizes}")
        if not all(isinstance(size, int) for size in self.sizes):
            raise ValueError(f"{self.kind}: expected whole sizes, got {self.sizes}")

    def scaled(self, largest: int) -> Pattern:
        """The same proportions with `largest` as the largest size."""
        return Pattern(self.kind, tuple(round(size * largest / max(self.sizes)) for size in self.sizes))


CANDIDATES = (
    Pattern("a_shape", (100, 800)),
    *(
        Pattern("vertical_slash", sizes)
        for sizes in ((30, 800), (100, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096))
    ),
    Pattern("block_sparse", (100,)),
)


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """The pattern of every query head of a layer, what the search measured of it, and the hash of the model, or ""."""

    patterns: tuple[Pattern, ...]
    scores: tuple[float, ...]
    model: str = ""

    def __post_init__(self) -> None:
        if not self.patterns or len(self.scores) != len(self.patterns):
            raise ValueError(
                f"patterns, scores: expected one of each per head, got {len(self.patterns)} and {len(self.scores)}"
            )

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, {head: [kind, size, size, score]}, whole or not at all."""
        heads = {
            str(head): [pattern.kind, *pattern.sizes, *(0,) * (2 - len(pattern.sizes)), score]
            for head, (pattern, score) in enumerate(zip(self.patterns, self.scores, strict=True))
        }
        return write_plan(path, {"model": self.model, "heads": heads})

    @classmethod
    def load(cls, path: str | Path) -> HeadPlan:
        """Read a plan. Raises ValueError naming the file where it is none, KeyError for a pattern that there is not."""
        rows, model = read_plan(path, "head plan", _read_heads)
        patterns = tuple(Pattern(kind, sizes) for kind, sizes, _ in rows)
        return cls(patterns=patterns, scores=tuple(score for _, _, score in rows), model=model)

    def validate(self, model: nn.Module) -> None:
        """ValueError where the plan was made for another model."""
        check_model(self.model, model)


def _read_heads(data: dict[str, Any]) -> tuple[list[tuple[str, tuple[int, ...], float]], str]:
    """Kind, sizes and score of every head in order, and the model, of what `HeadPlan.save` wrote; an unknown kind is left
    to `Pattern`."""
    heads, rows = data["heads"], []
    order = sorted(heads, key=int)
    if not order or order != [str(head) for head in range(len(order))]:
        raise ValueError(f"heads {', '.join(order) or 'none'} instead of 0, 1, ..")
    for head in order:
        kind, first, second, score = heads[head]
        sizes = (first, second)[: len(KINDS.get(kind, ()))]
        if kind in KINDS:
            Pattern(kind, sizes)
        rows.append((kind, sizes, float(score)))
    return rows, data["model"]


def vertical_slash_index(
    q: Tensor, k: Tensor, n_v: int, n_s: int, last_q: int = 64, *, sink: int = 30, local: int = 100, causal: bool = True
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Columns [B, Hq, n] and diagonals [B, Hq, m] (query minus key) of q [B, Hq, T, D] over k [B, Hkv, T, D], int64.

    The first `sink` columns and the nearest `local` diagonals come first, then those with most of the attention of the
    last `last_q` queries. At least `sink` columns and half of `local` diagonals; where n_v + n_s is T or more, which
    costs as much as dense attention, all diagonals.
    """
    length, device = k.shape[2], q.device
    votes = min(last_q, length)
    rows = torch.arange(votes, device=device)
    rows = rows + length - votes if causal else (2 * rows + 1) * length // (2 * votes)
    vertical, slash = vertical_slash_scores(q, k, rows, causal=causal)
    offsets = torch.arange(slash.shape[-1], device=device) - (slash.shape[-1] - length)
    near = offsets.abs().argsort(stable=True)  # so that of equal scores the nearer diagonal wins
    forced = offsets[near].abs() < (local if causal else -(-local // 2))
    vertical = vertical.masked_fill(torch.arange(length, device=device) < sink, torch.inf)
    slash = slash[..., near].masked_fill(forced, torch.inf)
    n_v, n_s = max(n_v, sink), max(n_s, local // 2)
    n_s = n_s if n_v + n_s < length else len(offsets)
    columns, diagonals = (x.sort(dim=-1, descending=True, stable=True).indices for x in (vertical, slash))
    return columns[..., :n_v], offsets[near][diagonals[..., :n_s]]


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """First and last tokens of the query blocks [Kq, 1] and of the key blocks [Kk]."""

    i0: Tensor
    i1: Tensor
    j0: Tensor
    j1: Tensor
    size: tuple[int, int]

    @classmethod
    def make(cls, length: int, config: Config, device: torch.device) -> _Grid:
        size = (config.block, min(config.block, config.slash_block))
        i0, j0 = (torch.arange(0, length, n, device=device) for n in size)
        i1, j1 = ((x + n - 1).clamp_max(length - 1) for x, n in zip((i0, j0), size, strict=True))
        return cls(i0=i0[:, None], i1=i1[:, None], j0=j0, j1=j1, size=size)

    def meets(self, diagonals: Tensor, length: int) -> Tensor:
        """bool [B, H, Kq, Kk]: blocks that one of diagonals [B, H, m] passes through."""
        on = torch.zeros(*diagonals.shape[:2], 2 * length, device=diagonals.device, dtype=torch.int32)
        before = on.scatter_(-1, diagonals + length, 1).cumsum(-1)  # at s + T: diagonals of offset s or less
        return before[..., self.i1 - self.j0 + length] > before[..., self.i0 - self.j1 + length - 1]


def pattern_mask(q: Tensor, k: Tensor, patterns: Sequence[Pattern], config: Config) -> ColumnBlockMask:
    """The mask of all heads of q [B, Hq, T, D] over k [B, Hkv, T, D], each with its pattern."""
    (b, heads, length, _), device = q.shape, q.device
    grid = _Grid.make(length, config, device)
    blocks = torch.zeros(b, heads, len(grid.i0), len(grid.j0), dtype=torch.bool, device=device)
    columns = torch.full((b, heads, 0), -1, device=device)
    for pattern in dict.fromkeys(patterns):
        own = [head for head, other in enumerate(patterns) if other == pattern]
        near_q, near_k = q[:, own], k[:, [head // (heads // k.shape[1]) for head in own]]
        if pattern.kind == "a_shape":
            gap = torch.maximum(grid.i0 - grid.j1, grid.j0 - grid.i1).clamp_min(0)
            blocks[:, own] = (gap < pattern.sizes[1]) | (grid.j0 < pattern.sizes[0])
        elif pattern.kind == "block_sparse":
            blocks[:, own] = _top_blocks(near_q, near_k, pattern.sizes[0], grid, config.causal)
        else:
            (n_v, n_s), forced = pattern.sizes, {"sink": config.sink, "local": config.local}
            found, diagonals = vertical_slash_index(
                near_q, near_k, n_v, n_s, config.last_q, causal=config.causal, **forced
            )
            blocks[:, own] = grid.meets(diagonals, length)
            spare = found.shape[-1] - columns.shape[-1]
            columns = nn.functional.pad(columns, (0, max(0, spare)), value=-1)
            columns[:, own, : found.shape[-1]] = found
    return _assemble(blocks, columns, grid, length, config.causal)


def _top_blocks(q: Tensor, k: Tensor, top: int, grid: _Grid, is_causal: bool) -> Tensor:
    """bool [B, H, Kq, Kk]: the key blocks of highest mean product, on the grid."""
    block, fine = grid.size
    scores = MeanPool(block).score(q, k)
    if is_causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf
        )
    return select.topk(scores, top).repeat_interleave(block // fine, -1)[..., : len(grid.j0)]


def _assemble(blocks: Tensor, columns: Tensor, grid: _Grid, length: int, is_causal: bool) -> ColumnBlockMask:
    """One mask of all heads."""
    sizes = {"block_size": grid.size, "q_len": length, "kv_len": length}
    if not is_causal:
        return ColumnBlockMask.from_columns(BlockMask.from_dense_blocks(blocks, **sizes), columns)
    past, full = grid.j0 <= grid.i1, grid.j1 <= grid.i0
    made = BlockMask.from_dense_blocks(blocks & past, full=full.expand_as(blocks), rule=causal, **sizes)
    listed, whole = (columns[:, :, None] <= row for row in (grid.i1, grid.i0))
    return ColumnBlockMask.from_columns(made, columns, listed=listed, full=whole)


def prefill_flops(mask: ColumnBlockMask, patterns: Sequence[Pattern], width: int, config: Config) -> Tensor:
    """Floating-point operations [B, Hq] of the kernels and of finding the index, a multiply-add being two."""
    blocks = mask.blocks.shape[2]
    votes = {"vertical_slash": min(config.last_q, mask.q_len) * mask.kv_len, "block_sparse": blocks**2}
    index = torch.tensor([votes.get(pattern.kind, 0) for pattern in patterns], device=mask.columns.device)
    return 4.0 * width * mask.work() + 2.0 * width * index


def fit_pattern(
    q: Tensor, k: Tensor, pattern: Pattern, flops_budget: float, config: Config
) -> Pattern | None:
    """The largest pattern of these proportions that costs one head of q and k [B, 1, T, D] at most `flops_budget`, on
    average over B; None where even the smallest costs more."""

    def fits(largest: int) -> bool:
        chosen = [pattern.scaled(largest)]
        cost = prefill_flops(pattern_mask(q, k, chosen, config), chosen, q.shape[-1], config)
        return float(cost.mean()) <= flops_budget

    low, high = 0, -(-q.shape[2] // config.block) if pattern.kind == "block_sparse" else q.shape[2]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return pattern.scaled(low) if low else None


@torch.no_grad()
def search_patterns(
    q: Tensor, k: Tensor, v: Tensor, candidates: Sequence[Pattern], flops_budget: float, *,
    config: Config | None = None, model: nn.Module | None = None,
) -> HeadPlan:  # fmt: skip
    """The plan of one layer from its q [B, Hq, T, D] and k, v [B, Hkv, T, D] over a long text; `model` signs it.

    Every candidate is scaled to `flops_budget` floating-point operations per head and sample, and run; of equal ones the
    earlier wins. Raises ValueError where no candidate can be made so small.
    """
    _check_groups(q, k)
    settings, patterns, scores = config or Config(), [], []
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        one_q, one_k, one_v = (
            x[:, h : h + 1] for x, h in ((q, head), (k, head // group), (v, head // group))
        )
        exact = _run(one_q, one_k, one_v, Pattern("a_shape", (q.shape[2], q.shape[2])), settings)
        fitted = [fit_pattern(one_q, one_k, pattern, flops_budget, settings) for pattern in candidates]
        tried = [
            (_loss(_run(one_q, one_k, one_v, pattern, settings), exact, settings), order, pattern)
            for order, pattern in enumerate(dict.fromkeys(fitted))
            if pattern is not None
        ]
        if not tried:
            raise ValueError(f"flops_budget: expected enough for a candidate, got {flops_budget:g}; raise it")
        score, _, best = min(tried, key=lambda found: found[:2])
        patterns.append(best)
        scores.append(score)
    signed = model_hash(model) if model is not None else ""
    return HeadPlan(patterns=tuple(patterns), scores=tuple(scores), model=signed)


def _check_groups(q: Tensor, k: Tensor) -> None:
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"heads: expected a multiple of the {k.shape[1]} key-value heads, got {q.shape[1]} query heads"
        )


def _run(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, config: Config) -> tuple[Tensor, Tensor]:
    return column_block_attention(q, k, v, pattern_mask(q, k, [pattern], config), return_lse=True)  # type: ignore[return-value]


def _loss(ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], config: Config) -> float:
    if config.objective == "mass":  # what is kept is the ratio of the two sums of exponentials
        return float(1 - (ours[1] - exact[1]).exp().mean())
    return float(((ours[0] - exact[0]).abs() > config.tolerance).float().mean())


def usual_pattern(config: Config, length: int) -> Pattern:
    """What a head without a plan keeps of `length` tokens: the config's share of them, in the proportions that the paper's
    code falls back to, or of their blocks."""
    if config.pattern == "block_sparse":
        return Pattern("block_sparse", (math.ceil(config.share * -(-length // config.block)),))
    first, second = {"vertical_slash": (1000, 6096), "a_shape": (1024, 4096)}[config.pattern]
    second = math.ceil(config.share * length * second / (first + second))
    return Pattern(config.pattern, (max(0, math.ceil(config.share * length) - second), second))


def _check_heads(plan: HeadPlan | None, heads: int) -> None:
    if plan is not None and len(plan.patterns) != heads:
        raise ValueError(
            f"plan: expected one pattern for each of the {heads} heads, got {len(plan.patterns)}; search again"
        )


def _planned(config: Config, plan: HeadPlan | None, place: Place) -> MInferencePrefill:
    _check_heads(plan, place.heads)
    return MInferencePrefill(plan, config, layer=place.index)


class MInferencePrefill(AttentionLayer):
    """Prefill of a layer by its plan; without one every head has the config's pattern, vertical and slash unless said
    otherwise, as in the paper's code.

    layer: the place of this layer in its model, for `starting_layer`. The index is found anew for every prompt.
    """

    def __init__(
        self, plan: HeadPlan | None = None, config: Config | None = None, *, layer: int | None = None
    ):
        super().__init__()
        self.plan, self.config, self.layer = plan, config or Config(), layer

    @torch.no_grad()
    def mask(self, q: Tensor, k: Tensor, v: Tensor) -> ColumnBlockMask:
        """The mask of this prompt; no gradient flows through the choice."""
        heads, length = q.shape[1:3]
        if k.shape[2] != length:
            raise ValueError(
                f"k: expected as many keys as the {length} queries of a prompt, got {k.shape[2]}"
            )
        _check_groups(q, k)
        _check_heads(self.plan, heads)
        return pattern_mask(q, k, self._patterns(heads, length), self.config)

    def _patterns(self, heads: int, length: int) -> tuple[Pattern, ...]:
        if self.layer is not None and self.layer < self.config.starting_layer:
            return (Pattern("a_shape", (length, length)),) * heads
        if self.plan is not None:
            return self.plan.patterns
        return (usual_pattern(self.config, length),) * heads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: ColumnBlockMask) -> Tensor:
        """[B, Hq, T, D]."""
        return column_block_attention(q, k, v, mask)  # type: ignore[return-value]


METHOD = register(
    Method(
        name="attention/minference",
        paper="2407.02490",
        fidelity="adapted",
        config=Config,
        kind="prefill",
        make=lambda config, plan=None, **options: MInferencePrefill(plan, config, **options),
        layer=lambda config, heads, kv_heads, width: MInferencePrefill(None, config),
        needs=("search",),
        without="vertical and slash in every head, share of the keys",
        plan=HeadPlan,
        planned=_planned,
    )
)
