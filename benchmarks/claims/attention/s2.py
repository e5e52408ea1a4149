"""S2-Attention: heads that each keep one shard of the far tokens together remember what a window of equal cost forgets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.claims import Trial
from benchmarks.speed.timing import take_turns
from sparse_core.attention.masks import BlockMask, causal
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.methods.attention.s2 import local_stride_mask

CLAIM = "Two layers of sharded heads copy tokens from beyond any window of equal cost, and cost follows density on a CPU."
# Over seeds 11 to 15 shards had .990 to .999, and a forward pass was 6.8 times as fast. The window is bounded by chance
# and ten points, since nothing from DISTANCE back can reach it; its density is no less than that of the shards.
THRESHOLD = (
    "copying over 128 tokens of 256: accuracy of sharded heads >= .95, of a window of at least their density <= 1/16 + "
    ".10; forward pass at T = 8192, H = 4, density .15 of the causal pairs >= 2 times as fast as dense causal attention"
)
SEEDS = 3
LENGTH, DISTANCE, BLOCK, STRIDE, WINDOW = 256, 128, 16, 4, 4
WIDTH, HEADS, LAYERS, TOKENS = 64, 4, 2, 16
STEPS, BATCH, TESTED = 300, 16, 64
LONG, REPEATS = 8192, 3
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def shards() -> BlockMask:
    """Own block and every fourth of the earlier ones, other ones for each head."""
    return local_stride_mask(HEADS, LENGTH, block=BLOCK, local_blocks=1, stride=STRIDE)


def window() -> BlockMask:
    """The nearest WINDOW blocks. Two layers reach back less than DISTANCE, so nothing but chance is left."""
    n = LENGTH // BLOCK
    apart = torch.arange(n)[:, None] - torch.arange(n)
    kept = (apart >= 0) & (apart < WINDOW)
    return BlockMask.from_dense_blocks(
        kept.expand(HEADS, n, n),
        full=kept & (apart > 0),
        rule=causal,
        block_size=BLOCK,
        q_len=LENGTH,
        kv_len=LENGTH,
    )


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(mask: BlockMask) -> Attend:
    return lambda q, k, v: block_sparse_attention(q, k, v, mask)  # type: ignore[return-value]


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.project, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, WIDTH]."""
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.project(self.norms[0](x)).chunk(3, -1)
        )
        x = x + self.mix(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.feed(self.norms[1](x))


class LanguageModel(nn.Module):
    """Two layers over tokens and sinusoids of their positions."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.embed, self.read = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS)
        self.layers = nn.Sequential(*(Layer(attend) for _ in range(LAYERS)))
        angles = torch.arange(LENGTH)[:, None] * LENGTH ** -(torch.arange(WIDTH // 2) * 2 / WIDTH)
        self.register_buffer("place", torch.cat([angles.sin(), angles.cos()], -1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, TOKENS] of the token after each."""
        return self.read(self.layers(self.embed(tokens) + self.place))


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Random tokens [n, T + 1] that repeat themselves after DISTANCE."""
    tokens = torch.randint(TOKENS, (count, DISTANCE), generator=generator)
    return tokens.repeat(1, math.ceil((LENGTH + 1) / DISTANCE))[:, : LENGTH + 1]


def run(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and tokens wanted, where what comes next has been seen."""
    return model(tokens[:, :-1])[:, DISTANCE - 1 :], tokens[:, DISTANCE:]


def accuracy(attend: Attend, seed: int) -> float:
    """Of copied tokens, by a model that was trained from the seed, on sequences it never saw."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), LanguageModel(attend)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        logits, wanted = run(model, draw(BATCH, generator))
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        logits, wanted = run(model, draw(TESTED, generator))
    return float((logits.argmax(-1) == wanted).float().mean())


@torch.no_grad()
def speed(seed: int) -> tuple[float, float]:
    """Density of a long mask, and how many times faster than dense attention the forward pass under it is."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, HEADS, LONG, WIDTH, generator=generator) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # four heads cannot cover everything at this density
        mask = local_stride_mask(HEADS, LONG, block=64, local_blocks=2, stride=8)
    times = take_turns({"ours": lambda: masked(mask)(q, k, v), "dense": lambda: dense(q, k, v)}, REPEATS)
    return mask.density(everything(LONG)), times["dense"] / times["ours"]


def everything(length: int) -> BlockMask:
    return BlockMask.from_rule(causal, q_len=length, kv_len=length, block_size=64)


def measure(seed: int) -> Trial:
    """Train three models that differ in what their heads may see; then the speed."""
    ours, near, full = (accuracy(attend, seed) for attend in (masked(shards()), masked(window()), dense))
    densities = [mask.density(everything(LENGTH)) for mask in (shards(), window())]
    density, times = speed(seed)
    return Trial(
        value=ours,
        control=near,
        oracle=full,
        conditions={
            "shards copy": ours >= 0.95,
            "a window does not": near <= 1 / TOKENS + 0.1,
            "shards are no denser": densities[0] <= densities[1],
            "density": 0 < density <= 0.15,
            "speed": times >= 2,
        },
        details={
            "density of the shards": densities[0],
            "density of the window": densities[1],
            "density at 8192": density,
            "times faster than dense": times,
        },
    )
