"""How well each model of motion shows cameras that it never saw: 4 cameras fitted, 4 held out, by task and size.

    python -m benchmarks.scenes

One episode per task, 16 frames spread over it, colour and depth. `rigid` is given the poses of the bodies and which pixel
shows which; the others find by themselves what moves. Writes `scenes.json`, after every row. About 2 minutes a row at 128
pixels.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.results_io import write_result
from dataengine.episodes import EpisodeDataset, EpisodeWriter
from dataengine.fit import Fit
from dataengine.motion import MODELS
from dataengine.reconstruct import Reconstruction, measure, reconstruct
from dataengine.record import record, writer_arguments
from dataengine.views import Views
from enerverse.cli.simulator import SeededExpert, make_env
from sims.cameras import holdout_ring, ring

CAMERAS = 4


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Which tasks, sizes and models; `steps` of every fit."""

    tasks: tuple[str, ...] = ("Lift", "PickPlace", "OpenDrawer")
    sizes: tuple[int, ...] = (64, 128)
    models: tuple[str, ...] = MODELS
    frames: int = 16
    steps: int = 400
    seed: int = 0
    case: str = "scenes"


def capture(task: str, size: int, frames: int, seed: int, folder: Path) -> tuple[Views, Views]:
    """`frames` frames spread over one demonstration: from the ring, and from the cameras between."""
    free = {**ring(CAMERAS), **holdout_ring(CAMERAS, beside=CAMERAS)}
    env = make_env(
        task, cameras=tuple(free), free_cameras=free, image_size=size, modalities=("rgb", "depth", "bodies")
    )
    try:
        with EpisodeWriter(folder, **writer_arguments(env, seed=seed)) as writer:
            record(env, SeededExpert(env, noise=0.0), writer, episodes=1, seed=seed, progress=False)
    finally:
        env.close()
    episode = EpisodeDataset(folder)[0]
    every = max(1, len(episode) // frames)
    views = Views.from_episode(episode).at(slice(0, frames * every, every))
    names = [[name for name in views.names if name.startswith(start)] for start in ("ring", "holdout")]
    return views.select(names[0]), views.select(names[1])


def row(fitted: Views, unseen: Views, model: str, settings: Scenes) -> dict[str, float]:
    """Measures on the cameras never seen, and how long the fit took."""
    plan = Reconstruction(motion=model, fit=Fit(steps=settings.steps, seed=settings.seed))
    began = time.process_time()
    scene = reconstruct(fitted, plan)
    seconds = time.process_time() - began
    assert unseen.body_ids is not None
    return measure(scene, unseen, unseen.body_ids > 0) | {
        "fitted_psnr": measure(scene, fitted)["psnr"],
        "gaussians": len(scene),
        "seconds": seconds,
    }


def main(settings: Scenes) -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    began, values = time.perf_counter(), dict[str, Any]()
    for task in settings.tasks:
        for size in settings.sizes:
            with tempfile.TemporaryDirectory() as folder:
                fitted, unseen = capture(task, size, settings.frames, settings.seed, Path(folder) / "data")
            for model in settings.models:
                found = row(fitted, unseen, model, settings)
                values[f"{task} {size} {model}"] = found
                print(
                    f"{task:10} {size:4} {model:10} {found['psnr']:.2f} dB, moving {found['moving_psnr']:.2f} dB, "
                    f"{found['gaussians']:.0f} Gaussians, {found['seconds']:.0f} s",
                    flush=True,
                )
                write_result(settings.case, values, seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main(tyro.cli(Scenes))
