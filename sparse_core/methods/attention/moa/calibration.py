"""What each entry of attention is worth: the change of the loss if it is left out and its row renormalised."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparse_core.attention.estimators import share_heads
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.masks import BlockMask

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
    """[L, Hq, K, K] in float64: the influence of every block in every `AttentionLayer` of a dense model, in the order of
    its modules, which is that of `sparsify`, summed over the calls of a layer and meant over batches of one length.

    batches: what loss(model, batch) takes; unless given, (tokens, targets [B, T], response bool [B, T]) for a model that
    returns logits [B, T, V]. Let the dense model write the responses itself. Parameters and their gradients stay as they
    are. A model of other attention gets such layers by `sparsify(model, "attention/moa", density=1.0)`. Raises ValueError
    where there are none or one is not called or sparse, for layers that differ, no batches and batches that differ.
    """
    total, count = None, 0
    for batch in batches:
        calls = _tap(model, lambda b=batch: loss(model, b), causal)
        found = _sum_calls(
            {name: [influence(*call, block=block, causal=causal) for call in x] for name, x in calls.items()}
        )
        if total is not None and total.shape != found.shape:
            raise ValueError(
                f"batches: expected all of one length, got {list(total.shape)} and {list(found.shape)} blocks"
            )
        total, count = found if total is None else total + found, count + 1
    if total is None:
        raise ValueError("batches: expected at least one, got none")
    return total / count


def _sum_calls(found: dict[str, list[Tensor]]) -> Tensor:
    """[L, H, K, K] of each layer's calls [H, K, K]."""
    shapes = {name: [list(x.shape) for x in calls] for name, calls in found.items()}
    if len({str(shape) for calls in shapes.values() for shape in calls}) > 1:
        raise ValueError(
            f"layers: expected heads and blocks alike in all, got {shapes}; calibrate those that are alike"
        )
    return torch.stack([torch.stack(calls).sum(0) for calls in found.values()])


def _tap(model: nn.Module, run: Callable[[], Tensor], causal: bool) -> dict[str, list[tuple[Tensor, ...]]]:
    """(q, k, v, dL/do) of each call of each attention by its name, of what `run`, which returns L, goes through."""
    layers: dict[str, AttentionLayer] = {
        name: part for name, part in model.named_modules() if isinstance(part, AttentionLayer)
    }
    if not layers:
        raise ValueError("model: expected at least one AttentionLayer, got none; build its attention of them")
    calls: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in layers}
    with ExitStack() as stack, torch.enable_grad():
        for name, layer in layers.items():
            note = _recorder(name, calls[name], causal)
            stack.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
        loss = run()
        if idle := [name for name, found in calls.items() if not found]:
            raise ValueError(
                f"model: expected one that calls its attention, got one that does not call {idle[0]}"
            )
        grads = iter(torch.autograd.grad(loss, [call[3] for found in calls.values() for call in found]))
    return {name: [(*call[:3], next(grads)) for call in found] for name, found in calls.items()}


def _recorder(name: str, found: list[tuple[Tensor, ...]], causal: bool) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], out: Tensor) -> None:
        length, mask = args[1].shape[2], options.get("mask")
        kept = mask.density() if isinstance(mask, BlockMask) else 1.0
        if kept < (0.5 + 0.5 / length if causal else 1) - 1e-6:
            raise ValueError(
                f"model: expected dense attention, got {name} with a mask of density {kept:.2f}; detach it, or sparsify "
                "with density=1.0"
            )
        # A frozen model has no graph of its own.
        found.append((*(x.detach() for x in args[:3]), out if out.requires_grad else out.requires_grad_()))

    return note
