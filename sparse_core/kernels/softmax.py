"""The softmax of scores of which some are not kept, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_core import counters


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [.., n] of scores that are -inf where a pair is not kept, and their log-sum-exp [..]; a row of nothing else
    weighs 0 and has -inf.

    The weights of a row sum to 1 however large its scores are, which exp(score - log-sum-exp) does not give: with scores
    around a million, float32 knows their log-sum-exp to 0.03.
    """
    counters.reach(peak_tile_bytes=scores.numel() * scores.element_size())
    lse = scores.logsumexp(-1)
    nothing = (lse == -torch.inf)[..., None]
    return scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0), lse
