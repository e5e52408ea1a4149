"""How well each model of motion shows cameras that it never saw: 4 cameras fitted, 4 held out, by task and size.

    python -m benchmarks.scenes

One episode per task, 16 frames spread over it, colour and depth. `rigid` is given the poses of the bodies and which pixel
shows which; the others find by themselves what moves. More rows on one task: planes not completed, poses disturbed by 1 to
2 cm (kept so, and learned), and colour alone, without depth. Writes `scenes.json` after every row, and goes on with the
rows of the same commit that are there. Episodes are kept in `data`, and in `strips` the pictures of the task with more
rows, of which `docs/figures/scenes.png` is made.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import tyro

from benchmarks.results_io import RESULTS, commit, folder_name, read_result, write_result
from dataengine.bodies import Bodies
from dataengine.episodes import EpisodeDataset, EpisodeWriter
from dataengine.fit import Fit
from dataengine.motion import MODELS
from dataengine.reconstruct import Reconstruction, measure, reconstruct, render_all
from dataengine.record import record, writer_arguments
from dataengine.scene import Scene
from dataengine.storage import atomic_write
from dataengine.views import Views
from enerverse.cli.simulator import SeededExpert, make_env
from enerverse.environment import device_name
from sims.cameras import holdout_ring, ring

CAMERAS = 4
SPECIAL = (
    "rigid, planes not completed",
    "rigid, poses disturbed",
    "rigid, poses disturbed and learned",
    "static, colour alone",
    "polynomial, colour alone",
)
PICTURED = ("rigid", "bodies", "static")
FIGURE = Path("docs/figures/scenes.png")
DISTURBED = (0.01, 0.02)  # metres, shortest and longest


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Which tasks, sizes and models; `steps` of every fit; `special`, the task and size of the rows beside those of the
    models."""

    tasks: tuple[str, ...] = ("Lift", "PickPlace", "OpenDrawer")
    sizes: tuple[int, ...] = (128, 64)
    models: tuple[str, ...] = MODELS
    special: tuple[str, int] | None = ("Lift", 128)
    frames: int = 16
    steps: int = 300
    seed: int = 0
    data: Path = Path("runs/4d")
    strips: Path = Path("runs/strips")
    case: str = "scenes"


