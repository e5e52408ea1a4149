"""The flywheel of the data engine, turned on 20 scenes that nothing was trained on, beside its controls.

    python -m enerverse.recipes.restorer
    python -m benchmarks.flywheel

Each scene is an episode of 8 frames in random colours and light, seen by two of a ring of eight cameras, 112 degrees
apart. The six others are anchors, and four between them, at other heights, are held out: they are only measured. All
variants go on from one first fit and are not gated:

    restorer            the shipped restorer            minute             the same network after its minute of training
    more_iterations     fit on, no made views           self_distillation  renders as they are
    constant_fill       the mean colour in holes        planes             no generator, but planes completed at the start
    oracle              true pictures at the anchors

Afterwards the gated wheel turns up to six times, to see where it stops by itself. Logs of scenes are kept in the working
folder; running again goes on. Writes `flywheel.json`, all logs, and `docs/figures/flywheel.svg`.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from benchmarks.results_io import write_result
from dataengine.episodes import EpisodeDataset
from dataengine.fit import Fit
from dataengine.flywheel import CONTROLS, Flywheel, first_fit, flywheel, look, with_controls, write_log
from dataengine.generators import ConstantFill, Generator, Restorer, load_restorer
from dataengine.reconstruct import Reconstruction
from dataengine.views import Views
from enerverse.cli.record import Record, record_task
from enerverse.files import atomic_write
from enerverse.media import encode_png
from enerverse.metrics import Interval
from enerverse.recipes.restorer import TASKS, spread

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
FIRST_SEED = 50_000
OBSERVED = ("ring_02", "ring_05")
MEASURES = (
    "psnr", "ssim", "moving_psnr", "input_psnr", "cover", "depth_cm", "reprojection", "reprojection_depth", "seconds",
    "gaussians",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FlywheelCase:
    """Which scenes and how long; `minute` is what the recipe leaves after its first training."""

    run: Path = Path("runs/flywheel")
    minute: Path = Path("runs/restorer/minute.safetensors")
    scenes: int = 5
    frames: int = 8
    rounds: int = 2
    gated_rounds: int = 6
    gated_scenes: int = 1
    case: str = "flywheel"

    def settings(self, rounds: int) -> Flywheel:
        """Of every scene."""
        start = Reconstruction(complete=False, fit=Fit(steps=80, quiet=True))
        return Flywheel(rounds=rounds, start=start, refit=Fit(steps=60, quiet=True))


@dataclass(frozen=True, eq=False, kw_only=True)
class Stage:
    """A scene: what is fitted, what is held out, and the truth at the anchors."""

    name: str
    seen: Views
    held_out: Views
    anchors: Views


def stages(case: FlywheelCase, frames_in_a_row: int = 0) -> list[Stage]:
    """All scenes, recorded where they are not there yet; of so many frames in a row from the ninth on, where asked."""
    found = []
    for task in TASKS:
        folder = case.run / "data" / task
        record_task(
            Record(
                task=task, out=folder, episodes=case.scenes, seed=FIRST_SEED, cameras=(), ring=8, holdout_ring=4,
                bodies=True, depth=True, randomize=True,
            )
        )  # fmt: skip
        dataset = EpisodeDataset(folder)
        for index in range(case.scenes):
            whole = Views.from_episode(dataset[index])
            views = (
                spread(whole, case.frames) if not frames_in_a_row else whole.at(slice(8, 8 + frames_in_a_row))
            )
            rest = [name for name in views.names if name not in OBSERVED]
            groups = ([n for n in rest if n.startswith(start)] for start in ("holdout", "ring"))
            held_out, anchors = (views.select(group) for group in groups)
            found.append(
                Stage(name=f"{task}-{index}", seen=views.select(OBSERVED), held_out=held_out, anchors=anchors)
            )
    return found


def turn(case: FlywheelCase, stage: Stage, generators: dict[str, Generator]) -> dict[str, Any]:
    """Logs of all variants on a scene, kept on disk."""
    path = case.run / "logs" / f"{stage.name}.json"
    if not path.exists():
        settings = case.settings(case.rounds)
        logs = with_controls(
            stage.seen, generators, stage.anchors.cameras, settings, held_out=stage.held_out, anchors=stage.anchors
        )  # fmt: skip
        write_log(path, logs, settings)
    return json.loads(path.read_text())["logs"]


def turn_gated(case: FlywheelCase, stage: Stage, generators: dict[str, Generator]) -> dict[str, Any]:
    """Logs of the wheel that may stop by itself, kept on disk."""
    path = case.run / "gated" / f"{stage.name}.json"
    if not path.exists():
        settings = case.settings(case.gated_rounds)
        logs = {
            name: flywheel(
                stage.seen, generator, stage.anchors.cameras, settings, held_out=stage.held_out
            ).log
            for name, generator in generators.items()
        }
        write_log(path, logs, settings)
    return json.loads(path.read_text())["logs"]


def mean_interval(values: Sequence[float], resamples: int = 2000) -> Interval:
    """Mean over scenes with a 95 % bootstrap interval."""
    array = np.asarray(values, float)
    rng = np.random.default_rng(0)
    means = array[rng.integers(len(array), size=(resamples, len(array)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high))


def as_list(interval: Interval) -> list[float]:
    return [interval.estimate, interval.low, interval.high]


def summarise(logs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of every measure by variant and round, gains over round 0 and over the best control, scene by scene."""
    variants, last = list(logs[0]), len(next(iter(logs[0].values()))) - 1

    def column(variant: str, number: int, measure: str) -> np.ndarray:
        return np.array([log[variant][number][measure] for log in logs])

    table = {
        variant: [
            {measure: float(column(variant, number, measure).mean()) for measure in MEASURES}
            for number in range(last + 1)
        ]
        for variant in variants
    }
    gains = {v: column(v, last, "psnr") - column(v, 0, "psnr") for v in variants}
    controls = [v for v in (*CONTROLS, "planes") if v in variants and v != "oracle"]
    best = max(controls, key=lambda v: gains[v].mean())
    values: dict[str, Any] = {
        "scenes": len(logs), "rounds": table, "best_control": best,
        "gain": {v: as_list(mean_interval(gains[v].tolist())) for v in variants},
    }  # fmt: skip
    ours = [v for v in variants if v not in (*controls, "oracle")]
    values["over_best_control"] = {v: as_list(mean_interval((gains[v] - gains[best]).tolist())) for v in ours}
    for name in ("reprojection", "reprojection_depth"):
        change = {v: column(v, last, name) / column(v, 0, name) - 1 for v in variants}
        values[f"{name}_change"] = {v: as_list(mean_interval(c.tolist())) for v, c in change.items()}
    values["anchors"] = {
        v: {key: float(np.mean([log[v][1][key] for log in logs])) for key in ("anchor_psnr_before", "anchor_psnr_after")}
        for v in ours
    }  # fmt: skip
    return values


