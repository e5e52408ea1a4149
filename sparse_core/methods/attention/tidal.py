"""TidalDecode (arXiv 2410.05076): in decoding, the keys that one layer finds important serve the layers after it.

The first layers attend to everything. A selecting layer does so too, and keeps per query head the positions of the k
highest q k; the layers after it attend to these positions alone, with their own keys. A second selecting layer further up
corrects the choice. Positions are found anew in every step, and the newest token is always among them. Since sparsely
decoded tokens leave slightly other keys and values behind, `correct_cache` may recompute them densely now and then.

Fidelity: adapted. `choose_correction_layer` goes by kept attention, where the paper uses a needle test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_core.attention.calibrate import attention_inputs
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.masks import IndexMask
from sparse_core.kernels.gather_decode import decode_attention
from sparse_core.registry import Method, register


@dataclass(frozen=True, kw_only=True)
class TidalSchedule:
    """full: layers that attend to everything; select: those that also choose `topk` positions for the layers after."""

    num_layers: int = field(default=32, kw_only=False)
    full: tuple[int, ...] = (0, 1)
    select: tuple[int, ...] = (2, 13)
    topk: int = 256

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise ValueError(f"topk: expected at least one position, got {self.topk}")
        if not self.select or sorted(set(self.select)) != list(self.select):
            raise ValueError(f"select: expected at least one layer, in ascending order, got {self.select}")
        if not all(0 <= layer < self.num_layers for layer in (*self.full, *self.select)):
            raise ValueError(
                f"full and select: expected layers 0 to {self.num_layers - 1}, got {self.full} and {self.select}"
            )
        early = [layer for layer in range(self.select[0]) if layer not in self.full]
        if early:
            raise ValueError(
                f"full: expected every layer before the first selecting one, got none for {early}; add them"
            )


@dataclass
class TidalState:
    """What one step of decoding carries from layer to layer: positions [B, Hq, 1, n]. Make one per sequence or batch.

    Samples of a batch end with the same token. What a shorter one lacks at its beginning its caches have given back
    (`KVCache.evict`, with pages of one token at any place), and it keeps no more positions than it has tokens.
    """

    schedule: TidalSchedule
    positions: IndexMask | None = field(default=None, repr=False)

    def attend(self, layer: int, q1: Tensor, cache: KVCache) -> Tensor:
        """[B, Hq, 1, D] of the newest token, whose key and value are in the layer's cache. NotImplementedError for several
        new tokens at once, as speculative decoding has them: positions belong to one query."""
        if q1.shape[2] != 1:
            raise NotImplementedError(
                f"q1: expected one new token, [B, H, 1, D], got {list(q1.shape)}; attend token by token"
            )
        if not 0 <= layer < self.schedule.num_layers:
            raise ValueError(f"layer: expected 0 to {self.schedule.num_layers - 1}, got {layer}")
        if layer in self.schedule.select:
            out, scores = attend_to_all(q1, cache)
            self.positions = choose(scores, self.schedule.topk)
            return out
        if layer in self.schedule.full:
            return attend_to_all(q1, cache)[0]
        if self.positions is None or self.positions.kv_len != cache.shape[2]:
            raise RuntimeError(
                f"layer {layer}: expected positions that layer {self.schedule.select[0]} chose in this step, got none; "
                "attend layer by layer, with one cache of equal length each"
            )
        return decode_attention(q1, cache, self.positions)  # type: ignore[return-value]


def attend_to_all(q1: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Dense decoding: output [B, Hq, 1, D] and scaled q k [B, Hq, T], -inf for tokens that their head has given back."""
    every = torch.arange(cache.shape[2], device=q1.device).expand(*q1.shape[:2], 1, -1)
    out, scores = decode_attention(
        q1, cache, IndexMask(index=every, kv_len=cache.shape[2]), return_scores=True
    )
    return out, scores[:, :, 0]


def choose(scores: Tensor, topk: int) -> IndexMask:
    """The positions of the `topk` highest of scores [B, Hq, T], the newest, which is last, among them."""
    newest = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
    newest[-1] = True
    return IndexMask.from_topk(scores[:, :, None], topk, force=newest)


