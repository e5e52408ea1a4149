"""SeerAttention (arXiv 2410.13276) on needles: one key of every block of 64 carries a word, and queries ask for words.

All keys of a block share a context, and each has noise of its own; together they bury the word's 1/64 in an average of the
block, while a word that is asked for outweighs them in attention: its logit is 8, that of the rest has a deviation of 0.4.
Without the shared context average pooling would find most words, as 1/64 of one outweighs the mean of the noise. Every
head sees the same content through its own rotation, which a gate has to learn.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.claims import Trial
from sparse_core.attention.calibrate import model_hash
from sparse_core.attention.estimators import MeanPool
from sparse_core.attention.gate import BlockGate
from sparse_core.attention.masks import BlockMask, causal
from sparse_core.distill import full_attention, pooled_attention
from sparse_core.methods.attention.seer import distill_gates

CLAIM = (
    "A gate distilled in 150 steps finds blocks by needles that average pooling loses, and changes no weight."
)
THRESHOLD = (
    "top 3 blocks and the diagonal of 16 keep at least 0.9 of the attention that the best such choice keeps, and at "
    "least 1.4 times that of mean-pooled queries and keys, and no row keeps more than these 4 blocks; pooled attention "
    "within 1e-5 of max_pool2d(softmax); equal model hash"
)
SEEDS = 3
HEADS, WIDTH, BLOCK, TOKENS, KEPT, STEPS, BATCH = 4, 64, 64, 1024, 3, 150, 4
WORDS, SPREAD = 32, 0.3  # orthogonal words of length sqrt(D); deviation of context and noise per channel


class Attention(nn.Module):
    """Dense causal attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, T, D]."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Frozen(nn.Module):
    """One layer whose heads rotate the content of queries and keys, each in its own way."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.words = nn.Parameter(_rotations(1, generator)[0, :WORDS] * WIDTH**0.5)
        self.rotations = nn.Parameter(_rotations(HEADS, generator))
        self.attention = Attention()

    def heads(self, x: Tensor) -> Tensor:
        """[B, H, T, D] of content [B, T, D]."""
        return torch.einsum("btd,hde->bhte", x, self.rotations)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """[B, H, T, D] of the content of queries and keys."""
        q, k = (self.heads(x) for x in batch)
        return self.attention(q=q, k=k, v=k)


def _rotations(count: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(count, WIDTH, WIDTH, generator=generator))[0]


def draw(words: Tensor, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Content of queries and keys [B, T, D]: each block holds a word of its own, at a random token; the queries of a block
    ask for the words of up to three random blocks before it."""
    blocks, block_of = TOKENS // BLOCK, torch.arange(TOKENS) // BLOCK
    own = words[torch.rand(batch, WORDS, generator=generator).argsort(-1)[:, :blocks]]
    k = torch.randn(batch, blocks, WIDTH, generator=generator)[:, block_of]
    k = SPREAD * (k + torch.randn(batch, TOKENS, WIDTH, generator=generator))
    places = torch.arange(blocks) * BLOCK + torch.randint(BLOCK, (batch, blocks), generator=generator)
    k.scatter_(1, places[..., None].expand(-1, -1, WIDTH), own)
    before = torch.ones(blocks, blocks).tril(-1).bool()
    order = torch.rand(batch, blocks, blocks, generator=generator).masked_fill(~before, -1).topk(KEPT, -1)
    pick = torch.randint(KEPT, (batch, TOKENS, 1), generator=generator)
    asked, there = (x[:, block_of].gather(2, pick) for x in (order.indices, order.values))
    q = own.gather(1, asked.expand(-1, -1, WIDTH)) * (there >= 0)
    return q + SPREAD * torch.randn(batch, TOKENS, WIDTH, generator=generator), k


def choose(scores: Tensor) -> BlockMask:
    """The best three blocks of every row, and the diagonal."""
    blocks = scores.shape[-1]
    ahead = torch.ones(blocks, blocks).triu(1).bool()
    return BlockMask.from_topk(
        scores.masked_fill(ahead, -torch.inf), KEPT, force=torch.eye(blocks).bool(), rule=causal,
        block_size=BLOCK, q_len=TOKENS, kv_len=TOKENS,
    )  # fmt: skip


@torch.no_grad()
def kept_mass(model: Frozen, gate: BlockGate, seed: int) -> dict[str, float]:
    """Share of attention that the choice of each kept, on data that no step saw."""
    generator = torch.Generator().manual_seed(100_000 + seed)
    q, k = (model.heads(x) for x in draw(model.words, BATCH, generator))
    mass = pooled_attention(q, k, BLOCK, kind="mass")
    masks = {
        "gate": gate.to_mask(gate(q, k), TOKENS, budget=KEPT * BLOCK),
        "mean_pool": choose(MeanPool(BLOCK).score(q, k)),
        "random": choose(torch.rand(mass.shape, generator=generator)),
        "oracle": choose(mass),
    }
    exact = F.max_pool2d(full_attention(q, k), BLOCK)
    found = {name: float((mask.blocks * mass).sum(-1).mean()) for name, mask in masks.items()}
    return found | {
        "pool_error": float((pooled_attention(q, k, BLOCK) - exact).abs().max()),
        "most_blocks": float(masks["gate"].blocks.sum(-1).max()),
    }


def measure(seed: int) -> Trial:
    """Distil with fresh data in every step, then choose."""
    generator = torch.Generator().manual_seed(seed)
    model = Frozen(generator)
    gate = BlockGate(HEADS, HEADS, WIDTH, BLOCK, seed=seed)
    untrained, before = kept_mass(model, gate, seed), model_hash(model)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield draw(model.words.detach(), BATCH, generator)

    losses = distill_gates(model, batches(), steps=STEPS, gates={"attention": gate})
    found, unchanged = kept_mass(model, gate, seed), model_hash(model) == before
    details = {"untrained": untrained["gate"]}
    details |= {name: found[name] for name in ("random", "pool_error", "most_blocks")}
    return Trial(
        value=found["gate"],
        control=found["mean_pool"],
        oracle=found["oracle"],
        conditions={
            "near the best": found["gate"] >= 0.9 * found["oracle"],
            "above pooling": found["gate"] >= 1.4 * found["mean_pool"],
            "blocks": found["most_blocks"] <= KEPT + 1,
            "pooled attention": found["pool_error"] <= 1e-5,
            "weights unchanged": unchanged,
        },
        details=details
        | {"first_loss": losses[0], "last_loss": losses[-1], "weights_unchanged": float(unchanged)},
    )
