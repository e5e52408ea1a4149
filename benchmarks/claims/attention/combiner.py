"""Combiner: one layer reaches a token that lies in a far segment, through the summary of that segment."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.claims import Trial
from sparse_core.methods.attention.combiner import combiner_attention

CLAIM = "A single layer learns to recall a flagged token of any earlier segment, which attention inside segments cannot."
THRESHOLD = (
    "accuracy after 300 steps: Combiner >= .95; attention inside segments of 16 <= .30, which has the flag in sight in "
    "15 of 127 cases and else guesses one of 8 values; what it computes is within 1e-5 of its formula written out; at "
    "4096 tokens, in segments of 64, it really multiplies <= .1 of what dense causal attention does (64 + 64 products "
    "of 2048 are .063)"
)
SEEDS = 3
LENGTH, SEGMENT, WIDTH, VALUES = 128, 16, 32, 8
STEPS, BATCH, TESTED = 300, 32, 1024
LONG, LONG_SEGMENT = 4096, 64
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention inside segments."""
    near = [x.unflatten(2, (-1, SEGMENT)) for x in (q, k, v)]
    return F.scaled_dot_product_attention(near[0], near[1], near[2], is_causal=True).flatten(2, 3)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def combiner(q: Tensor, k: Tensor, v: Tensor, segment: int = SEGMENT) -> Tensor:
    return combiner_attention(q, k, v, variant="fixed", segment=segment)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its rows one by one: own segment directly, earlier ones by their maxima, under one softmax."""
    rows = []
    for i in range(q.shape[2]):
        own = i // SEGMENT * SEGMENT
        near = slice(own, i + 1)
        keys, values = [k[:, :, near]], [v[:, :, near]]
        for first in range(0, own, SEGMENT):
            part = slice(first, first + SEGMENT)
            inside = q[:, :, part].amax(2, keepdim=True) @ k[:, :, part].mT * WIDTH**-0.5
            keys.append(k[:, :, part].amax(2, keepdim=True))
            values.append(inside.softmax(-1) @ v[:, :, part])
        weights = (q[:, :, i : i + 1] @ torch.cat(keys, 2).mT * WIDTH**-0.5).softmax(-1)
        rows.append(weights @ torch.cat(values, 2))
    return torch.cat(rows, 2)


@torch.no_grad()
def formula_error(generator: torch.Generator) -> float:
    """Largest difference from the formula."""
    q, k, v = torch.randn(3, 1, 1, LENGTH, WIDTH, generator=generator)
    return float((combiner(q, k, v) - formula(q, k, v)).abs().max())


@torch.no_grad()
def cost(generator: torch.Generator) -> float:
    """What torch multiplies for LONG tokens, over what dense causal attention has to."""
    q, k, v = torch.randn(3, 1, 1, LONG, WIDTH, generator=generator)
    with FlopCounterMode(display=False) as meter:
        combiner(q, k, v, LONG_SEGMENT)
    return meter.get_total_flops() / (4 * WIDTH * LONG * (LONG + 1) / 2)


class Recall(nn.Module):
    """Embedding, one head of attention without a feed-forward part, logits of the last token.

    The flag has an embedding of its own. With one embedding per flagged value every kind of attention has to learn eight
    flags, and the Combiner missed one of them in two of nine seeds.
    """

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend
        self.embed, self.flag = nn.Embedding(VALUES, WIDTH), nn.Embedding(2, WIDTH)
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.project, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, VALUES]."""
        x = self.embed(tokens % VALUES) + self.flag(tokens // VALUES) + self.place
        q, k, v = self.project(self.norm(x))[:, None].chunk(3, -1)
        return self.read((x + self.mix(self.attend(q, k, v)[:, 0]))[:, -1])


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random values, one of which, anywhere before the last token, is flagged, and that value."""
    tokens = torch.randint(VALUES, (count, LENGTH), generator=generator)
    place = torch.randint(LENGTH - 1, (count, 1), generator=generator)
    wanted = tokens.gather(1, place)
    return tokens.scatter(1, place, wanted + VALUES), wanted[:, 0]


def accuracy(attend: Attend, seed: int) -> float:
    """Of a model that was trained from the seed, on sequences it never saw."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Recall(attend)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        tokens, wanted = draw(BATCH, generator)
        loss = F.cross_entropy(model(tokens), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        tokens, wanted = draw(TESTED, generator)
        return float((model(tokens).argmax(-1) == wanted).float().mean())


def measure(seed: int) -> Trial:
    """The same model with three kinds of attention; then what the Combiner computes and multiplies."""
    ours, near, full = (accuracy(attend, seed) for attend in (combiner, local, dense))
    generator = torch.Generator().manual_seed(seed)
    wrong, share = formula_error(generator), cost(generator)
    return Trial(
        value=ours,
        control=near,
        oracle=full,
        conditions={
            "recalls": ours >= 0.95,
            "segments alone do not": near <= 0.3,
            "is its formula": wrong <= 1e-5,
            "multiplies little": 0 < share <= 0.1,
        },
        details={"largest error against the formula": wrong, "multiplied over dense at 4096": share},
    )
