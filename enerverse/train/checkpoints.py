"""Training checkpoints: safetensors only, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from enerverse.files import load_tensors, save_tensors
from enerverse.train.ema import WeightAverage

KEPT = 2


def save_checkpoint(
    run: Path, step: int, module: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> Path:
    """Write `run/checkpoints/step_0000250` (after optimiser step 250); older ones beyond the last two go."""
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


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What one checkpoint holds: tensors by name, and the step it was written after."""

    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    step: int

    def restore(self, module: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer) -> int:
        """Put everything back and return the step."""
        module.load_state_dict(self.model)
        average.load(self.average)
        _restore_optimizer(optimizer, self.optimizer)
        return self.step


def read_checkpoint(folder: Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read one checkpoint. Raises FileNotFoundError or ValueError where a file of it is missing or damaged."""
    model = load_tensors(folder / "model.safetensors", device)[0]
    average = load_tensors(folder / "average.safetensors", device)[0]
    tensors, words = load_tensors(folder / "optimizer.safetensors", device)
    if not words.get("step", "").isdigit():
        raise ValueError(
            f"{folder}: expected the step in optimizer.safetensors, found none; delete the folder"
        )
    return Checkpoint(model=model, average=average, optimizer=tensors, step=int(words["step"]))


def load_checkpoint(
    folder: Path, module: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer
) -> int:
    """Restore everything from one checkpoint and return the step it was written after."""
    device = next(module.parameters()).device
    return read_checkpoint(folder, device).restore(module, average, optimizer)


def resume(run: Path, module: nn.Module, average: WeightAverage, optimizer: torch.optim.Optimizer) -> int:
    """Restore the newest whole checkpoint of `run` and return its step, 0 where there is no checkpoint at all.

    A damaged one is passed over with a line on standard error. Raises ValueError where every one is damaged.
    """
    found, device = list_checkpoints(run), next(module.parameters()).device
    for folder in reversed(found):
        try:
            checkpoint = read_checkpoint(folder, device)
        except (ValueError, FileNotFoundError) as error:
            print(f"checkpoint passed over: {error}", file=sys.stderr, flush=True)
        else:
            return checkpoint.restore(module, average, optimizer)
    if found:
        raise ValueError(
            f"{run / 'checkpoints'}: expected a whole checkpoint, got {len(found)} damaged; delete this folder to "
            "train from the start"
        )
    return 0


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
