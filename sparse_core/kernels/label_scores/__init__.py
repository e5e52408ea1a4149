"""Products of queries with rows that are kept in four bits: what a decoder chooses keys by."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparse_core.kernels.dispatch import call
from sparse_core.kernels.label_scores.packing import dequantise, quantise

__all__ = ["IMPLEMENTATIONS", "dequantise", "label_scores", "quantise"]
IMPLEMENTATIONS = ("reference", "numba")


def label_scores(
    q: Tensor, packed: Tensor, *, implementation: Literal["auto", "reference", "numba"] = "auto"
) -> Tensor:
    """q [B, Hq, r] times each row of `quantise`d labels [B, Hkv, T, 4 + ceil(r / 2)], of which every head serves Hq / Hkv
    query heads: float32 [B, Hq, T]. Not differentiable on a CPU. Raises ValueError for shapes that do not fit."""
    if q.ndim != 3 or packed.ndim != 4 or packed.dtype != torch.uint8:
        raise ValueError(
            f"q, packed: expected [B, H, r] and bytes [B, H, T, n], got {list(q.shape)} and {packed.dtype} "
            f"{list(packed.shape)}"
        )
    (b, hq, r), (samples, hkv, _, width) = q.shape, packed.shape
    if samples != b or hq % hkv or width != 4 + (r + 1) // 2:
        raise ValueError(
            f"packed: expected [{b}, H, T, {4 + (r + 1) // 2}] of which H divides {hq}, got {list(packed.shape)}"
        )
    return call(__name__, implementation, IMPLEMENTATIONS, q.float(), packed, function="score")