def views(task: str, size: int, settings: Scenes) -> tuple[Views, Views]:
    """`frames` frames spread over one demonstration: from the ring, and from the cameras between."""
    folder = settings.data / f"{task}-{size}"
    if not folder.exists():
        parts = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        capture(task, size, settings.seed, parts)
        parts.rename(folder)
    episode = EpisodeDataset(folder)[0]
    every = max(1, len(episode) // settings.frames)
    both = Views.from_episode(episode).at(slice(0, settings.frames * every, every))
    names = [[name for name in both.names if name.startswith(start)] for start in ("ring", "holdout")]
    return both.select(names[0]), both.select(names[1])


def capture(task: str, size: int, seed: int, folder: Path) -> None:
    """Record one demonstration with both rings of cameras."""
    free = {**ring(CAMERAS), **holdout_ring(CAMERAS, beside=CAMERAS)}
    env = make_env(
        task, cameras=tuple(free), free_cameras=free, image_size=size, modalities=("rgb", "depth", "bodies")
    )
    try:
        with EpisodeWriter(folder, **writer_arguments(env, seed=seed)) as writer:
            record(env, SeededExpert(env, noise=0.0), writer, episodes=1, seed=seed, progress=False)
    finally:
        env.close()


def disturbed(fitted: Views, seed: int) -> Views:
    """The same with every pose but those of the first frame shifted by 1 to 2 cm in a direction of its own."""
    assert fitted.bodies is not None
    generator = np.random.default_rng(seed)
    poses = fitted.bodies.poses.copy()
    shift = generator.normal(size=poses[1:, :, :3, 3].shape)
    shift *= generator.uniform(*DISTURBED, (*shift.shape[:2], 1)) / np.linalg.norm(
        shift, axis=-1, keepdims=True
    )
    poses[1:, :, :3, 3] += shift
    return replace(fitted, bodies=Bodies(fitted.bodies.names, poses))


def variants(fitted: Views, settings: Scenes) -> dict[str, tuple[Views, Reconstruction]]:
    """The rows beside those of the models: what is fitted to what."""
    wrong, rigid = disturbed(fitted, settings.seed), Reconstruction(motion="rigid")
    plans = (
        (fitted, replace(rigid, complete=False)),
        (wrong, rigid),
        (wrong, replace(rigid, learn_poses=True)),
        *((replace(fitted, depth=None), Reconstruction(motion=name)) for name in ("static", "polynomial")),
    )
    return dict(zip(SPECIAL, plans, strict=True))


def row(fitted: Views, unseen: Views, plan: Reconstruction) -> tuple[Scene, dict[str, float]]:
    """The scene, measures on the cameras never seen, and how long the fit took."""
    began = time.process_time()
    scene = reconstruct(fitted, plan)
    seconds = time.process_time() - began
    assert unseen.body_ids is not None
    found = measure(scene, unseen, unseen.body_ids > 0)
    fitted_psnr = measure(scene, fitted)["psnr"]
    return scene, found | {"fitted_psnr": fitted_psnr, "gaussians": len(scene), "seconds": seconds}


def strip(images: torch.Tensor, name: str) -> np.ndarray:
    """Pictures ``[T, V, H, W, 3]`` of two cameras at three frames side by side, under a line that names them: BGR."""
    last = len(images) - 1
    chosen = [images[t, v] for v in (0, 2) for t in (0, last // 2, last)]
    row = (255 * torch.cat(chosen, 1).numpy()[..., ::-1]).round().astype(np.uint8)
    title = np.full((18, row.shape[1], 3), 255, np.uint8)
    cv2.putText(title, name, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40, 40, 40), 1, cv2.LINE_AA)
    return np.concatenate([title, row])


def keep_picture(folder: Path, name: str, images: torch.Tensor, title: str) -> None:
    """Keep a strip, and where all of them are there, make the figure of them."""
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / f"{name}.png"), strip(images, title))
    paths = [folder / f"{each}.png" for each in ("truth", *PICTURED)]
    if not all(path.exists() for path in paths):
        return
    with atomic_write(FIGURE) as temporary:
        whole = np.concatenate([np.asarray(cv2.imread(str(path))) for path in paths])
        temporary.write_bytes(cv2.imencode(".png", whole)[1].tobytes())


def rows(settings: Scenes) -> Iterator[tuple[str, int, str]]:
    """Task, size and name of every row."""
    for size in settings.sizes:
        for task in settings.tasks:
            yield from ((task, size, model) for model in settings.models)
            if settings.special == (task, size):
                yield from ((task, size, name) for name in SPECIAL)


def earlier(case: str) -> tuple[dict[str, Any], float]:
    """Rows and seconds of a result of this commit, if there is one."""
    path = RESULTS / folder_name(device_name("cpu")) / f"{case}.json"
    found = read_result(path) if path.exists() else None
    return ({}, 0.0) if found is None or found.commit != commit() else (dict(found.values), found.seconds)


def main(settings: Scenes) -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    values, spent = earlier(settings.case)
    began, held = time.perf_counter(), dict[tuple[str, int], tuple[Views, Views]]()
    for task, size, name in rows(settings):
        key = f"{task} {size} {name}"
        if key in values:
            continue
        if (task, size) not in held:
            held = {(task, size): views(task, size, settings)}
        fitted, unseen = held[task, size]
        if name in SPECIAL:
            fitted, plan = variants(fitted, settings)[name]
        else:
            plan = Reconstruction(motion=name)
        scene, found = row(fitted, unseen, replace(plan, fit=Fit(steps=settings.steps, seed=settings.seed)))
        values[key] = found
        if settings.special == (task, size) and name in PICTURED:
            strips = settings.strips
            keep_picture(strips, "truth", unseen.images, "held-out cameras, truth")
            title = f"{name}: {found['psnr']:.1f} dB, moving pixels {found['moving_psnr']:.1f} dB"
            keep_picture(strips, name, render_all(scene, unseen)[0], title)
        print(
            f"{key:45} {found['psnr']:.2f} dB, moving {found['moving_psnr']:.2f} dB, "
            f"{found['gaussians']:.0f} Gaussians, {found['seconds']:.0f} s",
            flush=True,
        )
        write_result(settings.case, values, seconds=spent + time.perf_counter() - began)


if __name__ == "__main__":
    main(tyro.cli(Scenes))
