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
from dataengine.episodes import EpisodeDataset
from enerverse.cli.record import read_settings
from enerverse.cli.simulator import is_disturbed
from enerverse.files import atomic_write, read_json, read_metrics, total_seconds
from enerverse.recipes.tiny import SPLITS, TASKS

HOME = Path(enerverse.__file__).parent / "checkpoints" / "tiny"
LIMIT_MB = 16
MODES = {
    "instruction": "imagined from the instruction",
    "plan": "by planned actions",
    "actions": "given the actions",
}


@dataclass(frozen=True, kw_only=True)
class Ship:
    """Copy `run/checkpoint` to the package folder. run: recipe folder. to: where the package keeps it. results: where
    `make bench` wrote what it measured of this run; the card quotes it."""

    run: Path = Path("runs/tiny")
    to: Path = HOME
    results: Path = Path("benchmarks/results")


def training_rows(run: Path) -> list[str]:
    """One table row per trained part: steps, batch, seed, seconds, last loss."""
    rows = []
    for part in ("autoencoder", "world", "policy"):
        config = read_json(run / part / "config.json")[f"train_{part}"]
        records = [row for row in read_metrics(run / part) if "loss" in row]
        last, seconds = records[-1], total_seconds(records)
        rows.append(
            f"| {part} | {last['step']} | {config['batch']} | {config['seed']} | {seconds:.0f} | {last['loss']:.4f} |"
        )
    return rows


def data_rows(run: Path) -> list[str]:
    """One table row per training dataset in the run: episodes, disturbed and not, frames, seeds."""
    rows = []
    for folder in datasets(run, "train"):
        dataset = EpisodeDataset(folder)
        seeds = [meta.seed for meta in dataset.readable if meta.seed is not None]
        share = read_settings(folder).get("clean_share", SPLITS["train"][2])
        disturbed = sum(is_disturbed(seed, share) for seed in seeds)
        rows.append(
            f"| {folder.name} | {len(dataset)} | {disturbed} | {len(seeds) - disturbed} | {sum(dataset.lengths)} | "
            f"{min(seeds)} to {max(seeds)} |"
        )
    return rows


def held_out(run: Path) -> str:
    """The splits that no part was trained on, with their episodes."""
    parts = []
    for split, (first, _, _) in SPLITS.items():
        if split != "train" and datasets(run, split):
            episodes = sum(len(EpisodeDataset(folder)) for folder in datasets(run, split))
            parts.append(f"{split} ({episodes} episodes, seeds + {first})")
    return ", ".join(parts) or "nothing"


def datasets(run: Path, split: str) -> list[Path]:
    """The dataset folders of one split of the run, in the recipe's order where it knows them."""
    found = {
        path.parents[1].name: path.parents[1] for path in (run / "data" / split).glob("*/meta/info.json")
    }
    return [found[name] for name in sorted(found, key=lambda name: ([*TASKS, name].index(name), name))]


def measured_rows(results: Path) -> list[str]:
    """One table row per headline figure under `results`, with its 95 % interval; none before it was measured."""
    found = {path.stem: read_json(path)["values"] for path in sorted(results.rglob("*.json"))}
    rows = []
    for mode, spans in found.get("imagination", {}).get("test", {}).items():
        for span, row in spans.items() if mode.split("_")[0] in MODES else ():
            low, high = row["gain_interval"]
            name = f"{MODES[mode.split('_')[0]]}, {mode.split('_', 1)[1].replace('_', ' ')}"
            rows.append(
                f"| {name}, frames {span}: gain over copying | {row['gain']:+.1f} dB [{low:+.1f}, {high:+.1f}] |"
            )
    for task, row in found.get("policies", {}).get("tokens", {}).items():
        if task in TASKS:
            rows.append(f"| policy, {task}: success | {_percent(row['success'], row['interval'])} |")
    for setting, policies in found.get("memory_recall", {}).items():
        if isinstance(policies, dict) and "sparse_uniform" in policies:
            row = policies["sparse_uniform"]
            rows.append(
                f"| cue recall, {setting}, sparse memory | {_percent(row['rate'], row['interval'])} |"
            )
    return rows


def _percent(rate: float, interval: list[float]) -> str:
    low, high = (100 * end for end in interval)
    return f"{100 * rate:.0f} % [{low:.0f}, {high:.0f}]"


def card(run: Path, results: Path) -> str:
    """The text of `card.md`."""
    measured = "\n".join(["| figure | value |", "|---|---|", *measured_rows(results)])
    data = "\n".join(data_rows(run))
    table = "\n".join(training_rows(run))
    return f"""# tiny

World model and policy of the `tiny` preset: 64 x 64 pixels, three static views, 8 x 8 latents, chunks of 8 frames with 4
memory frames. Trained by `make tiny` from recorded MuJoCo demonstrations of the scripted experts; nothing else went in.

## Data

| task | episodes | disturbed | undisturbed | frames | seeds |
|---|---|---|---|---|---|
{data}

Disturbed: correlated noise on the expert's actions; the clean action is the label. Seeds whose demonstration failed are
left out. Held out: {held_out(run)}.

## Training

| part | steps | batch | seed | seconds (all starts together) | last loss |
|---|---|---|---|---|---|
{table}

Weights are stored in half precision and load as float32. `policy/` holds the action head alone and takes the rest from
`world/`.

## Figures

Measured by `make bench` on held-out episodes and seeds; controls and everything else stand in the project's README and in
`benchmarks/results`.

{measured}

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
        temporary.write_text(card(settings.run, settings.results), encoding="utf-8")
    print(json.dumps({"checkpoint": str(settings.to), "megabytes": round(megabytes, 1)}))


if __name__ == "__main__":
    main(tyro.cli(Ship))
