"""One training loop for autoencoder, world model and policy."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm.auto import tqdm

from enerverse.files import append_metrics, cut_metrics, total_seconds
from enerverse.train.checkpoints import resume, save_checkpoint
from enerverse.train.ema import WeightAverage


class Task(Protocol):
    """What is trained. `batch` and `loss` are pure functions of the step, so a resumed run repeats
    exactly."""

    @property
    def module(self) -> nn.Module: ...

    def batch(self, step: int, /) -> Any: ...

    def loss(self, batch: Any, generator: torch.Generator, /) -> tuple[Tensor, dict[str, float]]: ...


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation: AdamW, linear warm-up, cosine to `final` of the rate, clipping by norm, averaged
    weights."""

    steps: int = 1000
    batch: int = 8
    rate: float = 2e-3
    final: float = 0.05
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.99
    precision: str = "bf16"
    seed: int = 0
    save_every: int = 500
    log_every: int = 20
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"precision: expected 'no' or 'bf16', got {self.precision!r}")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch: expected at least 1, got {self.steps} and {self.batch}")

    def rate_at(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (
            self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        )


class TrainingStopped(Exception):
    """Training was interrupted and saved; the message says how to go on."""


class NotFinite(RuntimeError):
    """The loss or a gradient became NaN or infinite; the message names the step."""


def train(
    task: Task,
    config: TrainConfig,
    run: Path,
    *,
    name: str = "training",
    device: str | None = None,
    evaluate: Callable[[nn.Module, int], dict[str, float]] | None = None,
    evaluate_every: int = 0,
) -> nn.Module:
    """Train `task.module` for `config.steps` steps in the folder `run` and return it with averaged weights.

    Goes on from the newest whole checkpoint in `run` and drops the records after it. Raises TrainingStopped after
    Ctrl-C (state saved), NotFinite, naming the step, when the loss is no longer a number (the last checkpoint stays),
    and ValueError where no checkpoint in `run` is whole.
    """
    run.mkdir(parents=True, exist_ok=True)
    accelerator, module, optimizer = _prepare(task.module, config, device)
    plain = accelerator.unwrap_model(module)
    average = WeightAverage(plain, config.average)
    start = resume(run, plain, average, optimizer)
    spent = _Spent(cut_metrics(run, start))
    writer = _tensorboard(run) if config.tensorboard else None
    bar = tqdm(
        range(start, config.steps),
        initial=start,
        total=config.steps,
        desc=name,
        disable=not sys.stderr.isatty(),
    )
    with _interruptible() as interrupted:
        for step in bar:
            row = _one_step(task, module, optimizer, accelerator, config, step)
            average.update(plain, step + 1)
            done = step + 1
            if _due(done, config.log_every, config.steps):
                _record(run, row | {"step": done, **spent.seconds()}, bar, writer)
            if evaluate is not None and _due(done, evaluate_every, config.steps):
                append_metrics(run, {"step": done, **_evaluate_average(plain, average, evaluate, done)})
            stop = interrupted()
            if stop or _due(done, config.save_every, config.steps):
                save_checkpoint(run, done, plain, average, optimizer)
            if stop and done < config.steps:
                raise TrainingStopped(
                    f"stopped after step {done}, saved in {run}; run the same command again to go on"
                )
    plain.load_state_dict(average.average)
    return plain


def _prepare(
    module: nn.Module, config: TrainConfig, device: str | None
) -> tuple[Accelerator, nn.Module, Any]:
    """Accelerate's front for `module`, the module as it wraps it, and the optimiser."""
    # Accelerate keeps the first precision it was given for the whole process; one process may train several parts.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=config.precision, cpu=device == "cpu")
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=config.rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        foreach=True,
    )
    module, optimizer = accelerator.prepare(module, optimizer)
    return accelerator, module, optimizer


def _due(done: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never), and at the end, is due after step `done`."""
    return every > 0 and (done % every == 0 or done == steps)


class _Spent:
    """Seconds of this run over all its starts, by the clock and of the processor; `records`: those of earlier starts."""

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self._wall = total_seconds(records) - time.perf_counter()
        self._cpu = total_seconds(records, "cpu_seconds") - time.process_time()

    def seconds(self) -> dict[str, float]:
        """Both until now."""
        return {
            "seconds": self._wall + time.perf_counter(),
            "cpu_seconds": self._cpu + time.process_time(),
        }


def _one_step(
    task: Task, module: nn.Module, optimizer: Any, accelerator: Accelerator, config: TrainConfig, step: int
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = config.rate_at(step)
    # Noise depends on the seed and the step alone, never on how often the run was restarted; torch's own
    # generator serves modules that draw without asking, such as the sampling of a KL autoencoder.
    seed = config.seed * 1_000_003 + step
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    with accelerator.autocast():
        loss, logs = task.loss(task.batch(step), generator)
    accelerator.backward(loss)
    norm = float(torch.as_tensor(accelerator.clip_grad_norm_(module.parameters(), config.clip)))
    if not (math.isfinite(loss.item()) and math.isfinite(norm)):
        raise NotFinite(
            f"step {step + 1}: expected a finite loss and gradient, got loss {loss.item():.4g} and "
            f"gradient norm {norm:.4g}; lower the rate, or look at the data of this step"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": float(loss.detach()), "gradient": norm, "rate": config.rate_at(step), **logs}


@torch.no_grad()
def _evaluate_average(
    module: nn.Module,
    average: WeightAverage,
    evaluate: Callable[[nn.Module, int], dict[str, float]],
    step: int,
) -> dict[str, float]:
    trained = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(average.average)
    module.eval()
    results = evaluate(module, step)
    module.load_state_dict(trained)
    module.train()
    return results


def _record(run: Path, row: dict[str, float], bar: Any, writer: Any) -> None:
    append_metrics(run, row)
    bar.set_postfix(loss=f"{row['loss']:.4f}")
    if writer is not None:
        for key, value in row.items():
            writer.add_scalar(key, value, row["step"])


def _tensorboard(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard: expected the package, found none; run pip install 'enerverse[logging]'"
        ) from error
    return SummaryWriter(str(run))


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a request to stop after the current step; a second one is
    immediate."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
