"""The world model as a generator: pictures of anchor cameras before and after repair, beside the plain generators.

    python -m benchmarks.data_help train --arm true
    python -m benchmarks.repair

Nine frames in a row of each episode of a task that `benchmarks.flywheel` recorded, seen by two cameras; the scene fitted
to these is repaired at the six others of the ring. The world model is the shipped one, trained on three places alone, and
the one that `benchmarks.data_help` trained on all eight cameras of other episodes. Writes `repair.json`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.flywheel import FlywheelCase, Stage, stages
from benchmarks.results_io import write_result
from dataengine.flywheel import first_fit, look
from dataengine.generators import ConstantFill, Generator, Identity, load_restorer
from enerverse.loading import load_world
from enerverse.pipelines import EnerVersePipeline
from enerverse.pipelines.repair import WorldRepairer


@dataclass(frozen=True, kw_only=True)
class RepairCase:
    """Which episodes and world models; `strengths` of the noise."""

    run: Path = Path("runs/flywheel")
    around: Path = Path("runs/data_help/seed_0/true/world/pipeline")
    task: str = "Lift"
    frames: int = 9
    strengths: tuple[float, ...] = (0.1, 0.2, 0.5)
    case: str = "repair"


def generators(case: RepairCase) -> dict[str, Generator]:
    """By the names of the table."""
    plain: dict[str, Generator] = {"fill": ConstantFill(), "restorer": load_restorer()}
    worlds = {"world of three places": load_world()}
    if case.around.exists():
        worlds["world of eight places"] = EnerVersePipeline.from_pretrained(case.around)
    for pipe in worlds.values():
        pipe.set_progress_bar_config(disable=True)
    made = {
        f"{name} after {first}, {strength}": WorldRepairer(pipe, plain[first], strength=strength)
        for name, pipe in worlds.items()
        for first in plain
        for strength in case.strengths
    }
    return {"renders": Identity(), **plain, **made}


def errors(images: Tensor, stage: Stage) -> tuple[float, float]:
    """Mean squared errors of all pixels and of moving ones."""
    error = (images - stage.anchors.images).square().mean(-1)
    assert stage.anchors.body_ids is not None
    return float(error.mean()), float(error[stage.anchors.body_ids > 0].mean())


def main(case: RepairCase) -> None:
    """Repair, measure, write."""
    torch.set_num_threads(1)
    began, known, rows = time.perf_counter(), generators(case), dict[str, list[tuple[float, float]]]()
    wheel = FlywheelCase(run=case.run)
    for stage in stages(wheel, frames_in_a_row=case.frames):
        if not stage.name.startswith(case.task):
            continue
        scene = first_fit(stage.seen, wheel.settings(0))
        renders = look(scene, stage.anchors.cameras, len(stage.seen))
        for name, generator in known.items():
            repaired = generator.repair(renders, stage.seen, None)
            rows.setdefault(name, []).append(errors(repaired.images, stage))
    values: dict[str, Any] = {}
    for name, found in rows.items():
        psnr, moving = (-10 * torch.tensor(column).mean().log10() for column in zip(*found, strict=True))
        values[name] = {"psnr": float(psnr), "moving_psnr": float(moving), "scenes": len(found)}
        print(f"{name:40} {psnr:.2f} dB, moving {moving:.2f} dB")
    print(write_result(case.case, values, seconds=time.perf_counter() - began))


if __name__ == "__main__":
    main(tyro.cli(RepairCase))
