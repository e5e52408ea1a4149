"""What a small network learns from a frozen model's attention: the inputs of its attention modules, what it looked at,
and the steps that fit the small one to it.

The picture of a long attention is pooled: for blocks I of queries and J of keys,

    P(I, J) = max over i in I, j in J of softmax(scale q k^T)_ij = max over i of exp(r_iJ - lse_i),

where r_iJ is the highest score of row i in J. Rows are taken some at a time, with the log-sum-exp of the whole row, so
that no [Tq, Tk] tensor exists (SeerAttention, arXiv 2410.13276, does the same inside a flash kernel).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_core.attention.estimators import pool_blocks
from sparse_core.errors import unknown

ROWS = 64  # query rows whose scores are held at once
FULL = 2048  # tokens up to which a whole attention matrix may be asked for


class Learned(Protocol):
    """A module that knows what its weights only mean something with, as JSON has it."""

    def settings(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


Student = TypeVar("Student", bound=nn.Module)
Loss = Callable[[Student, Mapping[str, Any]], Tensor]
"""Of a student and one call of the module it learns from: what it has to lower."""


@torch.no_grad()
def pooled_attention(
    q: Tensor, k: Tensor, block: int | tuple[int, int] = 64, *, causal: bool = True,
    kind: Literal["max", "mass"] = "max", scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Dense attention of q [B, Hq, Tq, D] over k [B, Hkv, Tk, D] in blocks, [B, Hq, Kq, Kk] float32, without gradients.

    kind: `max`, the highest probability of a query and a key of the two blocks; `mass`, what a query of the block gives
    all keys of the other, on average, so that rows sum to 1. block: tokens of a block, or (query, key) tokens. causal:
    the queries are the last Tq tokens. Holds B Hq max(64, block) Tk scores. Raises ValueError for what does not fit.
    """
    bq, bk = (block, block) if isinstance(block, int) else block
    if min(bq, bk) < 1:
        raise ValueError(f"block: expected at least one token, got {block}")
    if kind not in ("max", "mass"):
        raise ValueError(f"kind: expected max or mass, got {kind!r}")
    _check(q, k, causal)
    tq, tk = q.shape[2], k.shape[2]
    pooled = torch.zeros(*q.shape[:2], -(-tq // bq), -(-tk // bk), device=q.device)
    step = bq * max(1, ROWS // bq)
    for first in range(0, tq, step):
        scores = _scores(q[:, :, first : first + step], k, first + tk - tq if causal else None, scale)
        near = F.pad(scores, (0, -scores.shape[-1] % bk), value=-torch.inf).unflatten(-1, (-1, bk))
        highest = near.amax(-1) if kind == "max" else near.logsumexp(-1)
        rows = pool_blocks(
            (highest - scores.logsumexp(-1, keepdim=True)).exp(), bq, "max" if kind == "max" else "avg"
        )
        pooled[:, :, first // bq : first // bq + rows.shape[2], : rows.shape[3]] = rows
    return pooled


@torch.no_grad()
def full_attention(q: Tensor, k: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """Dense attention probabilities [B, Hq, Tq, Tk] float32. ValueError for more than 2048 tokens: pool those."""
    _check(q, k, causal)
    tq, tk = q.shape[2], k.shape[2]
    if max(tq, tk) > FULL:
        raise ValueError(f"tokens: expected at most {FULL}, got {max(tq, tk)}; take pooled_attention")
    return _scores(q, k, tk - tq if causal else None, scale).softmax(-1)


def _check(q: Tensor, k: Tensor, causal: bool) -> None:
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"q, k: expected [B, H, T, D] of one B and D, got {list(q.shape)} and {list(k.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"heads: expected a multiple of the {k.shape[1]} key-value heads, got {q.shape[1]} query heads"
        )
    if causal and k.shape[2] < q.shape[2]:
        raise ValueError(
            f"k: expected at least as many keys as the {q.shape[2]} queries of causal attention, got {k.shape[2]}"
        )


def _scores(q: Tensor, k: Tensor, first: int | None, scale: float | None) -> Tensor:
    """Scaled products [B, Hq, n, m] in float32. first: the place of the first query among the keys, of which those after
    the last query are left out and others that lie ahead are -inf; None when every key is seen."""
    n = q.shape[2]
    if first is not None:
        k = k[:, :, : first + n]
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k.float()[:, :, None].mT).flatten(1, 2) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if first is None:
        return scores
    i, j = torch.arange(n, device=q.device)[:, None] + first, torch.arange(k.shape[2], device=q.device)
    return scores.masked_fill(j > i, -torch.inf)


@contextmanager
def tap(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """What the named modules of `model` are called with while the block runs: by module name, one dict per call from the
    names of its forward's arguments to their values, tensors without their graph.

    Example: `with tap(model, ["layers.0.attention"]) as calls: model(x)`, then `calls["layers.0.attention"][0]["q"]`.
    Raises ValueError for a name that is none, with the closest one.
    """
    modules, calls = dict(model.named_modules()), {name: [] for name in names}
    with ExitStack() as stack:
        for name, found in calls.items():
            if name not in modules:
                raise unknown("module", name, modules)
            handle = modules[name].register_forward_pre_hook(_recorder(found), with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


def _recorder(found: list[dict[str, Any]]):
    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = signature(module.forward).bind(*args, **kwargs).arguments
        found.append({key: x.detach() if isinstance(x, Tensor) else x for key, x in given.items()})

    return record


def fit(
    parameters: Iterable[nn.Parameter],
    losses: Iterable[Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    warm_up: int = 20,
) -> list[float]:
    """Train `parameters`, and nothing else, by one step of AdamW without decay for each of the first `steps` of `losses`,
    which are computed as they are asked for; the rate rises over `warm_up` steps and falls along a cosine.

    Returns the losses. Raises ValueError where there are fewer than `steps`, or nothing to train.
    """
    trained, found = list(parameters), []
    if not trained or steps < 1:
        raise ValueError(f"parameters, steps: expected at least one each, got {len(trained)} and {steps}")
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for step, loss in zip(range(steps), losses, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * _rate(step, steps, warm_up)
        optimizer.zero_grad()
        loss.backward(inputs=trained)
        optimizer.step()
        found.append(loss.item())
    if len(found) < steps:
        raise ValueError(f"losses: expected {steps}, got {len(found)}; give more batches or take fewer steps")
    return found


def _rate(step: int, steps: int, warm_up: int) -> float:
    """Share of the highest learning rate."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def distill(
    model: nn.Module, students: Mapping[str, Student], batches: Iterable[Any], loss: Loss[Student], *, steps: int,
    lr: float = 1e-3, warm_up: int = 20, run: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
) -> list[float]:  # fmt: skip
    """Train students, by the name of the module of `model` that each learns from, with one batch per step; `fit` says how.

    The model runs without gradients and in evaluation mode, and is left as it was. Returns the losses, means over calls.
    Raises ValueError for a module that the model does not call.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        weights = [weight for student in students.values() for weight in student.parameters()]
        losses = (_loss(model, students, batch, loss, run) for batch in batches)
        return fit(weights, losses, steps=steps, lr=lr, warm_up=warm_up)
    finally:
        for module, training in modes.items():
            module.training = training


def _loss(
    model: nn.Module,
    students: Mapping[str, Student],
    batch: Any,
    loss: Loss[Student],
    run: Callable[..., Any],
) -> Tensor:
    with torch.no_grad(), tap(model, students) as calls:
        run(model, batch)
    idle = [name for name, found in calls.items() if not found]
    if idle:
        raise ValueError(f"students: expected modules that the model calls, got {idle[0]}, which it does not")
    return torch.stack([loss(students[name], call) for name, found in calls.items() for call in found]).mean()


def save_learned(path: str | Path, students: Mapping[str, Learned]) -> Path:
    """Write students by name, with their settings, as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {f"{name}/{key}": x for name, part in students.items() for key, x in part.state_dict().items()}
    settings = json.dumps({name: part.settings() for name, part in students.items()})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {key: x.contiguous() for key, x in tensors.items()}, temporary, metadata={"settings": settings}
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_learned(path: str | Path, students: Mapping[str, Learned]) -> None:
    """Fill students by name from what `save_learned` wrote. Raises ValueError, before anything is changed, for a file that
    is none, and where names, settings or shapes differ."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected learned weights, got {error!r}; save them again") from None
    if sorted(settings) != sorted(students):
        raise ValueError(f"names: expected {', '.join(sorted(settings))}, got {', '.join(sorted(students))}")
    for name, part in students.items():
        _compare(name, settings[name], part.settings())
        for key, ours in part.state_dict().items():
            found = tensors.get(f"{name}/{key}")
            if found is None or found.shape != ours.shape:
                got = "none" if found is None else list(found.shape)
                raise ValueError(
                    f"{name}/{key}: expected {list(ours.shape)}, got {got}; save the weights again"
                )
    for name, part in students.items():
        part.load_state_dict({key: tensors[f"{name}/{key}"] for key in part.state_dict()})


def _compare(name: str, trained: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for key in sorted({*trained, *ours}):
        if trained.get(key) != ours.get(key):
            raise ValueError(
                f"{name}: expected {key} {trained.get(key)}, with which it was trained, got {ours.get(key)}; make it so"
            )
