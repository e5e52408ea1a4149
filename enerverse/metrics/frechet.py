"""Frechet distance between two sets of features.

The features come from a network of the caller's choice, usually our own. The number is comparable only
between sets that went through the same network, and is not the FID or FVD of the literature.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Return the squared Frechet distance between Gaussians fitted to `[N, D]` and `[M, D]` features.

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))` (Dowson and Landau 1982), in double precision. Zero for
    equal sets; biased upwards for N or M near D, so compare sets of equal size.
    Raises ValueError for other shapes, fewer than two rows, or non-finite features.
    """
    _check("features", features)
    _check("reference", reference)
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"reference: expected {features.shape[1]} features per row, got {reference.shape[1]}"
        )
    first, second = features.double(), reference.double()
    covariance, other = _covariance(first), _covariance(second)
    root = _symmetric_root(covariance)
    # tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric and so has real eigenvalues
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    offset = (first.mean(0) - second.mean(0)).square().sum()
    distance = offset + covariance.trace() + other.trace() - 2 * cross
    return max(0.0, distance.item())


def _covariance(rows: Tensor) -> Tensor:
    return torch.atleast_2d(torch.cov(rows.T))  # one feature would give a scalar


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _check(name: str, features: Tensor) -> None:
    if features.dim() != 2 or features.shape[0] < 2:
        raise ValueError(f"{name}: expected shape [N, D] with N >= 2, got {list(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: expected finite numbers, got nan or inf; check the feature network")
