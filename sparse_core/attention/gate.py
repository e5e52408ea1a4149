"""A learned estimator: a gate that sees blocks of queries and keys and says where attention will lie (SeerAttention,
arXiv 2410.13276, and for decoding SeerAttention-R, arXiv 2506.08889)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_core import counters
from sparse_core.attention import select
from sparse_core.attention.estimators import Pool, pool_blocks, share_heads
from sparse_core.attention.masks import BlockMask, causal

Selection = Literal["threshold", "ratio", "budget"]
Pools = tuple[Pool, ...]


class BlockGate(nn.Module):
    """Logits [B, Hq, K, K] of q [B, Hq, T, D] and k [B, Hkv, T, D], and the mask that they select.

    block: tokens, a power of two. q_pool, k_pool: what is kept of a block. rope: base of a rotary embedding by the place
    of a block's first token; q and k come without any. condition: channels of an embedding of, say, the diffusion step.
    Without `q_pool` it is a gate for decoding: all query heads of a group share it, and logits [B, Hkv, T, K] tell for
    every token which whole blocks before it matter. Raises ValueError for what does not fit.
    """

    def __init__(
        self, q_heads: int, kv_heads: int, head_dim: int, block: int = 64, gate_dim: int = 128,
        q_pool: Pools = ("avg",), k_pool: Pools = ("max", "min", "avg"), rope: float | None = None, *,
        causal: bool = True, condition: int = 0, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        check_options(block, gate_dim, q_pool, k_pool, rope, causal, condition)
        if min(q_heads, kv_heads, head_dim) < 1 or q_heads % kv_heads:
            raise ValueError(
                "q_heads, kv_heads, head_dim: expected at least 1 each and key-value heads that divide the others, got "
                f"{q_heads}, {kv_heads}, {head_dim}"
            )
        if rope is not None and head_dim % 2:
            raise ValueError(f"head_dim: expected an even number with a rotary embedding, got {head_dim}")
        self.q_heads, self.kv_heads, self.head_dim, self.block = q_heads, kv_heads, head_dim, block
        self.gate_dim, self.q_pool, self.k_pool, self.rope = gate_dim, tuple(q_pool), tuple(k_pool), rope
        self.causal, self.condition = causal, condition
        heads, inner = (q_heads, len(q_pool)) if q_pool else (kv_heads, q_heads // kv_heads)
        generator = torch.Generator().manual_seed(seed)
        self.w_q = _weights(heads, head_dim * inner, gate_dim, generator)
        self.w_k = _weights(kv_heads, head_dim * len(k_pool), gate_dim, generator)
        # Zeros: the embedding changes nothing until it is learned.
        self.w_condition = (
            nn.Parameter(torch.zeros(heads, condition, head_dim * inner)) if condition else None
        )

    def settings(self) -> dict[str, Any]:
        """What the weights only mean something with, as JSON has it."""
        names = ("q_heads", "kv_heads", "head_dim", "block", "gate_dim", "rope", "causal", "condition")
        pools = {"q_pool": list(self.q_pool), "k_pool": list(self.k_pool)}
        return {name: getattr(self, name) for name in names} | pools

    def queries(self, q: Tensor, first: int = 0, condition: Tensor | None = None) -> Tensor:
        """[B, Hq, K, Dg], or [B, Hkv, T, Dg] in decoding, of q whose first token stands at place `first`."""
        if self.q_pool:
            x, step = torch.cat([pool_blocks(q, self.block, kind) for kind in self.q_pool], -1), self.block
        else:
            x, step = q.float().unflatten(1, (self.kv_heads, -1)).transpose(2, 3).flatten(3), 1
        if self.w_condition is not None:
            if condition is None or condition.shape != (len(q), self.condition):
                got = "none" if condition is None else list(condition.shape)
                raise ValueError(f"condition: expected [{len(q)}, {self.condition}], got {got}")
            x = x + torch.einsum("bc,hcd->bhd", condition.float(), self.w_condition)[:, :, None]
        return self._project(x, self.w_q, first, step)

    def keys(self, k: Tensor, first: int = 0) -> Tensor:
        """[B, Hkv, K, Dg] of k whose first token stands at place `first`."""
        counters.add(kv_bytes=k.numel() * k.element_size())
        x = torch.cat([pool_blocks(k, self.block, kind) for kind in self.k_pool], -1)
        return self._project(x, self.w_k, first, self.block)

    def _project(self, x: Tensor, weight: Tensor, first: int, step: int) -> Tensor:
        counters.add(multiply_adds=x.numel() * weight.shape[-1])
        return rotate(x @ weight, first + step * torch.arange(x.shape[2], device=x.device), self.rope)

    def compare(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Logits [B, H, n, K] of the gate's queries and keys."""
        logits = queries @ share_heads(keys, queries.shape[1]).mT * self.gate_dim**-0.5
        counters.add(products=logits.numel(), multiply_adds=logits.numel() * self.gate_dim)
        return logits

    def forward(self, q: Tensor, k: Tensor, condition: Tensor | None = None) -> Tensor:
        """Logits, -inf for blocks that may not be seen."""
        if q.ndim != 4 or q.shape[1:2] + q.shape[3:] != (self.q_heads, self.head_dim):
            raise ValueError(f"q: expected [B, {self.q_heads}, T, {self.head_dim}], got {list(q.shape)}")
        if k.shape != (len(q), self.kv_heads, *q.shape[2:]):
            raise ValueError(f"k: expected {[len(q), self.kv_heads, *q.shape[2:]]}, got {list(k.shape)}")
        logits = self.compare(self.queries(q, condition=condition), self.keys(k))
        if not self.causal:
            return logits
        i, j = (torch.arange(n, device=q.device) for n in logits.shape[-2:])
        ahead = j > i[:, None] if self.q_pool else (j + 1) * self.block - 1 > i[:, None]
        return logits.masked_fill(ahead, -torch.inf)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """The logits, as a `MaskEstimator` gives them."""
        return self(q, k)

    def choose(self, logits: Tensor, selection: Selection, amount: float) -> Tensor:
        """bool of the shape of `logits`. threshold: blocks of more softmax weight than `amount`; ratio: as many of every
        row as give the mask this density; budget: as many as hold so many tokens, the best ones in both."""
        check_amount(selection, amount)
        if selection == "threshold":
            return select.threshold(
                logits.softmax(-1).nan_to_num(0), amount
            )  # NaN: a row of nothing but -inf
        if selection == "budget":
            return select.topk(logits, math.ceil(amount / self.block))
        # The best x K of K blocks in every row, fewer where fewer may be seen: 1 - (1 - x)^2 of a triangle.
        share = 1 - math.sqrt(1 - amount) if self.causal else amount
        return select.topk(logits, math.ceil(share * logits.shape[-1]))

    def to_mask(
        self, logits: Tensor, length: int, *, threshold: float | None = None, ratio: float | None = None,
        budget: float | None = None, dense_rows: int = 0,
    ) -> BlockMask:  # fmt: skip
        """The mask of logits [B, Hq, K, K] of `length` tokens by one of the rules of `choose`, with the diagonal and all
        of the last `dense_rows` rows. Raises ValueError for none or several rules, and blocks that do not fit."""
        given = {"threshold": threshold, "ratio": ratio, "budget": budget}
        rules = [(rule, amount) for rule, amount in given.items() if amount is not None]
        if len(rules) != 1:
            raise ValueError(f"threshold, ratio, budget: expected one of them, got {len(rules)}")
        blocks = -(-length // self.block)
        if logits.shape[-2:] != (blocks, blocks):
            raise ValueError(
                f"logits: expected {blocks} x {blocks} blocks for {length} tokens at block {self.block}, got "
                f"{logits.shape[-2]} x {logits.shape[-1]}; take those of a gate of pooled queries and this block"
            )
        diagonal = torch.eye(blocks, dtype=torch.bool, device=logits.device)
        chosen = self.choose(logits.detach(), *rules[0]) | diagonal  # type: ignore[arg-type]
        last = torch.arange(blocks, device=logits.device)[:, None] >= blocks - dense_rows
        chosen = chosen | (last & (logits > -torch.inf))
        return BlockMask.from_dense_blocks(
            chosen, full=chosen & ~diagonal if self.causal else None, rule=causal if self.causal else None,
            block_size=self.block, q_len=length, kv_len=length,
        )  # fmt: skip


def _weights(heads: int, inside: int, outside: int, generator: torch.Generator) -> nn.Parameter:
    """Xavier's uniform weights [H, in, out], head by head."""
    bound = math.sqrt(6 / (inside + outside))
    return nn.Parameter((torch.rand(heads, inside, outside, generator=generator) * 2 - 1) * bound)


def check_options(
    block: int, gate_dim: int, q_pool: Pools, k_pool: Pools, rope: float | None, causal: bool, condition: int
) -> None:
    """ValueError, in one sentence, for a gate that cannot be."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"block: expected a power of two, got {block}")
    if gate_dim < 1 or (rope is not None and gate_dim % 2):
        raise ValueError(f"gate_dim: expected at least 1, and even with a rotary embedding, got {gate_dim}")
    if not k_pool or not {*q_pool, *k_pool} <= {"avg", "max", "min"}:
        raise ValueError(f"q_pool, k_pool: expected some of avg, max and min, got {q_pool} and {k_pool}")
    if not q_pool and not causal:
        raise ValueError(
            "q_pool: expected a pool for a gate that looks ahead, got none; set causal=True to decode"
        )
    if condition < 0:
        raise ValueError(f"condition: expected 0 or more channels, got {condition}")


def check_amount(selection: str, amount: float) -> None:
    """ValueError, in one sentence, for a rule that cannot be."""
    if selection not in ("threshold", "ratio", "budget"):
        raise ValueError(f"selection: expected threshold, ratio or budget, got {selection!r}")
    if selection == "threshold" and not 0 <= amount < math.inf:
        raise ValueError(f"threshold: expected 0 or more, got {amount}")
    if selection == "ratio" and not 0 < amount <= 1:
        raise ValueError(f"ratio: expected more than 0 and at most 1, got {amount}")
    if selection == "budget" and not 1 <= amount < math.inf:
        raise ValueError(f"budget: expected at least one token, got {amount}")


def rotate(x: Tensor, places: Tensor, base: float | None) -> Tensor:
    """Rotary embedding of x [.., n, D] at `places` [n], channel c turning with c + D / 2; x itself without a base."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    angle = places[:, None] * base ** (-torch.arange(half, device=x.device) / half)
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)