def draw(case: FlywheelCase, stage: Stage, generator: Generator, frame: int) -> None:
    """A picture of a scene at held-out cameras: by row after the first fit, after the turns with constant fill and with
    `generator`, and the truth."""
    settings = case.settings(case.rounds)
    first = first_fit(stage.seen, settings)
    rows = [look(first, stage.held_out.cameras, len(stage.seen)).images[frame]]
    for one in (ConstantFill(), generator):
        turned = flywheel(
            stage.seen, one, stage.anchors.cameras, settings, scene=copy.deepcopy(first), gate=False
        )
        rows.append(look(turned.scene, stage.held_out.cameras, len(stage.seen)).images[frame])
    rows.append(stage.held_out.images[frame])
    sheet = torch.cat([row.transpose(0, 1).flatten(1, 2) for row in rows])
    big = sheet.repeat_interleave(3, 0).repeat_interleave(3, 1).mul(255).round().byte().numpy()
    with atomic_write(FIGURES / "flywheel_views.png") as temporary:
        temporary.write_bytes(encode_png(big))


def main(case: FlywheelCase) -> None:
    """Turn, measure, write."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    generators: dict[str, Generator] = {"restorer": load_restorer()}
    if case.minute.is_file():
        generators["minute"] = Restorer.load(case.minute)
    found = stages(case)
    logs = [turn(case, stage, generators) for stage in tqdm(found, desc="scenes", disable=None)]
    values = summarise(logs)
    chosen = [stage for stage in found if int(stage.name.rsplit("-", 1)[1]) < case.gated_scenes]
    wheels: dict[str, Generator] = {"restorer": generators["restorer"], "constant_fill": ConstantFill()}
    gated = {
        stage.name: turn_gated(case, stage, wheels) for stage in tqdm(chosen, desc="gated", disable=None)
    }
    values["gated"] = {
        name: {v: [[r["psnr"], r["input_psnr"], r["kept"]] for r in log] for v, log in by_variant.items()}
        for name, by_variant in gated.items()
    }
    values["logs"] = {stage.name: log for stage, log in zip(found, logs, strict=True)}
    draw(case, found[0], generators["restorer"], case.frames // 2)
    print(write_result(case.case, values, seconds=time.perf_counter() - began))


if __name__ == "__main__":
    main(tyro.cli(FlywheelCase))
