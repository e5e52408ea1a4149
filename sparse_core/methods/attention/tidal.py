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

import torch
from torch import Tensor

from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.masks import IndexMask
from sparse_core.kernels.gather_decode import decode_attention
from sparse_core.registry import Method, register


@dataclass(frozen=True, kw_only=True)
class TidalSchedule:
    """full: layers that attend to everything; select: those that also choose `topk` positions for the layers after."""

    num_layers: int = 32
    full: tuple[int, ...] = (0, 1)
    select: tuple[int, ...] = (2, 13)
    topk: int = 256

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise ValueError(f"topk: expected at least one position, got {self.topk}")
        if not self.select or sorted(self.select) != list(self.select):
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
    """What one step of decoding carries from layer to layer: positions [B, Hq, 1, n]. Make one per sequence."""

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


Prefill = Callable[[int, int], Sequence[tuple[Tensor, Tensor]]]
"""Keys and values [B, H, n, D] of every layer for tokens first .. last, computed with dense attention."""


def correct_cache(prefill: Prefill, caches: Sequence[KVCache], span: tuple[int, int]) -> None:
    """Put densely computed keys and values of the tokens span[0] .. span[1] in place of those that sparse steps left."""
    first, last = span
    if not 0 <= first < last <= caches[0].shape[2]:
        raise ValueError(f"span: expected 0 <= first < last <= {caches[0].shape[2]}, got {first} and {last}")
    for cache, (k, v) in zip(caches, prefill(first, last), strict=True):
        cache.rewrite(first, k, v)


def choose_correction_layer(
    steps: Iterable[Sequence[tuple[Tensor, Tensor]]], topk: int, select: int = 2
) -> int:
    """The layer whose second choice keeps most attention: steps of decoding, each the (q1 [B, Hq, 1, D], keys
    [B, Hkv, T, D]) of every layer. The lowest of equal ones."""
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
