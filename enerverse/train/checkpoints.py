"""Training checkpoints: safetensors only, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from enerverse.files import load_tensors, save_tensors
from enerverse.train.ema import WeightAverage

KEPT = 2


def save_checkpoint(
    run: Path, step: int, module: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> Path:
    """Write `run/checkpoints/step_XXXXXXX` after optimiser step `step`; older ones beyond the last two go."""
    folder = run / "checkpoints"
    final, temporary = folder / f"step_{step:07d}", folder / f".step_{step:07d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_tensors(temporary / "model.safetensors", module.state_dict())
        save_tensors(temporary / "average.safetensors", average.average)
        save_tensors(
            temporary / "optimizer.safetensors", _optimizer_tensors(optimizer), {"step": json.dumps(step)}
        )
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def load_checkpoint(
    folder: Path, module: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> int:
    """Restore everything from one checkpoint and return the step it was written after."""
    device = next(module.parameters()).device
    module.load_state_dict(load_tensors(folder / "model.safetensors", device)[0])
    average.load(load_tensors(folder / "average.safetensors", device)[0])
    tensors, words = load_tensors(folder / "optimizer.safetensors", device)
    _restore_optimizer(optimizer, tensors)
    return json.loads(words["step"])


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, row in state.items()
        for name, value in row.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
