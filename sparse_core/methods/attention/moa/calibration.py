"""What each entry of attention is worth: the change of the loss if it is left out and its row renormalised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_core.attention.estimators import share_heads
from sparse_core.attention.layer import AttentionLayer

SCORES = 2**22  # scores that are held at once


def influence(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, block: int = 64, *, causal: bool = True, scale: float | None = None
) -> Tensor:  # fmt: skip
    """[Hq, K, K] in float64: E summed over blocks of queries and keys, and meant over samples.

    q [B, Hq, T, D], k, v [B, Hkv, T, D], grad [B, Hq, T, D]: the derivative of the loss by the output of the attention.
    A row's only key has none, since no span leaves it out. Rows are taken some blocks at a time.
    """
    (b, heads, length, d), blocks = q.shape, -(-q.shape[2] // block)
    q, k, v, grad = (x.double() for x in (q, share_heads(k, heads), share_heads(v, heads), grad))
    step = max(1, SCORES // (b * heads * length * block)) * block
    spare, j = blocks * block - length, torch.arange(length, device=q.device)
    parts = []
    for first in range(0, length, step):
        rows = slice(first, first + step)
        scores = q[:, :, rows] @ k.mT * (d**-0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(j > j[rows, None], -torch.inf)
        a, g = scores.softmax(-1), grad[:, :, rows] @ v.mT
        effect = a / (1 - a).clamp_min(1e-12) * ((a * g).sum(-1, keepdim=True) - g)
        effect = nn.functional.pad(effect, (0, spare, 0, -effect.shape[2] % block))
        parts.append(effect.unflatten(2, (-1, block)).unflatten(4, (-1, block)).sum((3, 5)).mean(0))
    return torch.cat(parts, 1)


def response_loss(logits: Tensor, targets: Tensor, response: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, T, V] on targets [B, T], where bool [B, T] marks the response. Raises
    ValueError for none."""
    if not response.any():
        raise ValueError("response: expected at least one token that counts, got none; mark the answer")
    return nn.functional.cross_entropy(logits[response], targets[response])


def _response_loss(model: nn.Module, batch: Any) -> Tensor:
    tokens, targets, response = batch
    return response_loss(model(tokens), targets, response)


def attention_influence(
    model: nn.Module, batches: Iterable[Any], block: int = 64, *, causal: bool = True,
    loss: Callable[[nn.Module, Any], Tensor] = _response_loss,
) -> Tensor:  # fmt: skip
    """[L, Hq, K, K] in float64: the influence of every block in every `AttentionLayer` of a dense model, in the order in
    which they run, meant over batches of one length.

    batches: what loss(model, batch) takes; unless given, (tokens, targets [B, T], response bool [B, T]) for a model that
    returns logits [B, T, V]. Let the dense model write the responses itself. Parameters and their gradients stay as they
    are. Raises ValueError for a model without such layers, for no batches and for batches of different length.
    """
    total, count = None, 0
    for batch in batches:
        found = torch.stack(
            [
                influence(*taken, block=block, causal=causal)
                for taken in _tap(model, lambda b=batch: loss(model, b))
            ]
        )
        if total is not None and total.shape != found.shape:
            raise ValueError(
                f"batches: expected all of one length, got {list(total.shape)} and {list(found.shape)} blocks"
            )
        total, count = found if total is None else total + found, count + 1
    if total is None:
        raise ValueError("batches: expected at least one, got none")
    return total / count


def _tap(model: nn.Module, run: Callable[[], Tensor]) -> list[tuple[Tensor, ...]]:
    """(q, k, v, dL/do) of each attention that `run`, which returns L, goes through."""
    calls: list[tuple[Tensor, ...]] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        # A frozen model has no graph of its own.
        calls.append((*(x.detach() for x in args[:3]), out if out.requires_grad else out.requires_grad_()))

    layers = [module for module in model.modules() if isinstance(module, AttentionLayer)]
    if not layers:
        raise ValueError("model: expected at least one AttentionLayer, got none; build its attention of them")
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.enable_grad():
            grads = torch.autograd.grad(run(), [call[3] for call in calls])
    finally:
        for hook in hooks:
            hook.remove()
    return [(*call[:3], grad) for call, grad in zip(calls, grads, strict=True)]
