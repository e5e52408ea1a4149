"""Attention over compressed rows of single keys: checked once, then handed to what suits the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from sparse_core import counters
from sparse_core.kernels.block_attention import check
from sparse_core.kernels.dispatch import call

if TYPE_CHECKING:
    from sparse_core.attention.masks import TokenCSR

IMPLEMENTATIONS = ("reference", "numba", "gather")


def csr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: TokenCSR,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Literal["auto", "reference", "numba", "gather"] = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the pairs that `mask` keeps, differentiable: sampled products, a softmax per row, and a
    sparse matrix times v.

    q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D], of which every head serves Hq / Hkv query heads; scale D ** -0.5 unless given.
    Returns [B, Hq, Tq, D] in the dtype of q, and with `return_lse` the log-sum-exp of the kept scores [B, Hq, Tq] in
    float32. A query row without any key gives 0 and -inf. implementation: `reference` (the definition, dense), `numba`
    (CPU), `gather` (plain torch, any device), or `auto`. Raises ValueError, in one sentence, for what does not fit.
    """
    check(q, k, v, mask, "TokenCSR")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if counters.counting():
        pairs = int(mask.pairs().expand(q.shape[0], q.shape[1]).sum())
        work = pairs * q.shape[-1]
        counters.add(products=pairs, multiply_adds=2 * work, kv_bytes=2 * work * k.element_size())
    out, lse = call(__name__, implementation, IMPLEMENTATIONS, q, k, v, mask, factor)
    return (out, lse) if return_lse else out
