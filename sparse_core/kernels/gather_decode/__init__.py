"""Decoding over selected keys: one query per head reads the keys and values that a selection names, and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor

from sparse_core import counters
from sparse_core.kernels.dispatch import call

if TYPE_CHECKING:
    from sparse_core.attention.masks import IndexMask, SpanPlan

Implementation = Literal["auto", "reference", "numba", "gather", "triton"]
IMPLEMENTATIONS = ("reference", "numba", "gather", "triton")


class Cache(Protocol):
    """What can be decoded from: shape [B, Hkv, T, D], and the rows that logical positions [B, Hkv, n] lie in (-1: absent)
    of keys and values [B, H, P, D], in which every row belongs to its head or, where H is 1, to any."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


def decode_attention(
    q1: Tensor,
    cache: Cache | tuple[Tensor, Tensor],
    selection: IndexMask | SpanPlan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    return_scores: bool = False,
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale q k^T) v over the keys that `selection` names, for one query per head.

    q1 [B, Hq, 1, D]; cache: a `KVCache`, or the pair of keys and values [B, Hkv, T, D]; selection: indices [B, H, 1, n] of
    the query heads or of the key-value heads, or the spans of either, for a query at the newest token. Returns
    [B, Hq, 1, D], with `return_lse` also [B, Hq, 1] and with `return_scores` scale q k^T of the named keys [B, Hq, 1, n],
    -inf where there is none, both in float32. implementation: `reference` (the definition), `numba` (CPU), `gather` (plain
    torch, any device), `triton` (CUDA), or `auto`. The first and `gather` are differentiable, and `auto` takes `gather`
    where a gradient is asked for. Raises ValueError for shapes that do not fit and for an empty cache.
    """
    shape = tuple(cache[0].shape) if isinstance(cache, tuple) else cache.shape
    index = _check(q1, shape, selection)
    if isinstance(cache, tuple):
        k, v = cache
        if k.shape != v.shape:
            raise ValueError(
                f"cache: expected keys and values of one shape, got {list(k.shape)} and {list(v.shape)}"
            )
    else:
        # All query heads of a group read one head of the cache, and where they share a list it is looked up once.
        k, v, rows = cache.rows(index.reshape(shape[0], shape[1], -1))
        index = rows.view_as(index)
    factor = q1.shape[-1] ** -0.5 if scale is None else float(scale)
    if counters.counting():
        kept = int((index >= 0).sum()) * (q1.shape[1] // index.shape[1])
        counters.add(
            products=kept,
            multiply_adds=2 * kept * k.shape[-1],
            kv_bytes=2 * kept * k.shape[-1] * k.element_size(),
        )
        counters.reach(peak_tile_bytes=4 * q1.shape[0] * q1.shape[1] * index.shape[-1])
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q1, k, v)):
        if implementation in ("numba", "triton"):
            raise ValueError(
                f"q1, cache: expected none that needs a gradient for {implementation}, got one; use "
                "implementation='gather'"
            )
        implementation = "gather" if implementation == "auto" else implementation
    results = call(__name__, implementation, IMPLEMENTATIONS, q1[:, :, 0], k, v, index, factor)
    wanted = [part for part, asked in zip(results, (True, return_lse, return_scores), strict=True) if asked]
    return tuple(part[:, :, None] for part in wanted) if len(wanted) > 1 else wanted[0][:, :, None]


def _check(q: Tensor, shape: tuple[int, ...], selection: IndexMask | SpanPlan) -> Tensor:
    """The keys [B, H, n] of every query head, or of every key-value head, of a cache of `shape` [B, Hkv, T, D]."""
    if q.ndim != 4 or q.shape[2] != 1:
        raise ValueError(f"q1: expected [B, H, 1, D], one query per head, got {list(q.shape)}")
    b, hq, _, d = q.shape
    if len(shape) != 4 or shape[2] == 0:
        raise ValueError(
            f"cache: expected keys [B, H, T, D] of at least one token, got {list(shape)}; prefill it first"
        )
    hkv = shape[1]
    if shape[0] != b or shape[3] != d or hq % hkv:
        raise ValueError(f"cache: expected keys [{b}, H, T, {d}] of which H divides {hq}, got {list(shape)}")
    # Told apart by what they can do: a kernel imports no mask.
    to_index = getattr(selection, "to_index", None)
    named = cast("IndexMask", selection if to_index is None else to_index(shape[2], q.device))
    index, length = named.index, named.kv_len
    if length != shape[2]:
        raise ValueError(
            f"selection: expected one of {shape[2]} cached keys, got one of {length}; select again"
        )
    if index.shape[0] not in (1, b) or index.shape[1] not in (1, hkv, hq) or index.shape[2] != 1:
        raise ValueError(
            f"selection: expected indices [{b}, {hq} or {hkv}, 1, n], got {list(index.shape)}; name keys for "
            "one query per head"
        )
    index = index[:, :, 0].expand(b, -1, -1)
    return index.expand(-1, hkv, -1) if index.shape[1] == 1 else index
