"""FAVOR+ (Performer, arXiv 2009.14794): random features whose products stand for attention weights, at linear cost.

exp(q k / sqrt(D)) is the mean over random w of exp(w q' - |q'|^2 / 2) exp(w k' - |k'|^2 / 2), x' = x / D^(1/4), and
orthogonal w make the mean vary less; a generalised kernel puts relu(w x') in the place of the exponential.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_core import counters

CHUNK = 64  # tokens that a causal sum takes at a time
EXP_FLOOR, RELU_FLOOR = 1e-6, 1e-3  # added to features, so that no row of weights sums to 0


def draw_projection(features: int, width: int, generator: torch.Generator) -> Tensor:
    """Rows w [features, width]: orthogonal within every `width` of them, and as long as normal vectors are."""
    blocks = []
    for _ in range(-(-features // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator))
        blocks.append(
            (q * r.diagonal().sign()).mT
        )  # the signs of a QR are not random, and so no fair rotation
    length = torch.randn(features, width, generator=generator).norm(dim=-1, keepdim=True)
    return torch.cat(blocks)[:features] * length


def relu_features(x: Tensor, projection: Tensor) -> Tensor:
    """Features [.., T, m] of x [.., T, D] for the generalised kernel; each token's are its own, as a causal sum needs."""
    return F.relu(x * x.shape[-1] ** -0.25 @ projection.mT) + RELU_FLOOR


def exp_features(x: Tensor, projection: Tensor, over: tuple[int, ...], there: Tensor | None = None) -> Tensor:
    """Positive features [.., T, m] of x [.., T, D] for the softmax kernel.

    over: the axes along which the largest exponent is taken off: the last for queries, the last two for keys, whose
    features must keep their ratios; there bool [.., T, 1]: tokens whose exponents count for that.
    """
    near = x * x.shape[-1] ** -0.25
    exponent = near @ projection.mT - near.square().sum(-1, keepdim=True) / 2
    counted = exponent if there is None else exponent.masked_fill(~there, -torch.inf)
    shift = counted.amax(over, keepdim=True).detach()
    return ((exponent - shift).exp() + EXP_FLOOR) / math.sqrt(len(projection))


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """sum_j (q_i k_j) v_j / sum_j (q_i k_j) [.., T, E] of features q, k [.., T, m] and values v [.., T, E], over j <= i if
    causal; tokens whose features k are 0 are absent. O(T m E), and O(m E) memory beside the output."""
    v = F.pad(v, (0, 1), value=1.0)  # the last channel sums the weights
    counters.add(multiply_adds=2 * q.numel() * v.shape[-1])
    if not causal:
        total = q @ (k.mT @ v)
    else:
        state, parts = torch.zeros_like(k[..., :1, :].mT * v[..., :1, :]), []
        for near_q, near_k, near_v in zip(*(x.split(CHUNK, -2) for x in (q, k, v)), strict=True):
            parts.append((near_q @ near_k.mT).tril() @ near_v + near_q @ state)
            counters.add(multiply_adds=(near_q.numel() + near_v.numel()) * near_q.shape[-2])
            state = state + near_k.mT @ near_v
        total = torch.cat(parts, -2)
    return total[..., :-1] / total[..., -1:].clamp_min(torch.finfo(total.dtype).tiny)
