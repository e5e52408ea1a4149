"""Routing Transformer (arXiv 2003.05997): the clusters that online k-means learns hold most of the attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims import Trial
from benchmarks.speed.timing import take_turns
from sparse_core import counters
from sparse_core.attention.kmeans import routing_vectors
from sparse_core.attention.masks import ClusterMask
from sparse_core.methods.attention.routing import RoutingAttention

CLAIM = "Clusters of 6% of the causal pairs hold most of the attention once online k-means has moved the centroids."
THRESHOLD = (
    "attention mass within clusters >= 0.65 and >= 2 x that of random centroids, mean of 8 draws; commitment loss falls "
    "by >= 2 x; output within 2e-5 of dense attention under the same clusters; at most 0.08 of the dense products "
    "(pairs of 16 clusters are 0.062, products with centroids 0.016) and each key and value read at most once on "
    "average"
)
SEEDS = 3
TOKENS, WIDTH, CLUSTERS, ROWS, STEPS, NOISE, CONTROLS = 2048, 64, 16, 8192, 60, 0.65, 8


def measure(seed: int) -> Trial:
    """Planted clusters with noise; centroids begin as those of noise alone, and only the updates move them."""
    generator = torch.Generator().manual_seed(seed)
    planted = torch.randn(CLUSTERS, WIDTH, generator=generator)
    train, test = (_draw(planted, rows, generator) for rows in (ROWS, TOKENS))
    attention = _begin(generator, seed)
    begun = _mass(test, _route(attention, test)[0])
    random = [_random_mass(test, generator, draw) for draw in range(CONTROLS)]
    losses = _train(attention, train)
    mask, loss = _route(attention, test)
    mass, oracle = _mass(test, mask), _mass(test, _planted_mask(planted, test))
    checks = _check(attention, test, generator)
    fall = losses[0] / loss
    control = sum(random) / CONTROLS
    return Trial(
        value=mass,
        control=control,
        oracle=oracle,
        conditions={
            "mass": mass >= 0.65,
            "above random centroids": mass >= 2 * control,
            "loss falls": fall >= 2,
            "outputs": checks["largest_error"] <= 2e-5,
            "products": 0 < checks["products_ratio"] <= 0.08,
            "bytes": 0 < checks["kv_bytes_ratio"] <= 1,
        },
        details={
            "mass_before": begun, "mass_of_best_random": max(random), "mass_of_worst_random": min(random),
            "loss_before": losses[0], "loss_after": loss, "density": mask.density(), **checks,
        },
    )  # fmt: skip


def _begin(generator: torch.Generator, seed: int) -> RoutingAttention:
    """With centroids as those of noise."""
    attention = RoutingAttention(
        1, WIDTH, CLUSTERS, TOKENS // CLUSTERS, local_heads=0, decay=0.9, commitment=1.0, seed=seed
    )
    attention.init_centroids(torch.randn(1, 1, TOKENS, WIDTH, generator=generator))
    return attention


def _random_mass(x: Tensor, generator: torch.Generator, seed: int) -> float:
    """What centroids that never learned hold. One draw scatters by a tenth of its mean, so the control is a mean."""
    return _mass(x, _route(_begin(generator, seed).eval(), x)[0])


def _draw(planted: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Queries that are their own keys, [B, 1, T, D]."""
    owner = torch.randint(0, CLUSTERS, (rows,), generator=generator)
    x = planted[owner] + NOISE * torch.randn(rows, WIDTH, generator=generator)
    return x.view(-1, 1, TOKENS, WIDTH)


def _train(attention: RoutingAttention, x: Tensor) -> list[float]:
    """Commitment losses before each of the updates."""
    attention.train()
    losses = []
    for _ in range(STEPS):
        losses.append(_route(attention, x)[1])
        attention.update_centroids()
    attention.eval()
    return losses


@torch.no_grad()
def _route(attention: RoutingAttention, x: Tensor) -> tuple[ClusterMask, float]:
    mask, aux = attention.route(x, None)
    return mask.routed, float(aux["commit_loss"])


def _others(rows: int) -> Tensor:
    """What dense attention sees: the past, and not itself unless it is the first."""
    seen = torch.ones(rows, rows, dtype=torch.bool).tril(-1)
    seen[0, 0] = True
    return seen


def _mass(x: Tensor, mask: ClusterMask | Tensor) -> float:
    """Mean over rows of the probability that dense attention gives to the pairs that a mask keeps."""
    kept = mask.to_token_mask() if isinstance(mask, ClusterMask) else mask
    scores = (x @ x.mT * WIDTH**-0.5).masked_fill(~_others(x.shape[2]), -torch.inf)
    return float((scores.softmax(-1) * kept).sum(-1).mean())


def _planted_mask(planted: Tensor, x: Tensor) -> Tensor:
    """All pairs of one planted cluster, of whatever size."""
    owner = (routing_vectors(x) @ routing_vectors(planted).mT).argmax(-1)
    return owner[..., :, None] == owner[..., None, :]


def _dense(q: Tensor, v: Tensor, mask: ClusterMask) -> Tensor:
    """Mean over clusters of dense attention under the mask of each, one cluster at a time."""
    total, times = torch.zeros_like(v), torch.zeros_like(v[..., :1])
    for kept in mask.to_token_masks().unbind(2):
        some = kept.any(-1, keepdim=True)
        total += F.scaled_dot_product_attention(q, q, v, attn_mask=kept | ~some) * some
        times += some
    return total / times.clamp_min(1)


def _check(attention: RoutingAttention, x: Tensor, generator: torch.Generator) -> dict[str, float]:
    """That the cheap way, choosing included, is the dense one's equal, and cheap."""
    v = torch.randn(x.shape, generator=generator)
    with torch.no_grad():
        with counters.count() as counter:
            ours, aux = attention(x, None, v)
        times = take_turns(
            {
                "sparse": lambda: attention(x, None, v),
                "dense": lambda: F.scaled_dot_product_attention(x, x, v, is_causal=True),
            },
            5,
        )
    return {
        "largest_error": float((ours - _dense(x, v, aux["mask"].routed)).abs().max()),
        "products_ratio": counter.products / (TOKENS * (TOKENS + 1) // 2),
        "kv_bytes_ratio": counter.kv_bytes / (2 * x.numel() * x.element_size()),
        "speed_up_over_dense": times["dense"] / times["sparse"],
    }
