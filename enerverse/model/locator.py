"""Where things are: tokens that gather it, taught by the simulator where the data hold its facts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enerverse.model.attention import CrossAttention
from enerverse.model.component import start_at_zero

QUERIES = 4


class FactReader(nn.Module):
    """Tells the simulator's facts linearly from a few tokens [B, n, D], so that whatever else reads them finds the facts.

    The facts (positions of the object and of the goal, which cue was shown, and so on) are targets in training, where
    the data hold them; in use none is read. Pictures and actions alone give a small model too little reason to find a
    cube to within a centimetre, or to keep a colour in mind: both say so only in sum with much else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, facts: int, count: int = QUERIES):
        super().__init__()
        self.read: nn.Module = nn.Linear(count * width, facts)
        self.register_buffer("mean", torch.zeros(facts))
        self.register_buffer("std", torch.ones(facts))

    @torch.no_grad()
    def set_statistics(self, facts: Tensor) -> None:
        """Store mean and deviation of facts [N, S']."""
        self.mean.copy_(facts.mean(0))
        self.std.copy_(facts.std(0).clamp_min(1e-3))

    def loss(self, tokens: Tensor, facts: Tensor) -> Tensor:
        """Mean squared error of the facts [B, S'], in standard deviations, told from tokens [B, n, D]."""
        told = self.read(tokens.flatten(1)).float()
        return F.mse_loss(told, (facts - self.mean) / self.std)


class Locator(FactReader):
    """A fact reader with a few learned queries that gather its tokens from a longer row, and an MLP for a read-out."""

    def __init__(self, width: int, heads: int, facts: int):
        super().__init__(width, facts)
        self.read = nn.Sequential(nn.Linear(QUERIES * width, 256), nn.SiLU(), nn.Linear(256, facts))
        self.queries = nn.Parameter(0.02 * torch.randn(QUERIES, width))
        self.gather = CrossAttention(width, heads)

    def forward(self, context: Tensor) -> Tensor:
        """Tokens [B, N, D] -> tokens [B, 4, D]."""
        return self.gather(self.queries.expand(len(context), -1, -1).to(context.dtype), context)


class Plan(nn.Module):
    """A few tokens that read the whole window and tell every frame of the way up what they found.

    What the first reading finds is the question of the second: a cue in memory, then the thing it means. Local blocks
    would have to pass both from place to place. It also says which actions (M, A) lead there.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        embedding: int,
        actions: tuple[int, int],
        count: int = QUERIES,
        readings: int = 2,
    ):
        super().__init__()
        self.shape = actions
        self.queries = nn.Parameter(0.02 * torch.randn(count, width))
        self.readings = nn.ModuleList(CrossAttention(width, heads) for _ in range(readings))
        self.thoughts = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )
            for _ in range(readings)
        )
        self.tell = nn.Sequential(
            nn.Linear(count * width, embedding), nn.SiLU(), start_at_zero(nn.Linear(embedding, embedding))
        )
        self.act = nn.Linear(count * width, actions[0] * actions[1])

    def actions(self, tokens: Tensor) -> Tensor:
        """The actions [B, M, A] that lead to what the tokens [B, n, D] plan, not clipped."""
        return self.act(tokens.flatten(1)).unflatten(1, self.shape)

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, V, T, h, w, D] -> tokens [B, n, D] and what is added to every frame's embedding [B, 1, E]."""
        context = window.flatten(1, 4)
        tokens = self.queries.expand(len(context), -1, -1).to(context.dtype)
        for read, think in zip(self.readings, self.thoughts, strict=True):
            tokens = read(tokens, context)
            tokens = tokens + think(tokens)
        return tokens, self.tell(tokens.flatten(1))[:, None]
