"""Do made views help? A world model and a policy trained on few views, on views made from these, and on true ones, and
tried from cameras that none of them was trained on.

    python -m benchmarks.data_help make --arm flywheel
    python -m benchmarks.data_help train --arm flywheel
    python -m benchmarks.data_help evaluate

80 demonstrations of a task were seen by two cameras. The arms differ only in the pictures they are trained on:

    few        the two views
    rendered   and six more, rendered from scenes fitted to the two, their planes completed
    flywheel   the same six after two turns of the flywheel
    true       the same six as cameras there saw them

Every arm starts from the shipped world model, sees two views at a time drawn from its own, and takes the same steps
with the same seeds. It is tried with pairs of held-out cameras, and with the two that were there in training. Every part
can be interrupted and goes on. `evaluate` writes `data_help.json`.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from benchmarks.results_io import write_result
from dataengine.episodes import EpisodeDataset
from dataengine.fit import Fit
from dataengine.flywheel import Flywheel
from dataengine.generators import Generator, make_generator
from dataengine.multiview import Multiview, multiview
from dataengine.reconstruct import Reconstruction
from enerverse.cli.record import Record, record_task
from enerverse.cli.simulator import make_env
from enerverse.data import LatentEpisodes, encode_dataset, group_views
from enerverse.evaluate.imagination import copy_last, gain, held_out_windows, imagine_window, measure, pool
from enerverse.files import atomic_write
from enerverse.loading import load_world
from enerverse.metrics import mcnemar_exact, wilson
from enerverse.pipelines import EnerVersePipeline, EnerVersePolicy
from enerverse.presets import Preset, tiny
from enerverse.train import stages
from enerverse.train.policy import train_policy
from sims.cameras import holdout_ring, ring
from sims.rollout import evaluate as play

ARMS = ("few", "rendered", "flywheel", "true")
RING = tuple(ring(8))
OBSERVED = ("ring_02", "ring_05")
HELD_OUT = tuple(holdout_ring(4, beside=8))
PAIRS = {  # cameras of a trial, left and right of the workspace
    "observed": (OBSERVED,),
    "held_out": tuple((HELD_OUT[a], HELD_OUT[b]) for a, b in ((0, 1), (1, 2), (2, 3), (0, 2), (1, 3))),
}
FIRST_SEED, TEST_SEED = 900_000, 60_000
COPIES = 4  # pairs of views per demonstration


@dataclass(frozen=True, kw_only=True)
class Common:
    """What the parts share: the working folder, the task, how many demonstrations, and the seed of all training."""

    run: Path = Path("runs/data_help")
    task: str = "Lift"
    demonstrations: int = 80
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Of the trained arms of this seed."""
        return self.run / f"seed_{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Make(Common):
    """Make the views of an arm."""

    arm: str = "flywheel"
    steps: int = 100
    rounds: int = 2


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Train the world model and the policy of an arm."""

    arm: str = "flywheel"
    world_steps: int = 1500
    policy_steps: int = 3000


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Try every trained arm: `episodes` of each pair of cameras, and windows of the test episodes."""

    episodes: int = 25
    arms: tuple[str, ...] = ARMS
    case: str = "data_help"


def source(settings: Common, split: str) -> EpisodeDataset:
    """Demonstrations seen by all cameras; those of the test are undisturbed."""
    train = split == "train"
    folder = settings.run / "data" / split
    record_task(
        Record(
            task=settings.task, out=folder, episodes=settings.demonstrations if train else 20,
            seed=0 if train else TEST_SEED, noise=1.0 if train else 0.0, cameras=(), ring=8, holdout_ring=4,
            bodies=train, depth=train,
        )
    )  # fmt: skip
    return EpisodeDataset(folder)


def make(settings: Make) -> None:
    """Write the dataset of an arm that is made of renders; the two others are there already."""
    dataset = source(settings, "train")
    generator: Generator | None = make_generator("restorer") if settings.arm == "flywheel" else None
    cameras = dataset.episode(0, stop=1).cameras
    assert cameras is not None
    wheel = Flywheel(
        rounds=settings.rounds if generator else 0,
        start=Reconstruction(complete=generator is None, fit=Fit(steps=settings.steps, quiet=True)),
        refit=Fit(steps=60, quiet=True),
    )
    new = cameras.select([name for name in RING if name not in OBSERVED]).at(0)
    plan = Multiview(observed=OBSERVED, cameras=new, flywheel=wheel)
    report = multiview(dataset, settings.run / "data" / settings.arm, plan, generator)
    print(f"{settings.arm}: {report.made} episodes in {report.seconds:.0f} s")


def views_of(arm: str) -> tuple[str, ...]:
    """The views that an arm is trained on."""
    return OBSERVED if arm == "few" else RING


def dataset_of(settings: Common, arm: str) -> EpisodeDataset:
    """The dataset of an arm."""
    return (
        source(settings, "train") if arm in ("few", "true") else EpisodeDataset(settings.run / "data" / arm)
    )


def draw_pairs(arm: str, episodes: int, seed: int) -> list[list[tuple[str, ...]]]:
    """Ordered pairs of an arm's views, `COPIES` per episode."""
    rng = random.Random(f"{arm} {seed}")
    return [[tuple(rng.sample(views_of(arm), 2)) for _ in range(COPIES)] for _ in range(episodes)]


