"""What is measured once on a model and used ever after: plans on disk that know which model they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.slot import AttentionSlot
from sparse_core.distill import tap

Plan = TypeVar("Plan")


def model_hash(model: nn.Module) -> str:
    """Sixteen hex digits of names, shapes, types and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_plan(path: str | Path, data: dict[str, Any]) -> Path:
    """Write a plan as JSON, whole or not at all; its folder is made where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_plan(path: str | Path, kind: str, make: Callable[[Any], Plan]) -> Plan:
    """What `make` makes of the JSON in a file. Raises ValueError naming the file where it holds no such plan."""
    try:
        return make(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a {kind}, got {error}; calibrate again") from None


def attention_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Queries [B, Hq, T, D], keys and values [B, Hkv, T, D] of every attention of a model by its name, for each of the
    batches that it is run on, without gradients and in evaluation mode; the model is left as it was.

    Attentions are `AttentionLayer`s and `AttentionSlot`s, which must be called once per batch. Raises ValueError for a
    model without any.
    """
    slots = [name for name, part in model.named_modules() if isinstance(part, AttentionSlot)]
    inner = {f"{slot}.layer".lstrip(".") for slot in slots}
    kinds = (AttentionLayer, AttentionSlot)
    names = [name for name, part in model.named_modules() if isinstance(part, kinds) and name not in inner]
    if not names:
        raise ValueError(
            "model: expected at least one AttentionLayer or AttentionSlot, got none; build its attention of them"
        )
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for batch in batches:
            with torch.no_grad(), tap(model, names) as calls:
                run(model, batch)
            if wrong := [name for name in names if len(calls[name]) != 1]:
                raise ValueError(
                    f"model: expected one call of every attention, got {len(calls[wrong[0]])} of {wrong[0] or 'itself'}"
                )
            yield {name: tuple(calls[name][0][x] for x in "qkv") for name in names}  # type: ignore[misc]
    finally:
        for module, training in modes.items():
            module.training = training


def check_model(signed: str, model: nn.Module) -> None:
    """ValueError where a plan signed with this hash was made for another model."""
    found = model_hash(model)
    if signed != found:
        raise ValueError(
            f"plan: expected one for the model {found}, got one for {signed or 'none'}; calibrate again"
        )
