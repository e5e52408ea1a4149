"""Combiner (arXiv 2107.05768): every query reaches every key, near ones directly, far ones through summaries of regions.

For row i with direct keys O0 and regions O1, O2, .. that partition the rest of what it may see,

    p(j | i) = exp(q_i k_j) / Z_i                            for j in O0
    p(r | i) = exp(q_i kbar_r) / Z_i,  p(j | r) = softmax over j in r of qbar_r k_j,
    out_i    = sum over O0 of p v_j + sum over r of p(r | i) vbar_r,  vbar_r = sum over j in r of p(j | r) v_j,

where one Z_i sums both kinds, and qbar, kbar pool the region. Variants: `fixed`, segments of b tokens, direct inside the
own one, O(T (b + T / b)); `logsparse`, aligned regions of length 1, 2, 4, .., O(T log T); `axial`, on a grid: direct are
the own row and column, regions the other columns above (and, looking ahead, below), or with `axial="rows"` direct is the
own row and regions are the other rows, or with `mixture` one half of the heads does this and the other half that.

Not a drop-in for trained weights: a region of n equal keys weighs exp(s) instead of n exp(s); `log_count_bias` adds log n
and makes such regions exact.

Fidelity: adapted. The axial partition is ours, and the paper's logsparse regions are not aligned. A learned pool is a
DeepSet, to which the pooled tokens are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparse_core import counters
from sparse_core.attention.estimators import share_heads
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.merge import attend_part, merge_lse
from sparse_core.registry import Method, configure, register

Pool = Callable[[Tensor, Tensor], Tensor]
"""Of x [.., n, D] and which tokens there are, bool [.., n]: one vector per region, [.., D]."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """segment: tokens per region of `fixed`, about sqrt(T) when None; strict: refuse a length that segments do not divide
    instead of leaving the last one ragged; grid (rows, columns) of `axial`, axial: its regions, columns, rows or mixture.
    pool: of `POOLS`, or deepset for a learned one by the mean, deepset-max or deepset-sum by another."""

    variant: str = "fixed"
    segment: int | None = None
    pool: str = "max"
    causal: bool = True
    grid: tuple[int, int] | None = None
    log_count_bias: bool = False
    strict: bool = False
    axial: str = "columns"

    def __post_init__(self) -> None:
        if self.variant not in ("fixed", "logsparse", "axial"):
            raise ValueError(f"variant: expected fixed, logsparse or axial, got {self.variant!r}")
        if self.pool not in (*POOLS, *LEARNED):
            raise ValueError(f"pool: expected {', '.join((*POOLS, *LEARNED))}, got {self.pool!r}")
        if self.axial not in ("columns", "rows", "mixture"):
            raise ValueError(f"axial: expected columns, rows or mixture, got {self.axial!r}")
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"segment: expected at least one token, got {self.segment}")
        if self.variant == "logsparse" and not self.causal:
            raise ValueError(
                "variant: expected a causal logsparse, got one that looks ahead; take fixed or axial"
            )


def _max(x: Tensor, there: Tensor) -> Tensor:
    return x.masked_fill(~there[..., None], -torch.inf).amax(-2).nan_to_num(neginf=0.0)


def _sum(x: Tensor, there: Tensor) -> Tensor:
    return (x * there[..., None]).sum(-2)


def _mean(x: Tensor, there: Tensor) -> Tensor:
    return _sum(x, there) / there.sum(-1, keepdim=True).clamp_min(1)


PLAIN: dict[str, Pool] = {"max": _max, "mean": _mean, "sum": _sum}
POOLS: dict[str, Pool] = PLAIN | {
    f"relu-{name}": lambda x, there, pool=pool: pool(x.relu(), there) for name, pool in PLAIN.items()
}
LEARNED = {"deepset": "mean", **{f"deepset-{name}": name for name in PLAIN}}


def combiner_attention(
    q: Tensor, k: Tensor, v: Tensor, variant: str = "fixed", segment: int | None = None, pool: str = "max",
    causal: bool = True, grid: tuple[int, int] | None = None, *, pools: tuple[Pool, Pool] | None = None,
    key_padding_mask: Tensor | None = None, **config: object,
) -> Tensor:  # fmt: skip
    """[B, H, T, D] of q, k, v of that shape; what else is given are the other fields of `Config`, `pools` for queries and
    keys. key_padding_mask: bool [B, T], True for tokens that are not there; nobody sees them, and they get 0."""
    given = {"variant": variant, "segment": segment, "pool": pool, "causal": causal, "grid": grid}
    settings = configure(Config, {**given, **config})
    if not q.shape == k.shape == v.shape[:3] + q.shape[3:]:
        raise ValueError(
            f"q, k, v: expected one [B, H, T, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; "
            "repeat shared heads"
        )
    if pools is None:
        if settings.pool in LEARNED:
            raise ValueError(
                f"pool: expected learned pools for {settings.pool}, got none; use the module Combiner"
            )
        pools = (POOLS[settings.pool], POOLS[settings.pool])
    attend = {"fixed": _fixed, "logsparse": _logsparse, "axial": _axial}[settings.variant]
    scaled, dtype = q.float() * q.shape[-1] ** -0.5, q.dtype
    if key_padding_mask is None:
        there = torch.ones(1, 1, q.shape[2], dtype=torch.bool, device=q.device)
        return attend(settings, scaled, k.float(), v.float(), there, pools).to(dtype)
    there = _present(key_padding_mask, q)
    # What is not there may hold anything, also NaN, of which nothing may reach a sum.
    q, k, v = (x.masked_fill(~there[..., None], 0) for x in (scaled, k.float(), v.float()))
    return attend(settings, q, k, v, there, pools).masked_fill(~there[..., None], 0).to(dtype)


def _present(key_padding_mask: Tensor, q: Tensor) -> Tensor:
    """Which tokens there are, bool [B, 1, T]."""
    if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"key_padding_mask: expected bool [{q.shape[0]}, {q.shape[2]}], got {key_padding_mask.dtype} "
            f"{list(key_padding_mask.shape)}"
        )
    return ~key_padding_mask[:, None]


def effective_attention(q: Tensor, k: Tensor, **config: object) -> Tensor:
    """The attention matrix [B, H, T, T] that results. For tests and pictures: it is as large as dense attention."""
    length = q.shape[2]
    values = torch.eye(length, device=q.device).expand(*q.shape[:2], -1, -1)
    return combiner_attention(q, k, values, **config)  # type: ignore[arg-type]


def _summaries(
    q: Tensor, k: Tensor, v: Tensor, there: Tensor, pools: tuple[Pool, Pool]
) -> tuple[Tensor, Tensor]:
    """kbar and vbar [.., D] of regions of n tokens [.., n, D]; regions without any token give 0."""
    qbar, kbar = pools[0](q, there), pools[1](k, there)
    scores = (qbar[..., None, :] @ k.mT).masked_fill(~there[..., None, :], -torch.inf)
    return kbar, attend_part(scores, v)[0][..., 0, :]


def _bias(config: Config, there: Tensor) -> Tensor:
    """What is added to the score of regions there [.., n]: -inf where they hold no token, and log n if asked."""
    count = there.sum(-1)
    bias = count.clamp_min(1).log() if config.log_count_bias else torch.zeros_like(count, dtype=torch.float32)
    return bias.masked_fill(count == 0, -torch.inf)


def _count(products: int, width: int) -> None:
    """Every product has its share in a sum of values."""
    counters.add(products=products, multiply_adds=2 * products * width)


def _fixed(
    config: Config, q: Tensor, k: Tensor, v: Tensor, there: Tensor, pools: tuple[Pool, Pool]
) -> Tensor:
    """Every function of a variant: there, bool [B or 1, 1, T], says which tokens there are; q is scaled already."""
    length = q.shape[2]
    b = min(length, config.segment or max(1, round(math.sqrt(length))))
    spare = -length % b
    if spare and config.strict:
        raise ValueError(f"segment: expected one that divides {length} tokens, got {b}; set strict=False")
    q, k, v = (nn.functional.pad(x, (0, 0, 0, spare)).unflatten(2, (-1, b)) for x in (q, k, v))
    there = nn.functional.pad(there, (0, spare)).unflatten(2, (-1, b))
    segments = there.shape[2]
    near = there[..., None, :] & (torch.ones(b, b, device=q.device).tril().bool() if config.causal else True)
    direct = attend_part((q @ k.mT).masked_fill(~near, -torch.inf), v)
    kbar, vbar = _summaries(q, k, v, there, pools)
    own, other = torch.arange(segments, device=q.device)[:, None], torch.arange(segments, device=q.device)
    seen = other < own if config.causal else other != own
    far = (q.flatten(2, 3) @ kbar.mT + _bias(config, there)[..., None, :]).unflatten(2, (-1, b))
    regions = attend_part(far.masked_fill(~seen[:, None], -torch.inf), vbar[:, :, None])
    # The 1: in the summary of its region every key meets one query.
    _count(q.shape[0] * q.shape[1] * (length + spare) * (b + segments + 1), q.shape[-1])
    return merge_lse([direct, regions])[0].flatten(2, 3)[:, :, :length]


def _logsparse(
    config: Config, q: Tensor, k: Tensor, v: Tensor, there: Tensor, pools: tuple[Pool, Pool]
) -> Tensor:
    """Row i: itself directly, and for every bit l of i that is set the aligned region of 2^l tokens that ends there."""
    length, device = q.shape[2], q.device
    levels = max(0, length - 1).bit_length()
    full = 2**levels
    padded = [nn.functional.pad(x, (0, 0, 0, full - length)) for x in (q, k, v)]
    present = nn.functional.pad(there, (0, full - length))
    row = torch.arange(length, device=device)
    scores, values = [(q * k).sum(-1)], [v]
    for level in range(levels):
        near = [x.unflatten(2, (-1, 2**level)) for x in padded]
        inside = present.unflatten(2, (-1, 2**level))
        kbar, vbar = _summaries(near[0], near[1], near[2], inside, pools)
        region = (row >> level) - 1
        used = ((row >> level) & 1).bool()
        score = (q * kbar[:, :, region.clamp_min(0)]).sum(-1)
        score = score + _bias(config, inside)[..., region.clamp_min(0)]
        scores.append(score.masked_fill(~used, -torch.inf))
        values.append(vbar[:, :, region.clamp_min(0)])
    _count(q.shape[0] * q.shape[1] * (length * (levels + 1) + full * levels), q.shape[-1])
    weights = torch.stack(scores, -1).softmax(-1)
    return (weights[..., None, :] @ torch.stack(values, -2))[..., 0, :]


def _axial(
    config: Config, q: Tensor, k: Tensor, v: Tensor, there: Tensor, pools: tuple[Pool, Pool]
) -> Tensor:
    """On a grid: by columns, by rows, or half of the heads, rounded up, by each."""
    if config.grid is None or math.prod(config.grid) != q.shape[2]:
        raise ValueError(f"grid: expected rows times columns to be {q.shape[2]} tokens, got {config.grid}")
    heads = {"columns": q.shape[1], "rows": 0, "mixture": -(-q.shape[1] // 2)}[config.axial]
    parts = []
    if heads:
        parts.append(_columns(config, q[:, :heads], k[:, :heads], v[:, :heads], there, pools))
    if heads < q.shape[1]:
        by_rows = replace(config, segment=config.grid[1])
        parts.append(_fixed(by_rows, q[:, heads:], k[:, heads:], v[:, heads:], there, pools))
    return torch.cat(parts, 1)


def _columns(
    config: Config, q: Tensor, k: Tensor, v: Tensor, there: Tensor, pools: tuple[Pool, Pool]
) -> Tensor:
    """The own row and column directly, the other columns as regions."""
    assert config.grid is not None
    rows, columns = config.grid
    q, k, v = (x.unflatten(2, (rows, columns)) for x in (q, k, v))
    device, there = q.device, there.unflatten(2, (rows, columns))
    along, above = (torch.ones(n, n, device=device, dtype=torch.bool) for n in (columns, rows))
    near = there[..., None, :] & (along.tril() if config.causal else along)
    parts = [attend_part((q @ k.mT).masked_fill(~near, -torch.inf), v)]
    down = [x.transpose(2, 3) for x in (q, k, v)]
    beyond = above.tril(-1) if config.causal else ~torch.eye(rows, dtype=torch.bool, device=device)
    standing = there.mT[..., None, :]  # [B, 1, columns, 1, rows]
    column = attend_part((down[0] @ down[1].mT).masked_fill(~(standing & beyond), -torch.inf), down[2])
    parts.append((column[0].transpose(2, 3), column[1].transpose(2, 3)))
    other = ~torch.eye(columns, dtype=torch.bool, device=device)
    sides = [above.tril(-1)] if config.causal else [above.tril(-1), above.triu(1)]
    for side in sides:
        # A region per (row, column): the tokens of that column above the row, or below it.
        inside = standing & side  # [B, 1, columns, rows, rows]
        apart = [x[:, :, :, None].expand(-1, -1, -1, rows, -1, -1) for x in down]
        kbar, vbar = _summaries(apart[0], apart[1], apart[2], inside, pools)  # [B, H, columns, rows, D]
        score = q @ kbar.transpose(2, 3).mT + _bias(config, inside).mT[..., None, :]
        parts.append(attend_part(score.masked_fill(~other, -torch.inf), vbar.transpose(2, 3)))
    _count(q.shape[0] * q.shape[1] * rows * columns * (rows + columns) * (1 + len(sides)), q.shape[-1])
    return merge_lse(parts)[0].flatten(2, 3)


class DeepSet(nn.Module):
    """A learned pool: a small network of every token, pooled, and another of what that gives; it starts as the plain pool
    of the tokens, the mean unless said otherwise."""

    def __init__(self, width: int, pool: str = "mean"):
        super().__init__()
        self.pool = pool
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        """[.., n, D] and bool [.., n] -> [.., D]."""
        pool = PLAIN[self.pool]
        return pool(x, there) + self.outer(pool(self.inner(x), there))


class Combiner(AttentionLayer):
    """Combiner attention of heads of `width` channels; with pool `deepset` it has weights of its own."""

    def __init__(self, config: Config | None = None, width: int = 0):
        super().__init__()
        self.config = config or Config()
        learned = LEARNED.get(self.config.pool)
        if learned and width < 1:
            raise ValueError(f"width: expected the channels per head for a deepset pool, got {width}")
        self.pools = nn.ModuleList(DeepSet(width, learned) for _ in range(2)) if learned else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: None = None, *, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """[B, H, T, D] of k, v [B, Hkv, T, D]; every token that is there is attended to, so there is no mask. Shared heads
        are repeated, since the summary of a region depends on the queries of each head."""
        pools = None if self.pools is None else (self.pools[0], self.pools[1])
        k, v = share_heads(k, q.shape[1]), share_heads(v, q.shape[1])
        return combiner_attention(
            q, k, v, pools=pools, key_padding_mask=key_padding_mask, **vars(self.config)
        )


METHOD = register(
    Method(
        name="attention/combiner",
        paper="2107.05768",
        fidelity="adapted",
        config=Config,
        kind="train",
        make=Combiner,
        layer=lambda config, heads, kv_heads, width: Combiner(config, width),
        needs=("training",),
    )
)
