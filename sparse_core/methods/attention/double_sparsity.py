"""Double Sparsity (arXiv 2408.07092): few channels of a key say whether it matters, and few keys matter.

Calibration finds, per head, the channels c with the largest mean of |q_c k_c| over tokens. The cache keeps these channels
of every key once more, side by side and in four bits. In decoding

    scores = q[channels] . labels / sqrt(r),   then exact attention over the k keys of highest score,

so a step reads T r half bytes and 2 k D numbers instead of 2 T D. Query heads that share keys share the channels:
importance is summed over the group. Calibrate with queries and keys as attention sees them, after a rotary embedding.

A cache in host memory is read ahead (`Prefetch`): with the query that the hidden state of layer l gives for layer l + 1,
much like its own, the keys of that layer are chosen and moved while layer l attends; two layers are under way at most.

Fidelity: exact. On CUDA the rows to move are gathered by a thread of the host, not by a kernel that reads pinned memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from sparse_core import counters
from sparse_core.attention.calibrate import (
    attention_inputs,
    check_model,
    model_hash,
    read_plan,
    write_plan,
)
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.masks import IndexMask
from sparse_core.attention.prefetch import Prefetch
from sparse_core.kernels.gather_decode import decode_attention
from sparse_core.kernels.label_scores import label_scores, quantise
from sparse_core.registry import Method, register

__all__ = [
    "METHOD", "ChannelPlan", "Config", "DoubleSparseCache", "DoubleSparsity", "Prefetch", "calibrate_channels",
    "double_sparse_decode",
]  # fmt: skip
BITS = (4, 16)  # of a label
LARGEST = 65504.0  # of a label: labels, or their least and their step, are float16


@dataclass(frozen=True, kw_only=True)
class Config:
    """channels r per head, topk keys per query, label_bits 4 or 16; the first dense_layers layers attend to everything."""

    channels: int = 8
    topk: int = 256
    label_bits: int = 4
    dense_layers: int = 2

    def __post_init__(self) -> None:
        if self.channels < 1 or self.topk < 1 or self.dense_layers < 0:
            raise ValueError(
                f"channels, topk: expected at least 1, dense_layers 0 or more, got {self.channels}, {self.topk}, "
                f"{self.dense_layers}"
            )
        if self.label_bits not in BITS:
            raise ValueError(f"label_bits: expected 4 or 16, got {self.label_bits}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelPlan:
    """channels [Hkv, r] per key-value head, most important first, of keys of `width` channels; model: its hash, or ""."""

    channels: Tensor
    width: int
    model: str = ""

    def __post_init__(self) -> None:
        heads = self.channels.ndim == 2 and self.channels.numel() > 0
        if self.channels.dtype != torch.long:
            raise ValueError(f"channels: expected whole numbers, int64, got {self.channels.dtype}")
        if not heads or int(self.channels.min()) < 0 or int(self.channels.max()) >= self.width:
            raise ValueError(
                f"channels: expected [H, r] of 0 to {self.width - 1}, got "
                f"{list(self.channels.shape)} {self.channels.tolist()}"
            )
        if (self.channels.sort(-1).values.diff(dim=-1) == 0).any():
            raise ValueError(f"channels: expected each once per head, got {self.channels.tolist()}")

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all."""
        return write_plan(
            path, {"width": self.width, "model": self.model, "channels": self.channels.tolist()}
        )

    @classmethod
    def load(cls, path: str | Path) -> ChannelPlan:
        """Read a plan. Raises ValueError naming the file where it is none."""
        return read_plan(
            path,
            "channel plan",
            lambda data: cls(
                channels=torch.tensor(data["channels"]), width=data["width"], model=data["model"]
            ),
        )

    def validate(self, model: nn.Module) -> None:
        """ValueError where the plan was made for another model."""
        check_model(self.model, model)


@overload
def calibrate_channels(
    source: Iterable[tuple[Tensor, Tensor]], channels: int, model: nn.Module | None = None
) -> ChannelPlan: ...


@overload
def calibrate_channels(
    source: nn.Module, channels: int, *, batches: Iterable[Any] | None = None
) -> dict[str, ChannelPlan]: ...


