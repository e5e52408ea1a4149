"""SeerAttention (arXiv 2410.13276): a small learned gate sees blocks of queries and keys, and says where attention lies.

For blocks I and J of b tokens, per query head h and its key-value head g,

    Q_I = R_I W_q[h] [avg q],   K_J = R_J W_k[g] [max k; min k; avg k],   gate = softmax over J of Q_I K_J / sqrt(Dg),

pooled over the tokens of a block, before any rotary embedding; R rotates by the place of the block's first token. The gate
is distilled from the frozen model: 10 KL(P || gate), P the attention probabilities max-pooled over b x b and normalised by
row. Blocks above a threshold, or the best of every row, and the one on the diagonal are then attended to exactly.

For decoding (SeerAttention-R, arXiv 2506.08889) queries are not pooled (`q_pool=()`), all query heads of a group share a
gate, and a cache keeps K_J; the newest block is always on and prefill is dense.

The choice leaks when causal: a block's queries choose together, by their mean, so it depends on the later ones among them.

Fidelity: adapted. A gate may look ahead, and an embedding of the diffusion step may be added to its pooled queries; the
decoding gate learns from whole blocks alone, since its cache holds no others, and has no norms of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.gate import BlockGate, Pools, Selection, check_amount, check_options, rotate
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.masks import BlockMask, IndexMask, causal
from sparse_core.distill import distill, pooled_attention
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.gather_decode import decode_attention
from sparse_core.registry import Method, register

LOSS_SCALE = 10.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of `BlockGate`; selection and amount: a rule of `BlockGate.choose`; dense_rows: last query blocks that
    see everything. With `rope`, q and k come without a rotary embedding and the layer gives them theirs."""

    block: int = 64
    gate_dim: int = 128
    q_pool: Pools = ("avg",)
    k_pool: Pools = ("max", "min", "avg")
    rope: float | None = None
    causal: bool = True
    condition: int = 0
    seed: int = 0
    selection: Selection = "threshold"
    amount: float = 2e-3
    dense_rows: int = 0

    def __post_init__(self) -> None:
        check_options(**{key: x for key, x in self.of_gate().items() if key != "seed"})
        check_amount(self.selection, self.amount)
        if self.dense_rows < 0:
            raise ValueError(f"dense_rows: expected 0 or more, got {self.dense_rows}")

    def of_gate(self) -> dict[str, Any]:
        """What the gate is made with."""
        return {key: x for key, x in vars(self).items() if key not in ("selection", "amount", "dense_rows")}


def gate_truth(gate: BlockGate, q: Tensor, k: Tensor) -> Tensor:
    """Where dense attention of q [B, Hq, T, D] and k [B, Hkv, T, D] lies, in the shape of the gate's logits."""
    places = torch.arange(q.shape[2], device=q.device)
    q, k = rotate(q, places, gate.rope), rotate(k, places, gate.rope)
    if gate.q_pool:
        return pooled_attention(q, k, gate.block, causal=gate.causal)
    pooled = pooled_attention(q, k, (1, gate.block), causal=gate.causal)
    return pooled.unflatten(1, (gate.kv_heads, -1)).amax(2)


def gate_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """10 KL(truth || softmax of logits), the mean over rows; both [B, H, n, K], the truth in any scale. Blocks at -inf and
    rows of nothing else do not count."""
    seen = logits > -torch.inf
    rows = seen.any(-1)
    goal = truth.masked_fill(~seen, 0)
    goal = goal / goal.sum(-1, keepdim=True).clamp_min(1e-30)
    log_gate = logits.masked_fill(~rows[..., None], 0).log_softmax(-1).masked_fill(~seen, 0)
    divergence = (torch.xlogy(goal, goal) - goal * log_gate).sum()
    return LOSS_SCALE * divergence / rows.sum().clamp_min(1)


