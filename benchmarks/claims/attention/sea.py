"""SEA learns where a teacher attends, from linear attention alone."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.claims import Trial
from sparse_core.attention import select
from sparse_core.attention.masks import TokenCSR
from sparse_core.attention.performer import exp_features, linear_attention
from sparse_core.distill import full_attention
from sparse_core.methods.attention.sea import SEAAttention

CLAIM = "After 150 distillation steps the estimated mask holds most of the teacher's attention in a quarter of the keys."
THRESHOLD = (
    "mass >= 0.70 with 64 of 256 keys per row (a random mask holds 0.25, the best one 0.98), and more than the map that "
    "the untrained random features stand for; the mask keeps no more than those 64 of 256; divergence from the "
    "teacher's map <= 1.25 on new texts, and less than that of the teacher's mean map; gradients reach the estimator"
)
SEEDS = 3
HEADS, WIDTH, LENGTH, CELLS, KEYS = 4, 32, 256, 64, 64
LEVEL, NOISE, IDLE = 5.5, 0.3, 2.0
TOPICS, RUN, BATCH, STEPS, TESTS = 8, 16, 4, 150, 16


class Teacher:
    """Dense attention over texts of 16 runs of 16 tokens, each topic in two runs at random places.

    A token's key says its topic; its query wants a topic, which one each head decides. So a row has 32 wanted keys of
    256, and where they are no map says that does not look at the text: at any place every topic is as likely. Queries
    and keys are loud along axes that their products do not see, which random features have to make out.
    """

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.axes = torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH, generator=generator)).Q
        self.values = torch.randn(TOPICS, WIDTH, generator=generator)
        self.wanted = torch.stack([torch.randperm(TOPICS, generator=generator) for _ in range(HEADS)])

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v [B, H, T, D] and the map [B, H, T, T]."""
        runs = torch.rand(batch, LENGTH // RUN, generator=self.generator).argsort(-1) % TOPICS
        topic = runs.repeat_interleave(RUN, -1)
        heads = torch.arange(HEADS)[:, None]
        q = self._vectors(self.wanted[heads, topic[:, None]], slice(TOPICS, 20))
        k = self._vectors(topic[:, None].expand(-1, HEADS, -1), slice(20, WIDTH))
        v = self.values[topic][:, None] + NOISE * torch.randn(k.shape, generator=self.generator)
        return q, k, v, full_attention(q, k, causal=False)

    def _vectors(self, topic: Tensor, idle: slice) -> Tensor:
        """[B, H, T, D]: the topic's axis, noise everywhere, and more of it along the idle axes."""
        noise = NOISE * torch.randn(*topic.shape, WIDTH, generator=self.generator)
        noise[..., idle] *= IDLE / NOISE
        return (noise + LEVEL * torch.nn.functional.one_hot(topic, WIDTH)) @ self.axes


def held(mask: TokenCSR, teacher: Tensor) -> float:
    """Mean over rows of the teacher's attention that a mask keeps."""
    return float((teacher * mask.to_token_mask()).sum(-1).mean())


def cells_of(scores: Tensor) -> TokenCSR:
    """The best cells of scores [B, H, T, K], heads together, as the method takes them."""
    keep = HEADS * KEYS * CELLS // LENGTH
    return TokenCSR.from_cells(select.grouped_topk(scores, keep, 1), torch.full((LENGTH,), LENGTH), LENGTH)


def pooled(dense: Tensor) -> Tensor:
    """The weight of every cell [.., K] of a map [.., T]."""
    return dense.unflatten(-1, (CELLS, -1)).sum(-1)


def guess(model: SEAAttention, q: Tensor, k: Tensor) -> Tensor:
    """The map [B, H, T, T] that the random features stand for, without anything learned."""
    near = exp_features(q, model.projection, (-1,)), exp_features(k, model.projection, (-2, -1))
    return linear_attention(*near, torch.eye(LENGTH), causal=False)


def divergence(teacher: Tensor, other: Tensor) -> float:
    """Mean KL of rows."""
    return float((torch.xlogy(teacher, teacher) - teacher * other.clamp_min(1e-12).log()).sum(-1).mean())


def train(model: SEAAttention, teacher: Teacher) -> tuple[Tensor, float]:
    """Train on fresh texts. The mean map [H, T, T], and the size of the first gradient of the estimator."""
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    gradient, total = 0.0, torch.zeros(HEADS, LENGTH, LENGTH)
    for step in range(STEPS):
        q, k, v, truth = teacher.draw(BATCH)
        model(q, k, v, truth)
        loss = model.loss()
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            gradient = sum(
                float(p.grad.abs().sum()) for p in model.decoder.parameters() if p.grad is not None
            )
        optimiser.step()
        total += truth.sum(0)
    return total / (STEPS * BATCH), gradient


@torch.no_grad()
def test(model: SEAAttention, teacher: Teacher, mean: Tensor) -> tuple[dict[str, float], float, float]:
    """On other texts: the figures, the mass of a random mask, and that of the best mask."""
    q, k, v, truth = teacher.draw(TESTS)
    _, aux = model.eval()(q, k, v, truth)
    mean, features = mean.expand_as(truth), guess(model, q, k)
    noise = torch.rand(TESTS, HEADS, LENGTH, CELLS, generator=teacher.generator)
    figures = {
        "mass": held(aux["mask"], truth),
        "mass_mean_map": held(cells_of(pooled(mean)), truth),
        "mass_features": held(cells_of(pooled(features)), truth),
        "kl": float(aux["kl"]),
        "kl_uniform": divergence(truth, torch.full_like(truth, 1 / LENGTH)),
        "kl_mean_map": divergence(truth, mean),
        "kl_features": divergence(truth, features),
        "density": aux["mask"].density(),
    }
    return figures, held(cells_of(noise), truth), held(cells_of(pooled(truth)), truth)


def measure(seed: int) -> Trial:
    """Train, then test."""
    torch.manual_seed(seed)
    teacher = Teacher(torch.Generator().manual_seed(seed))
    model = SEAAttention(HEADS, WIDTH, pred_len=CELLS, k=KEYS)
    mean, gradient = train(model, teacher)
    figures, control, oracle = test(model, teacher, mean)
    return Trial(
        value=figures["mass"],
        control=control,
        oracle=oracle,
        conditions={
            "mass": figures["mass"] >= max(0.70, figures["mass_features"]),
            "divergence": figures["kl"] <= min(1.25, figures["kl_mean_map"]),
            "a quarter of the keys": figures["density"] <= KEYS / LENGTH + 1e-6,
            "gradients": gradient > 0,
        },
        details={**figures, "gradient": gradient},
    )
