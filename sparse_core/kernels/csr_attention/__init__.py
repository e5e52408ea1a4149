"""Attention over compressed rows of single keys: checked once, then handed to what suits the device."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from sparse_core import counters
from sparse_core.kernels.block_attention import check

if TYPE_CHECKING:
    from sparse_core.attention.masks import TokenCSR

log = logging.getLogger(__name__)
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
    check(q, k, v, mask)
    chosen = choose(q) if implementation == "auto" else implementation
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if counters.counting():
        pairs = int(mask.pairs().expand(q.shape[0], q.shape[1]).sum())
        work = pairs * q.shape[-1]
        counters.add(products=pairs, multiply_adds=2 * work, kv_bytes=2 * work * k.element_size())
    out, lse = _attend(chosen)(q, k, v, mask, factor)
    return (out, lse) if return_lse else out


def choose(q: Tensor) -> str:
    """The implementation that `auto` takes for this device."""
    return "numba" if q.device.type == "cpu" and find_spec("numba") else "gather"


@cache
def _attend(name: str):
    """The function `attend` of an implementation, imported when it is first asked for."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected auto or one of {', '.join(IMPLEMENTATIONS)}, got {name!r}"
        )
    if name == "numba":
        from sparse_core.kernels.csr_attention.numba import attend
    elif name == "gather":
        from sparse_core.kernels.csr_attention.gather import attend
    else:
        from sparse_core.kernels.csr_attention.reference import attend
    log.info("csr_attention runs as %s", name)
    return attend
