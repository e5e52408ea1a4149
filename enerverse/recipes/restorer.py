"""The recipe of the shipped restorer: scenes of which more cameras are known than are fitted to, and what they lack.

    python -m enerverse.recipes.restorer --out runs/restorer --ship dataengine/weights/restorer.safetensors

records episodes of four tasks in random colours and light, fits every scene to two of twelve cameras, looks from the
other ten, and trains on what is seen against the truth there. Then the flywheel turns once with that restorer, and a
longer training takes its renders in as well, since in use the second round repairs what the first has left
(ReconDreamer, arXiv 2411.19548, trains on renders of half-done reconstructions for the same reason). About 20 minutes on
one core; interrupt and repeat as you like.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm.auto import tqdm

from dataengine.cameras import Cameras
from dataengine.episodes import EpisodeDataset
from dataengine.fit import Fit
from dataengine.flywheel import Flywheel, first_fit, flywheel, look
from dataengine.generators import Renders, Restorer, train_restorer
from dataengine.reconstruct import Reconstruction
from dataengine.scene import Scene
from dataengine.storage import load_tensors, save_tensors
from dataengine.views import Views
from enerverse.cli.record import Record, record_task

TASKS = ("Lift", "Push", "PickPlace", "OpenDrawer")
STEPS = (10, 40, 80)  # of a first fit: renders of half-done scenes are part of what is to be repaired


@dataclass(frozen=True, kw_only=True)
class RestorerRecipe:
    """Train a restorer end to end.

    out: working folder. episodes: per task. frames: of each, spread over it. first, last: optimiser steps of the two
    trainings. ship: where to write the result besides.
    """

    out: Path = Path("runs/restorer")
    episodes: int = 20
    frames: int = 4
    image_size: int = 64
    first: int = 800
    last: int = 3000
    seed: int = 0
    ship: Path | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Lesson:
    """A scene, what was fitted, and the truth elsewhere."""

    name: str
    seen: Views
    elsewhere: Views


def lessons(recipe: RestorerRecipe) -> Iterator[Lesson]:
    """Every episode with two cameras of the ring, 75 to 150 degrees apart, and the ten others."""
    for task in TASKS:
        folder = recipe.out / "data" / task
        record_task(
            Record(
                task=task, out=folder, episodes=recipe.episodes, seed=recipe.seed, cameras=(), ring=8, holdout_ring=4,
                image_size=recipe.image_size, bodies=True, depth=True, randomize=True,
            )
        )  # fmt: skip
        dataset = EpisodeDataset(folder)
        for index in range(recipe.episodes):
            views = spread(Views.from_episode(dataset[index]), recipe.frames)
            pair = draw_pair(random.Random(f"{recipe.seed} {task} {index}"), 8)
            chosen = [f"ring_{i:02d}" for i in pair]
            others = [name for name in views.names if name not in chosen]
            yield Lesson(
                name=f"{task}-{index:03d}", seen=views.select(chosen), elsewhere=views.select(others)
            )


def draw_pair(rng: random.Random, count: int) -> tuple[int, int]:
    """Two of `count` neighbours in a row, two to four places apart."""
    gap = rng.choice((2, 3, 4))
    first = rng.randrange(count - gap)
    return (first, first + gap) if rng.random() < 0.5 else (first + gap, first)


def spread(views: Views, frames: int) -> Views:
    """About `frames` frames at equal distances over an episode."""
    every = max(1, len(views) // frames)
    return views.at(slice(0, min(len(views), frames * every), every))


def settings_of(recipe: RestorerRecipe, lesson: Lesson) -> Flywheel:
    """How the scene of a lesson is fitted."""
    steps = random.Random(f"{recipe.seed} {lesson.name}").choice(STEPS)
    quiet = Fit(steps=steps, quiet=True)
    return Flywheel(
        rounds=1, start=Reconstruction(complete=False, fit=quiet), refit=Fit(steps=60, quiet=True)
    )


def first_look(recipe: RestorerRecipe, lesson: Lesson) -> Renders:
    """What the scene fitted to the two cameras shows from the others; kept in the working folder."""
    path = recipe.out / "first" / f"{lesson.name}.safetensors"
    if not path.exists():
        scene = first_fit(lesson.seen, settings_of(recipe, lesson))
        scene.save(recipe.out / "scenes" / f"{lesson.name}.safetensors")
        keep(path, look(scene, lesson.elsewhere.cameras, len(lesson.seen)))
    return read(path)


def second_look(recipe: RestorerRecipe, lesson: Lesson, restorer: Restorer) -> Renders:
    """What it shows after a turn of the flywheel."""
    path = recipe.out / "second" / f"{lesson.name}.safetensors"
    if not path.exists():
        cameras: Cameras = lesson.elsewhere.cameras
        anchors = cameras.select([name for name in cameras.names if name.startswith("ring")])
        scene = Scene.load(recipe.out / "scenes" / f"{lesson.name}.safetensors")
        turned = flywheel(
            lesson.seen, restorer, anchors, settings_of(recipe, lesson), scene=scene, gate=False
        )
        keep(path, look(turned.scene, cameras, len(lesson.seen)))
    return read(path)


def keep(path: Path, renders: Renders) -> None:
    """Write renders in half precision."""
    save_tensors(
        path,
        {"images": renders.images.half(), "depth": renders.depth.half(), "alpha": renders.alpha.half()},
        {},
    )


def read(path: Path) -> Renders:
    """Read what `keep` wrote."""
    tensors, _ = load_tensors(path)
    images, depth, alpha = (tensors[name].float() for name in ("images", "depth", "alpha"))
    return Renders(images=images, depth=depth, alpha=alpha)


def main(recipe: RestorerRecipe) -> None:
    """Record, fit, train, turn, train."""
    torch.set_num_threads(1)
    taught = list(lessons(recipe))
    pairs = [(first_look(recipe, lesson), lesson.elsewhere) for lesson in tqdm(taught, desc="first look")]
    path = recipe.out / "minute.safetensors"
    if not path.exists():
        train_restorer(pairs, steps=recipe.first, seed=recipe.seed).save(path)
    minute = Restorer.load(path)
    pairs += [
        (second_look(recipe, lesson, minute), lesson.elsewhere) for lesson in tqdm(taught, desc="second look")
    ]
    if not (path := recipe.out / "restorer.safetensors").exists():
        train_restorer(pairs, steps=recipe.last, seed=recipe.seed).save(path)
    if recipe.ship is not None:
        Restorer.load(path).half().save(recipe.ship)  # half the bytes; it is read back in full precision
        print(f"shipped: {recipe.ship}")


if __name__ == "__main__":
    main(tyro.cli(RestorerRecipe))
