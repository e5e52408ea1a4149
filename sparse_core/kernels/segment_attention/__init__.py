"""Attention within clusters of tokens: the rows of a cluster are gathered, attend to each other, and are put back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from sparse_core import counters
from sparse_core.kernels.block_attention import check
from sparse_core.kernels.dispatch import call

if TYPE_CHECKING:
    from sparse_core.attention.masks import ClusterMask

IMPLEMENTATIONS = ("reference", "gather")


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: ClusterMask,
    *,
    scale: float | None = None,
    implementation: Literal["auto", "reference", "gather"] = "auto",
) -> Tensor:
    """Mean over the clusters of a query of softmax(scale q k^T) v within each, differentiable.

    q [B, Hq, Tq, D]; k, v [B, Hkv, Tk, D], of which every head serves Hq / Hkv query heads; scale D ** -0.5 unless given.
    Returns [B, Hq, Tq, D] in the dtype of q; a query that sees no key gives 0. implementation: `reference` (the
    definition, dense), `gather` (plain torch, any device), or `auto`, which is `gather`. Raises ValueError, in one
    sentence, for what does not fit.
    """
    check(q, k, v, mask, "ClusterMask")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if counters.counting():
        copies = (q.shape[0] // mask.shape[0]) * (q.shape[1] // mask.shape[1])
        pairs = copies * sum(int(mask.kept(n, n + 1).sum()) for n in range(mask.shape[2]))
        keys = copies * int((mask.k_index >= 0).sum())
        counters.add(
            products=pairs,
            multiply_adds=2 * pairs * q.shape[-1],
            kv_bytes=2 * keys * k.shape[-1] * k.element_size(),
        )
    return call(__name__, implementation, IMPLEMENTATIONS, q, k, v, mask, factor)
