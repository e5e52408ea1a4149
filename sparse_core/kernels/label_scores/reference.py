"""The definition of scores of packed labels: unpack, then a product with every row."""

from __future__ import annotations

from torch import Tensor

from sparse_core.kernels.label_scores.packing import dequantise


def score(q: Tensor, packed: Tensor) -> Tensor:
    """Scores [B, Hq, T] of q [B, Hq, r] with the rows packed [B, Hkv, T, 4 + ceil(r / 2)]."""
    rows = dequantise(packed, q.shape[-1])
    return (q.unflatten(1, (packed.shape[1], -1)) @ rows.mT).flatten(1, 2)
