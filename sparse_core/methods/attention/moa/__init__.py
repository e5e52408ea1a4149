"""MoA, a mixture of attention spans (arXiv 2406.14909): every head gets a span of its own, which grows with the length.

A head looks at the first tokens and at the last alpha + beta N of N. What leaving out key j would cost query i is

    E_ij = A_ij / (1 - A_ij) (sum_n A_in G_in - G_ij),   G = dL/dA,

the change of the loss L when the rest of the row is renormalised: exact where L is linear in A. It is measured on a few
texts, of which only the response counts, and summed over blocks. The cost of a span is the sum over the blocks that it
leaves out, and an integer program picks a rule (alpha, beta) per head at the least cost within a density at every length.
With several lengths there is a cost at each: the plans are the Pareto set that bounding all but one of them in turn
finds, and the one with the least loss at a length that none was made for is taken.

Since dL/dA = dL/dO V^T, one backward pass serves all layers, and A and G only ever exist for some rows at a time. Spans
move block by block, so that attention, density and cost see the same mask. Density means pairs of a query and a key;
`measure="keys"` means the keys that a decoder holds, as in the paper's code. Heads are not permuted by span: the kernels
take each head's list as it is.

Fidelity: adapted. Without causality a span reaches both ways.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.masks import BlockMask, SpanPlan
from sparse_core.attention.span_cache import SpanKVCache
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.gather_decode import decode_attention
from sparse_core.methods.attention.moa.calibration import attention_influence, influence, response_loss
from sparse_core.methods.attention.moa.plan import (
    Plan,
    SpanRule,
    check_blocks,
    check_density,
    optimise_plan,
    rule_grid,
    select_plan,
)
from sparse_core.registry import Method, Place, register

__all__ = [
    "Config", "Plan", "SpanAttention", "SpanKVCache", "SpanRule", "UniformPlan", "attention_influence", "influence",
    "optimise_plan", "response_loss", "rule_grid", "select_plan",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Spans without a plan: the widest window, equal for all heads, within `density`; sink and block in tokens. A window
    has at least one block, so very short sequences are denser."""

    density: float = 0.5
    block: int = 64
    sink: int = 64
    causal: bool = True

    def __post_init__(self) -> None:
        check_density(self.density)
        check_blocks(self.block, self.sink)


class Spans(Protocol):
    """What knows the spans of a layer at a length."""

    def at(self, layer: int, length: int) -> SpanPlan: ...


@dataclass(frozen=True)
class UniformPlan:
    """One span for all heads and layers: at each length the widest of whole blocks within the density of the config."""

    config: Config
    heads: int

    def at(self, layer: int, length: int) -> SpanPlan:
        """The spans at a length, the same for every layer."""
        c = self.config

        def spans(blocks: int, heads: int = 1) -> SpanPlan:
            return SpanPlan.uniform(
                heads, sink=c.sink, window=blocks * c.block, unit=c.block, causal=c.causal
            )

        sizes = range(1, -(-length // c.block) + 1)
        count = bisect_right(sizes, c.density + 1e-9, key=lambda blocks: spans(blocks).density(length))
        return spans(max(1, count), self.heads)


class SpanAttention(AttentionLayer):
    """Attention of q [B, Hq, T, D] over k, v [B, Hkv, T, D] within the spans of one layer of a plan, for prefill and
    decoding. The plan's heads are those of the queries, or of the keys and values; ValueError where neither fits."""

    def __init__(self, plan: Spans, layer: int = 0):
        super().__init__()
        self.plan, self.layer = plan, layer
        self._masks: dict[tuple[int, int, int, str], BlockMask] = {}

    def mask(self, q: Tensor, k: Tensor, v: Tensor) -> BlockMask:
        """The mask of this length, made once."""
        key = (q.shape[1], q.shape[2], k.shape[2], str(q.device))
        if key not in self._masks:
            spans = self.plan.at(self.layer, k.shape[2])
            mask = spans.for_heads(q.shape[1]).to_block_mask(q.shape[2], k.shape[2], spans.unit)
            self._masks[key] = mask.to(q.device)
        return self._masks[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        """[B, Hq, T, D]."""
        return block_sparse_attention(q, k, v, mask)  # type: ignore[return-value]

    def cache(self, k: Tensor, length: int) -> SpanKVCache:
        """An empty cache for keys such as k [B, Hkv, T, D] with the spans of a sequence that will have `length` tokens."""
        return SpanKVCache(
            self.plan.at(self.layer, length),
            k.shape[0],
            k.shape[1],
            k.shape[3],
            dtype=k.dtype,
            device=k.device,
        )

    def decode(self, q1: Tensor, cache: SpanKVCache) -> Tensor:
        """[B, Hq, 1, D] of the newest token, whose key and value are in the cache already."""
        return decode_attention(q1, cache, cache.spans)  # type: ignore[return-value]


def _planned(config: Config, plan: Plan | None, place: Place) -> SpanAttention:
    """The spans of a place: its layer of the plan, or the only one. Raises ValueError where plan and place differ."""
    if plan is None:
        return SpanAttention(UniformPlan(config, place.heads))
    if len(plan.rules) not in (1, place.count):
        raise ValueError(
            f"plan: expected rules for one layer or for each of {place.count} attentions, got {len(plan.rules)} layers; "
            "choose those that it was made for by include"
        )
    if len(plan.rules[0]) not in (place.heads, place.kv_heads):
        heads = " or ".join(map(str, dict.fromkeys((place.heads, place.kv_heads))))
        raise ValueError(f"plan: expected rules for {heads} heads, got {len(plan.rules[0])}; calibrate again")
    if plan.causal != config.causal:
        raise ValueError(
            f"causal: expected {plan.causal}, as the plan was made, got {config.causal}; make it so"
        )
    if replace(config, causal=True) != Config():
        raise ValueError("plan: expected no density, block or sink beside it, got some; the plan has its own")
    return SpanAttention(plan, place.index if len(plan.rules) > 1 else 0)


METHOD = register(
    Method(
        name="attention/moa",
        paper="2406.14909",
        fidelity="adapted",
        config=Config,
        kind="prefill",
        make=lambda config, heads: SpanAttention(UniformPlan(config, heads)),
        layer=lambda config, heads, kv_heads, width: SpanAttention(UniformPlan(config, heads)),
        needs=("calibration",),
        without="one span for all heads, within density",
        plan=Plan,
        planned=_planned,
    )
)
