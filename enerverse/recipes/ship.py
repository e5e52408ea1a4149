"""Copy a trained recipe's checkpoint into the package and write its card from what was measured.

python -m enerverse.recipes.ship --run runs/tiny
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

import enerverse
from enerverse.config import from_json
from enerverse.files import atomic_write, read_metrics
from enerverse.presets import Preset
from enerverse.recipes.tiny import SPLITS, TASKS

HOME = Path(enerverse.__file__).parent / "checkpoints" / "tiny"
LIMIT_MB = 16


@dataclass(frozen=True, kw_only=True)
class Ship:
    """Copy `run/checkpoint` to the package folder. run: recipe folder. to: where the package keeps it."""

    run: Path = Path("runs/tiny")
    to: Path = HOME


def training_rows(run: Path) -> list[str]:
    """One table row per trained part: steps, batch, seed, seconds, last loss."""
    rows = []
    for part in ("autoencoder", "world", "policy"):
        preset = from_json(Preset, (run / part / "config.json").read_text())
        config = getattr(preset, f"train_{part}")
        last = [row for row in read_metrics(run / part) if "loss" in row][-1]
        rows.append(
            f"| {part} | {last['step']} | {config.batch} | {config.seed} | {last['seconds']:.0f} | {last['loss']:.4f} |"
        )
    return rows


def card(run: Path) -> str:
    """The text of `card.md`."""
    frames = {task: f"{count} episodes" for task, count in TASKS.items()}
    data = "\n".join(
        f"- {task}: {count}, seeds from {100_000 * i}" for i, (task, count) in enumerate(frames.items())
    )
    held_out = ", ".join(
        f"{name} (seeds + {first})" for name, (first, _, _) in SPLITS.items() if name != "train"
    )
    table = "\n".join(training_rows(run))
    return f"""# tiny

World model and policy of the `tiny` preset: 64 x 64 pixels, three static views, 8 x 8 latents, chunks of 8 frames with 4
memory frames. Trained by `make tiny` from recorded MuJoCo demonstrations of the scripted experts; nothing else went in.

## Data

{data}

Three quarters of the training episodes are disturbed (correlated noise on the expert's actions; the clean action is the
label), one quarter is not. Held out: {held_out}.

## Training

| part | steps | batch | seed | seconds (this run, one thread) | last loss |
|---|---|---|---|---|---|
{table}

Weights are stored in half precision and load as float32. `policy/` holds the action head alone and takes the rest from
`world/`.

## Figures

Measured by `make bench`; tables, intervals and controls stand in the project's README and in `benchmarks/results`.

## Limits

One robot, five table-top tasks, one fixed look, one camera arrangement. Pictures are soft where the future is uncertain.
Not for controlling a real robot.
"""


def main(settings: Ship) -> None:
    """Copy the checkpoint and write the card."""
    source = settings.run / "checkpoint"
    if not (source / "policy").is_dir():
        raise FileNotFoundError(f"{source}: expected a finished recipe, found none; run make tiny first")
    megabytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file()) / 2**20
    if megabytes > LIMIT_MB:
        raise ValueError(
            f"{source}: expected at most {LIMIT_MB} MB, got {megabytes:.1f} MB; ship a smaller model"
        )
    shutil.rmtree(settings.to, ignore_errors=True)
    shutil.copytree(source, settings.to)
    with atomic_write(settings.to / "card.md") as temporary:
        temporary.write_text(card(settings.run), encoding="utf-8")
    print(json.dumps({"checkpoint": str(settings.to), "megabytes": round(megabytes, 1)}))


if __name__ == "__main__":
    main(tyro.cli(Ship))
