"""Where things are: tokens that gather it, taught by the simulator where the data hold its facts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enerverse.model.attention import CrossAttention

QUERIES = 4


class Locator(nn.Module):
    """A few learned queries read a row of tokens; an MLP tells the simulator's facts from what they find.

    The facts (positions of the object and of the goal, which cue was shown, and so on) are targets in training, where
    the data hold them; in use none is read. Pictures and actions alone give a small model too little reason to find a
    cube to within a centimetre, or to keep a colour in mind: both say so only in sum with much else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, heads: int, facts: int):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(QUERIES, width))
        self.gather = CrossAttention(width, heads)
        self.read = nn.Sequential(nn.Linear(QUERIES * width, 256), nn.SiLU(), nn.Linear(256, facts))
        self.register_buffer("mean", torch.zeros(facts))
        self.register_buffer("std", torch.ones(facts))

    @torch.no_grad()
    def set_statistics(self, facts: Tensor) -> None:
        """Store mean and deviation of facts [N, S']."""
        self.mean.copy_(facts.mean(0))
        self.std.copy_(facts.std(0).clamp_min(1e-3))

    def forward(self, context: Tensor) -> Tensor:
        """Tokens [B, N, D] -> tokens [B, 4, D]."""
        return self.gather(self.queries.expand(len(context), -1, -1).to(context.dtype), context)

    def loss(self, places: Tensor, facts: Tensor) -> Tensor:
        """Mean squared error of the facts [B, S'], in standard deviations, told from tokens [B, 4, D]."""
        told = self.read(places.flatten(1)).float()
        return F.mse_loss(told, (facts - self.mean) / self.std)