def preset_of(settings: Train) -> Preset:
    """The tiny preset for two views, with fewer steps."""
    preset = tiny()
    return replace(
        preset, views=("view_0", "view_1"),
        train_world=replace(preset.train_world, steps=settings.world_steps, rate=5e-4, seed=settings.seed),
        train_policy=replace(preset.train_policy, steps=settings.policy_steps, seed=settings.seed),
        clips=replace(preset.clips, emphasis={}),
    )  # fmt: skip


def train(settings: Train) -> None:
    """World model and policy of an arm."""
    preset, start, run = preset_of(settings), load_world(), settings.folder / settings.arm
    path = settings.run / "data" / f"{settings.arm}.latents.safetensors"
    if not path.exists():
        dataset = dataset_of(settings, settings.arm)
        encode_dataset(dataset, start.autoencoder, views_of(settings.arm)).save(path)
    episodes = LatentEpisodes.load(path)
    grouped = group_views(episodes, draw_pairs(settings.arm, len(episodes), settings.seed))
    pipe = stages.train_world(grouped, start.autoencoder, preset, run / "world", start=start)
    train_policy(grouped, pipe, preset, run)


def placed(pair: tuple[str, ...]) -> dict[str, Any]:
    """The cameras of a pair under the names of the slots."""
    known = ring(8) | holdout_ring(4, beside=8)
    return {f"view_{slot}": known[name] for slot, name in enumerate(pair)}


def wins(policy: EnerVersePolicy, settings: Evaluate, pair: tuple[str, ...], first: int) -> list[bool]:
    """Success of every episode with a pair of cameras."""
    free = placed(pair)
    seeds = range(first, first + settings.episodes)
    outcomes = play(lambda: make_env(settings.task, cameras=tuple(free), free_cameras=free), policy, seeds)
    return [bool(outcome.success) for outcome in outcomes]


def imagined(
    pipe: EnerVersePipeline, dataset: EpisodeDataset, pair: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Sums of errors, the model's and those of copying the last frame, [windows, columns] of the first 8 frames."""
    pipe.register_to_config(views=pair)
    rows: dict[str, list[np.ndarray]] = {"model": [], "copy": []}
    for number, window in enumerate(held_out_windows(pipe, dataset, 2)):
        generator = torch.Generator().manual_seed(number)
        frames = imagine_window(pipe, window, told="actions", generator=generator)[0]
        rows["model"].append(measure(frames, window)["1-8"])
        rows["copy"].append(measure(copy_last(window), window)["1-8"])
    return {name: np.stack(parts) for name, parts in rows.items()}


def try_arm(settings: Evaluate, arm: str) -> dict[str, Any]:
    """Wins and sums of errors by kind of cameras, kept beside the arm's training."""
    path = settings.folder / arm / f"tried_{settings.episodes}.json"
    if path.exists():
        return json.loads(path.read_text())
    policy = EnerVersePolicy.from_pretrained(settings.folder / arm / "policy")
    pipe = EnerVersePipeline.from_pretrained(settings.folder / arm / "world" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    test, found = source(settings, "test"), {}
    for kind, pairs in PAIRS.items():
        won, sums = [], {"model": [], "copy": []}
        for number, pair in enumerate(tqdm(pairs, desc=f"{arm} {kind}", disable=None)):
            times = len(PAIRS["held_out"]) if kind == "observed" else 1  # as many episodes for either kind
            for turn in range(times):
                won += wins(policy, settings, pair, FIRST_SEED + (number + turn) * settings.episodes)
            for name, rows in imagined(pipe, test, pair).items():
                sums[name] += rows.tolist()
        found[kind] = {"wins": won, "sums": sums}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(found))
    return found


def summarise(tried: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Rates and decibels with 95 % intervals, and the paired test against the arm of few views."""
    values: dict[str, Any] = {}
    for arm, kinds in tried.items():
        values[arm] = {}
        for kind, found in kinds.items():
            rate = wilson(sum(found["wins"]), len(found["wins"]))
            sums = {name: np.array(rows) for name, rows in found["sums"].items()}
            better = gain(sums["model"], sums["copy"], np.arange(len(sums["model"])) // 2)
            values[arm][kind] = {
                "success": rate.estimate, "interval": [rate.low, rate.high], "episodes": len(found["wins"]),
                "psnr_moving": pool(sums["model"])["psnr_moving"], "psnr": pool(sums["model"])["psnr"],
                "gain_over_copying": [better.estimate, better.low, better.high],
            }  # fmt: skip
            if "few" in tried and arm != "few":
                few = tried["few"][kind]["wins"]
                values[arm][kind]["p_against_few"] = mcnemar_exact(found["wins"], few)
    return values


def main(settings: Make | Train | Evaluate) -> None:
    """Do one part."""
    torch.set_num_threads(1)
    if isinstance(settings, Make):
        make(settings)
    elif isinstance(settings, Train):
        train(settings)
    else:
        began = time.perf_counter()
        ready = [
            arm for arm in settings.arms if (settings.folder / arm / "policy" / "model_index.json").exists()
        ]
        values = summarise({arm: try_arm(settings, arm) for arm in ready})
        print(write_result(settings.case, values, seconds=time.perf_counter() - began))


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"make": Make, "train": Train, "evaluate": Evaluate}))
