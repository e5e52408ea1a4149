"""From scores to what is kept. Every function returns bool of the shape of its scores, the choice is along the last axis
unless said otherwise, scores of -inf are never chosen, and of equal scores the lower index wins."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def topk(scores: Tensor, k: int | Tensor) -> Tensor:
    """The `k` highest of every row; k may be a tensor that broadcasts to the rows."""
    _check(scores)
    limit = torch.as_tensor(k, device=scores.device)
    if (limit < 0).any():
        raise ValueError(f"k: expected 0 or more, got {int(limit.min())}")
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    taken = torch.arange(scores.shape[-1], device=scores.device) < limit[..., None]
    return _mark(scores, order, taken)


def threshold(scores: Tensor, least: float) -> Tensor:
    """All that score more than `least`."""
    _check(scores)
    if not math.isfinite(least):
        raise ValueError(f"least: expected a finite number, got {least}")
    return scores > least


def ratio(scores: Tensor, share: float) -> Tensor:
    """The highest `share` of every row's possible entries (those above -inf), rounded up."""
    if not 0 < share <= 1:
        raise ValueError(f"share: expected more than 0 and at most 1, got {share}")
    possible = (scores > -torch.inf).sum(-1)
    return topk(scores, (possible * share).ceil().long())


def mass(scores: Tensor, share: float) -> Tensor:
    """The fewest of every row whose softmax weights sum to at least `share`."""
    _check(scores)
    if not 0 < share <= 1:
        raise ValueError(f"share: expected more than 0 and at most 1, got {share}")
    weights = scores.softmax(-1).nan_to_num(0)  # a row of nothing but -inf has no weights
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return _mark(scores, order, before < share)


def grouped_topk(scores: Tensor, k: int | Tensor, dim: int) -> Tensor:
    """The `k` highest of axis `dim` and the last axis together: a head that needs more takes it from one that needs less
    (SEA, arXiv 2310.01777). k may be a tensor that broadcasts to the rows, which are all axes but these two."""
    moved = scores.movedim(dim, -2)
    return topk(moved.flatten(-2), k).unflatten(-1, moved.shape[-2:]).movedim(-2, dim)


def _check(scores: Tensor) -> None:
    if scores.isnan().any():
        raise ValueError("scores: expected numbers, got NaN; check what made them")


def _mark(scores: Tensor, order: Tensor, taken: Tensor) -> Tensor:
    """True where `order` names an entry that is taken and possible."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, order, taken.expand_as(order)) & (scores > -torch.inf)