def calibrate_channels(
    source: nn.Module | Iterable[tuple[Tensor, Tensor]], channels: int, model: nn.Module | None = None, *,
    batches: Iterable[Any] | None = None,
) -> ChannelPlan | dict[str, ChannelPlan]:  # fmt: skip
    """The plan of one layer from its queries [B, Hq, T, D] and keys [B, Hkv, T, D] over some texts, signed by `model`; or,
    of a model that is run on each of `batches`, the plan of every attention by its name, as `attention_inputs` finds them.

    Raises ValueError for pairs that do not fit each other or are not finite, for no tokens, and channels there are not.
    """
    if not isinstance(source, nn.Module):
        return _plan(_importance(source), channels, model)
    if batches is None:
        raise ValueError("batches: expected what to run the model on, got none; pass some texts")
    totals: dict[str, Tensor] = {}
    for inputs in attention_inputs(source, batches):
        for name, (q, k, _) in inputs.items():
            found = _importance([(q, k)])
            totals[name] = totals[name] + found if name in totals else found
    if not totals:
        raise ValueError("batches: expected at least one, got none")
    return {name: _plan(total, channels, source) for name, total in totals.items()}


def _importance(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over tokens and the queries of a group of |q_c k_c|, [Hkv, D]."""
    total, tokens = torch.zeros(0, 0), 0
    for q, k in pairs:
        _check_pair(q, k)
        group = q.shape[1] // k.shape[1]
        found = (q.float().unflatten(1, (-1, group)) * k.float()[:, :, None]).abs().sum((0, 2, 3))
        if not found.isfinite().all():
            raise ValueError(
                "pairs: expected finite queries and keys, got NaN or infinity; check what made them"
            )
        if tokens and found.shape != total.shape:
            raise ValueError(
                f"pairs: expected keys of {total.shape[0]} heads and {total.shape[1]} channels in all, got "
                f"{found.shape[0]} and {found.shape[1]}; calibrate one layer at a time"
            )
        total = total + found if tokens else found
        tokens += q.shape[0] * q.shape[2]
    if not tokens:
        raise ValueError("pairs: expected queries and keys of at least one token, got none")
    return total


def _plan(importance: Tensor, channels: int, model: nn.Module | None) -> ChannelPlan:
    """The `channels` most important ones of each head."""
    width = importance.shape[1]
    if not 1 <= channels <= width:
        raise ValueError(f"channels: expected 1 to {width}, got {channels}")
    best = importance.sort(dim=-1, descending=True, stable=True).indices[:, :channels]
    return ChannelPlan(channels=best.cpu(), width=width, model=model_hash(model) if model is not None else "")


def _check_pair(q: Tensor, k: Tensor) -> None:
    _check_heads(q, k.shape[1], k.shape[-1])
    if (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"pairs: expected queries and keys of the same tokens, got {list(q.shape)} and {list(k.shape)}"
        )


def _check_heads(q: Tensor, heads: int, width: int) -> None:
    """ValueError where queries do not fit keys of so many heads and channels."""
    if q.ndim != 4 or q.shape[1] % heads or q.shape[3] != width:
        raise ValueError(f"q: expected [B, H, T, {width}] of which {heads} divides H, got {list(q.shape)}")


class DoubleSparseCache(KVCache):
    """A cache that also keeps the plan's channels of every key, in `label_bits` bits."""

    def __init__(self, plan: ChannelPlan, batch: int = 1, *, label_bits: int = 4, **options):
        if label_bits not in BITS:
            raise ValueError(f"label_bits: expected 4 or 16, got {label_bits}")
        heads, self.plan, self.label_bits = plan.channels.shape[0], plan, label_bits
        super().__init__(batch, heads, plan.width, **options)
        self.channels = plan.channels.to(self.device)
        self.keep_beside("labels", self._label)

    def _pick(self, x: Tensor) -> Tensor:
        """The plan's channels of x [B, Hkv, .., D]."""
        index = self.channels.view(1, len(self.channels), *[1] * (x.ndim - 3), -1)
        return x.gather(-1, index.expand(*x.shape[:-1], -1))

    def _label(self, k: Tensor, v: Tensor) -> Tensor:
        near = self._pick(k).float()
        if near.numel() and not float(near.abs().amax()) <= LARGEST:
            raise ValueError(
                f"k: expected keys of at most {LARGEST:g} in the plan's channels, got {float(near.abs().amax()):g}; "
                "scale keys down and queries up"
            )
        return quantise(near) if self.label_bits == 4 else near.half()

    @property
    def labels(self) -> Tensor:
        """What is kept of every key: bytes of `quantise` [B, Hkv, T, 4 + ceil(r / 2)], or float16 [B, Hkv, T, r]."""
        kept = self.side("labels")
        if kept.shape[2] != self.shape[2]:
            raise RuntimeError(
                f"labels: expected one per key, {self.shape[2]}, got {kept.shape[2]}; append through this cache alone"
            )
        counters.add(kv_bytes=kept.numel() * kept.element_size())
        return kept

    def select(self, q1: Tensor, topk: int) -> IndexMask:
        """The `topk` keys of highest score per query head of q1 [B, Hq, 1, D]. With the query of the layer below, which is
        much alike, keys of an offloaded cache can be asked for before they are needed."""
        if topk < 1:
            raise ValueError(f"topk: expected at least one key, got {topk}")
        if not self.length:
            raise ValueError("cache: expected at least one token, got none; prefill it first")
        heads, r = self.channels.shape
        _check_heads(q1, heads, self.plan.width)
        near = self._pick(q1.float().view(q1.shape[0], heads, -1, q1.shape[-1])) / math.sqrt(r)
        if self.label_bits == 4:
            scores = label_scores(near.flatten(1, 2), self.labels)
        else:
            scores = (near @ self.labels.float().mT).flatten(1, 2)
        counters.add(multiply_adds=scores.numel() * r)
        held = self.held().to(scores.device).repeat_interleave(scores.shape[1] // heads, 1)
        return IndexMask.from_topk(scores.masked_fill(~held, -torch.inf)[:, :, None], topk)


def double_sparse_decode(
    q1: Tensor, cache: DoubleSparseCache, topk: int, selection: IndexMask | None = None
) -> Tensor:
    """[B, Hq, 1, D]: exact attention over the keys that `selection` names, or that the labels choose."""
    return decode_attention(q1, cache, selection or cache.select(q1, topk))  # type: ignore[return-value]


class DoubleSparsity(nn.Module):
    """Decoding by layers: the first ones dense, the others over the keys that their labels choose."""

    def __init__(self, config: Config | None = None):
        super().__init__()
        self.config = config or Config()

    def calibrate(
        self, pairs: Iterable[tuple[Tensor, Tensor]], model: nn.Module | None = None
    ) -> ChannelPlan:
        """The plan of one layer with the config's number of channels; see `calibrate_channels`."""
        return calibrate_channels(pairs, self.config.channels, model)

    def cache(self, plan: ChannelPlan, batch: int = 1, **options: Any) -> DoubleSparseCache:
        """An empty cache of a layer with labels as the config has them; options are those of `KVCache`. ValueError for a
        plan of another number of channels."""
        if plan.channels.shape[1] != self.config.channels:
            raise ValueError(
                f"plan: expected {self.config.channels} channels per head, got {plan.channels.shape[1]}; calibrate again"
            )
        return DoubleSparseCache(plan, batch, label_bits=self.config.label_bits, **options)

    def decode(self, layer: int, q1: Tensor, cache: DoubleSparseCache) -> Tensor:
        """[B, Hq, 1, D]."""
        dense = layer < self.config.dense_layers
        if not dense:
            return double_sparse_decode(q1, cache, self.config.topk)
        everything = torch.arange(cache.length, device=q1.device).expand(q1.shape[0], q1.shape[1], 1, -1)
        return decode_attention(q1, cache, IndexMask(index=everything, kv_len=cache.length))  # type: ignore[return-value]


METHOD = register(
    Method(
        name="attention/double_sparsity",
        paper="2408.07092",
        fidelity="exact",
        config=Config,
        kind="decode",
        make=DoubleSparsity,
        needs=("calibration",),
    )
)
