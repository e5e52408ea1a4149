"""What is measured once on a model and used ever after: plans on disk that know which model they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

Plan = TypeVar("Plan")


def model_hash(model: nn.Module) -> str:
    """Sixteen hex digits of names, shapes, types and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_plan(path: str | Path, data: dict[str, Any]) -> Path:
    """Write a plan as JSON, whole or not at all."""
    path = Path(path)
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
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a {kind}, got {error}; calibrate again") from None


def check_model(signed: str, model: nn.Module) -> None:
    """ValueError where a plan signed with this hash was made for another model."""
    found = model_hash(model)
    if signed != found:
        raise ValueError(
            f"plan: expected one for the model {found}, got one for {signed or 'none'}; calibrate again"
        )