Step = Sequence[tuple[Tensor, Tensor]]
"""One step of decoding: the (q1 [B, Hq, 1, D], keys [B, Hkv, T, D]) of every layer."""
Prefill = Callable[[int, int], Sequence[tuple[Tensor, Tensor]]]
"""Keys and values [B, H, n, D] of every layer for tokens first .. last, computed with dense attention."""


def correct_cache(
    model: nn.Module | Prefill, cache: KVCache | Sequence[KVCache], span: tuple[int, int], batch: Any = None
) -> None:
    """Put densely computed keys and values of tokens span[0] to before span[1] in place of those that sparse steps left.

    model: a function of (first, last), or a module, dense, that is run on `batch`, all tokens so far. cache: those of all
    layers, in the order of the model's attentions. Raises ValueError for a span or caches that do not fit, before anything
    is written.
    """
    first, last = span
    caches = [cache] if isinstance(cache, KVCache) else list(cache)
    if not caches or not 0 <= first < last <= caches[0].shape[2]:
        length = caches[0].shape[2] if caches else 0
        raise ValueError(f"span: expected 0 <= first < last <= {length}, got {first} and {last}")
    fresh = list(_prefill(model, batch)(first, last))
    if len(fresh) != len(caches):
        raise ValueError(f"cache: expected one for each of {len(fresh)} layers, got {len(caches)}")
    for one, (k, v) in zip(caches, fresh, strict=True):
        one.rewrite(first, k, v)


def _prefill(model: nn.Module | Prefill, batch: Any) -> Prefill:
    if not isinstance(model, nn.Module):
        return model
    if batch is None:
        raise ValueError("batch: expected all tokens so far to run the model on, got none; pass them")
    (inputs,) = attention_inputs(model, [batch])
    return lambda first, last: [(k[:, :, first:last], v[:, :, first:last]) for _, k, v in inputs.values()]


def choose_correction_layer(
    model: nn.Module | Iterable[Step], data: Iterable[Any] | None = None, topk: int = 256, select: int = 2
) -> int:
    """The layer whose second choice keeps most attention, the lowest of equal ones.

    model: a dense one, run on each batch of `data`, whose last token decodes; or, without data, such steps of decoding.
    Raises ValueError for no steps, and where no layer is left above the selecting one.
    """
    if isinstance(model, nn.Module):
        if data is None:
            raise ValueError("data: expected batches to run the model on, got none; pass some texts")
        steps: Iterable[Step] = (
            [(q[:, :, -1:], k) for q, k, _ in inputs.values()] for inputs in attention_inputs(model, data)
        )
    else:
        steps = model
    totals: Tensor | None = None
    for layers in steps:
        kept = _kept_by_source(layers, topk)
        count = len(layers)
        gains = torch.tensor(
            [sum(float(kept[select if layer < second else second, layer]) for layer in range(select + 1, count))
             for second in range(select + 1, count)]
        )  # fmt: skip
        totals = gains if totals is None else totals + gains
    if totals is None or not len(totals):
        raise ValueError("steps: expected at least one step of more layers than the selecting one, got none")
    return select + 1 + int(totals.argmax())


def _kept_by_source(layers: Sequence[tuple[Tensor, Tensor]], topk: int) -> Tensor:
    """Share of the attention of layer l that the positions chosen by layer s keep, [s, l]."""
    scores = []
    for q1, k in layers:
        grouped = q1.float().view(q1.shape[0], k.shape[1], -1, q1.shape[-1])
        scores.append((grouped @ k.float().mT).view(*q1.shape[:2], -1))
    weights = [(s * q.shape[-1] ** -0.5).softmax(-1) for s, (q, _) in zip(scores, layers, strict=True)]
    chosen = [choose(s, topk).to_token_mask()[:, :, 0] for s in scores]
    return torch.tensor([[float((w * c).sum(-1).mean()) for w in weights] for c in chosen])


METHOD = register(
    Method(
        name="attention/tidal",
        paper="2410.05076",
        fidelity="adapted",
        config=TidalSchedule,
        kind="decode",
        make=TidalState,
    )
)