class SeerAttention(AttentionLayer):
    """Attention under the mask of a gate. Before `distill_gates` the gate knows nothing, and at the default threshold
    keeps nearly everything. While `dense` it attends to everything, as the teacher of its own gate."""

    def __init__(self, config: Config, heads: int, kv_heads: int, width: int):
        super().__init__()
        self.config, self.dense = config, False
        self.gate = BlockGate(heads, kv_heads, width, **config.of_gate())
        self._last: tuple[Tensor, Tensor, Tensor | None] | None = None

    @torch.no_grad()
    def mask(self, q: Tensor, k: Tensor, v: Tensor, condition: Tensor | None = None) -> BlockMask:
        """What the gate selects; everything while `dense`, and with a gate for decoding."""
        config, length = self.config, q.shape[2]
        if self.dense or not config.q_pool:
            return self._everything(length, q.device)
        rule: Any = {config.selection: config.amount}
        return self.gate.to_mask(self.gate(q, k, condition), length, dense_rows=config.dense_rows, **rule)

    def _everything(self, length: int, device: torch.device) -> BlockMask:
        blocks = -(-length // self.config.block)
        seen = torch.ones(blocks, blocks, dtype=torch.bool, device=device)
        make = partial(BlockMask.from_dense_blocks, block_size=self.config.block, q_len=length, kv_len=length)
        return make(seen.tril(), full=seen.tril(-1), rule=causal) if self.config.causal else make(seen)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        """[B, Hq, T, D]. Raises ValueError for a mask of another block."""
        block = self.config.block
        if mask.block_size != (block, block):
            raise ValueError(
                f"mask: expected blocks of {block} tokens, got {mask.block_size}; make it with this gate"
            )
        return block_sparse_attention(*self._rotated(q, k), v, mask)  # type: ignore[return-value]

    def _rotated(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(q.shape[2], device=q.device)
        return rotate(q, places, self.config.rope), rotate(k, places, self.config.rope)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, condition: Tensor | None = None, mask: BlockMask | None = None
    ) -> Tensor:
        """[B, Hq, T, D]; condition [B, C] where the gate has one; mask: one that `mask` made, instead of a new one."""
        given = None if condition is None else condition.detach()
        self._last = (q.detach(), k.detach(), given) if self.training else None
        return self.attend(q, k, v, self.mask(q, k, v, condition) if mask is None else mask)

    def loss(self) -> Tensor | None:
        """The gate's loss on what the last forward pass in training saw. It costs as much as dense attention."""
        if self._last is None:
            return None
        q, k, condition = self._last
        with torch.autocast(q.device.type, enabled=False):  # the gate compares and normalises in float32
            return gate_loss(self.gate(q, k, condition), gate_truth(self.gate, q, k))

    def decode(self, q1: Tensor, cache: KVCache) -> Tensor:
        """[B, Hq, 1, D] of the newest token, whose key and value are in the cache: with a gate for decoding over what it
        selects from a `GateCache`, else over everything."""
        places = torch.tensor([cache.length - 1], device=q1.device)
        mask = IndexMask.from_pages(self._select(q1, cache), self.config.block, cache.length)
        return decode_attention(rotate(q1, places, self.config.rope), cache, mask)  # type: ignore[return-value]

    @torch.no_grad()
    def _select(self, q1: Tensor, cache: KVCache) -> Tensor:
        """Blocks [B, Hkv, 1, n] to attend to."""
        config, count = self.config, -(-cache.length // self.config.block)
        if config.q_pool or not cache.length:
            return torch.arange(count, device=q1.device).expand(*cache.shape[:2], 1, -1)
        if not isinstance(cache, GateCache):
            raise ValueError(
                "cache: expected a GateCache of this gate, got a plain one; make GateCache(layer.gate)"
            )
        logits = self.gate.compare(self.gate.queries(q1, cache.length - 1), cache.gate_keys)
        counters.add(kv_bytes=cache.gate_keys.numel() * cache.gate_keys.element_size())
        chosen = F.pad(
            self.gate.choose(logits, config.selection, config.amount), (0, count - logits.shape[-1])
        )
        chosen[..., -1] = True
        return IndexMask.from_topk(torch.where(chosen, 0.0, -torch.inf), int(chosen.sum(-1).max())).index


class GateCache(KVCache):
    """A cache that also keeps what a gate for decoding makes of every whole block of keys, `gate_keys` [B, Hkv, K, Dg].
    Keys are appended as they are before a rotary embedding, and kept after it when the gate has a `rope`."""

    def __init__(self, gate: BlockGate, batch: int = 1, **options: Any):
        if gate.q_pool:
            raise ValueError(
                "gate: expected one for decoding, got one of pooled queries; make it with q_pool=()"
            )
        super().__init__(batch, gate.kv_heads, gate.head_dim, **options)
        self._gate = gate
        self._rest = torch.zeros(batch, gate.kv_heads, 0, gate.head_dim, device=self.device)
        self.gate_keys = torch.zeros(batch, gate.kv_heads, 0, gate.gate_dim, device=self.device)

    @property
    def bytes(self) -> int:
        """Bytes that keys, values and what the gate needs of them hold."""
        return super().bytes + sum(x.numel() * x.element_size() for x in (self._rest, self.gate_keys))

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """Add n tokens [B, H, n, D]."""
        begin, places = (
            self.length - self._rest.shape[2],
            self.length + torch.arange(k.shape[2], device=k.device),
        )
        super().append(rotate(k, places, self._gate.rope), v)
        rest = torch.cat([self._rest, k.to(self._rest)], 2)
        whole = rest.shape[2] - rest.shape[2] % self._gate.block
        if whole:
            self.gate_keys = torch.cat([self.gate_keys, self._gate.keys(rest[:, :, :whole], begin)], 2)
        self._rest = rest[:, :, whole:]

    def rewrite(self, first: int, k: Tensor, v: Tensor) -> None:
        """ValueError: gate keys outlive the keys that they were made of."""
        raise ValueError("rewrite: expected a cache without gate keys, got a GateCache; fill a new one")


def distill_gates(
    model: nn.Module, batches: Iterable[Any], *, steps: int, gates: Mapping[str, BlockGate] | None = None,
    lr: float = 1e-3, warm_up: int = 20, run: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
) -> list[float]:  # fmt: skip
    """Teach gates what the frozen `model` attends to, one step per batch; returns the losses, means over layers.

    gates: by the name of an attention module whose forward takes q and k; without them those of all `SeerAttention`
    layers, which attend to everything meanwhile. No other weight changes. run(model, batch) runs the model. Keep what was
    learned with `sparse_core.distill.save_learned`.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SeerAttention)}
    chosen = {name: layer.gate for name, layer in layers.items()} if gates is None else gates
    if not chosen:
        raise ValueError(
            "gates: expected at least one, got a model without SeerAttention; give gates by module name"
        )
    before = {layer: layer.dense for layer in layers.values()}
    try:
        for layer in before:
            layer.dense = True
        return distill(model, chosen, batches, _loss_of_call, steps=steps, lr=lr, warm_up=warm_up, run=run)
    finally:
        for layer, dense in before.items():
            layer.dense = dense


def _loss_of_call(gate: BlockGate, call: Mapping[str, Any]) -> Tensor:
    if not {"q", "k"} <= set(call):
        raise ValueError(
            f"gates: expected names of modules called with q and k, got one called with {', '.join(call)}"
        )
    return gate_loss(
        gate(call["q"], call["k"], call.get("condition")), gate_truth(gate, call["q"], call["k"])
    )


METHOD = register(
    Method(
        name="attention/seer",
        paper="2410.13276",
        fidelity="adapted",
        config=Config,
        kind="prefill",
        make=SeerAttention,
        layer=lambda config, heads, kv_heads, width: SeerAttention(config, heads, kv_heads, width),
        needs=("distillation",),
        without="a gate at random; training with its loss distils it",
    )
)
