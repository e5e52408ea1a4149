"""Attention over the key blocks that a mask keeps: checked once, then handed to what suits the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sparse_core import counters
from sparse_core.kernels.dispatch import call

if TYPE_CHECKING:
    from sparse_core.attention.masks import BlockMask, ClusterMask, TokenCSR

Implementation = Literal["auto", "reference", "numba", "gather", "triton"]
IMPLEMENTATIONS = ("reference", "numba", "gather", "triton")


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the pairs that `mask` keeps, differentiable.

    q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D], of which every head serves Hq / Hkv query heads; scale D ** -0.5 unless given.
    Returns [B, Hq, Tq, D] in the dtype of q, and with `return_lse` the log-sum-exp of the kept scores [B, Hq, Tq] in
    float32. A query row without any key gives 0 and -inf. implementation: `reference` (the definition), `numba` (CPU),
    `gather` (plain torch, any device), `triton` (CUDA), or `auto`: the kernel of the device, and `gather` for float64,
    since `numba` computes in float32 whatever it is given. The kernels can be differentiated once and go through no
    `torch.func`; the others follow autograd. Raises TypeError for another kind of mask, and ValueError, in one sentence,
    for what does not fit.
    """
    check(q, k, v, mask, "BlockMask")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if counters.counting():
        pairs = int(mask.pairs().expand(q.shape[0], q.shape[1]).sum())
        counters.add(
            products=pairs, multiply_adds=2 * pairs * q.shape[-1], kv_bytes=kv_bytes(k, mask, q.shape[1])
        )
    out, lse = call(__name__, implementation, IMPLEMENTATIONS, q, k, v, mask, factor)
    return (out, lse) if return_lse else out


def kv_bytes(k: Tensor, mask: BlockMask, heads: int) -> int:
    """Bytes of keys and values that the kept blocks read, once per query block."""
    tokens = (mask.blocks.sum(-2) * _tokens(mask)).sum(-1).expand(k.shape[0], heads).sum().item()
    return int(2 * tokens * k.shape[-1] * k.element_size())


def _tokens(mask: BlockMask) -> Tensor:
    size = mask.block_size[1]
    return (mask.kv_len - torch.arange(mask.shape[3], device=mask.kv_num.device) * size).clamp_max(size)


def check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | ClusterMask | TokenCSR, kind: str) -> None:
    """ValueError, in one sentence, where the arguments do not fit each other; also for masks of single keys. TypeError for
    what is no tensor, and for a mask of another class than `kind`."""
    if kind not in {base.__name__ for base in type(mask).__mro__}:  # told by name: a kernel imports no mask
        raise TypeError(
            f"mask: expected a {kind}, got {type(mask).__name__}; sparse_core.attention.attend.attend takes every kind"
        )
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        raise TypeError(f"q, k, v: expected tensors, got {', '.join(type(x).__name__ for x in (q, k, v))}")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            f"q, k, v: expected [B, H, T, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    b, hq, tq, d = q.shape
    hkv, tk = k.shape[1:3]
    if tuple(k.shape) != (b, hkv, tk, d) or v.shape != k.shape:
        raise ValueError(
            f"k, v: expected both [{b}, H, T, {d}] beside q {list(q.shape)}, got {list(k.shape)} and {list(v.shape)}"
        )
    if not (hkv and d):
        raise ValueError(
            f"k, v: expected at least one head and one channel, got {hkv} and {d} in {list(k.shape)}"
        )
    if hq % hkv:
        raise ValueError(f"heads: expected a multiple of the {hkv} key-value heads, got {hq} query heads")
    if (mask.q_len, mask.kv_len) != (tq, tk):
        raise ValueError(
            f"mask: expected one for {tq} queries and {tk} keys, got {mask.q_len} and {mask.kv_len}; make it so long"
        )
    if mask.shape[0] not in (1, b) or mask.shape[1] not in (1, hq):
        raise ValueError(
            f"mask: expected 1 or {b} samples and 1 or {hq} heads, got {mask.shape[0]} and {mask.shape[1]}"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
