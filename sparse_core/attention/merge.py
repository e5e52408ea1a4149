"""Putting parts of an attention together: each part attended to its own keys, and one softmax runs over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attend_part(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of scores [.., T, n] over values [.., n, D], and the log-sum-exp [.., T].

    A row of nothing but -inf gives 0 and -inf, and gradients of 0.
    """
    some = (scores > -torch.inf).any(-1, keepdim=True)
    safe = scores.masked_fill(~some, 0)
    lse = safe.logsumexp(-1, keepdim=True)
    weights = (safe - lse).exp().masked_fill(~some, 0)
    return weights @ values, lse.masked_fill(~some, -torch.inf)[..., 0]


def merge_lse(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs [.., T, D] with their log-sum-exps [.., T], as one softmax over all keys would have it."""
    if not parts:
        raise ValueError("parts: expected at least one output with its log-sum-exp, got none")
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    weights = (lses - total.masked_fill(total == -torch.inf, 0)).exp()
    return sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True)), total  # type: ignore[return-value]
