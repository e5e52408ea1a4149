"""The recipe of the shipped checkpoint, end to end: record -> autoencoder -> latents -> world model ->
policy.

`python -m enerverse.recipes.tiny --out runs/tiny` does all of it on a CPU (hours) and can be interrupted at
any point: running it again goes on where it stopped. On a GPU the same preset trains with more steps. What a stage left
behind is used again only if it was made from the same data, parts and settings.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from dataengine.episodes import EpisodeDataset
from enerverse import presets
from enerverse.cli.record import Record, record_task
from enerverse.cli.stages import describe_data, remember
from enerverse.config import to_json
from enerverse.files import atomic_write, fingerprint, read_json
from enerverse.folders import INDEX
from enerverse.latents import PatchAutoencoder
from enerverse.pipelines import EnerVersePipeline
from enerverse.pipelines.saving import export_checkpoint
from enerverse.train import TrainConfig, stages
from enerverse.train.policy import train_policy

TASKS = {"Lift": 400, "Push": 400, "PickPlace": 300, "OpenDrawer": 200, "CueDelayReach": 240}
SPLITS = {  # split: (first seed, episodes per task or None for TASKS, share of undisturbed episodes)
    "train": (0, None, 0.25),
    "test": (50_000, 20, 0.0),
    "test_clean": (60_000, 20, 1.0),
    "masks": (70_000, 10, 0.5),
}


_WORLD = (
    "views",
    "image_size",
    "autoencoder",
    "unet",
    "text",
    "diffusion",
    "clips",
    "world_loss",
    "train_world",
)
READS = {  # which parts of the preset a stage's result depends on; the policy's loop checks its whole preset itself
    "autoencoder": ("views", "image_size", "autoencoder", "train_autoencoder"),
    "world": _WORLD,
}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Train the tiny checkpoint end to end; interrupt and repeat as you like.

    out: run folder. until: stop after this stage (data, autoencoder, world, policy).
    gpu_factor: how many times more steps to train on a GPU.
    """

    out: Path = Path("runs/tiny")
    until: str = "policy"
    gpu_factor: int = 4
    world_steps: int | None = None

    def run(self) -> None:
        order = ("data", "autoencoder", "world", "policy")
        if self.until not in order:
            raise ValueError(f"until: expected one of {order}, got {self.until!r}")
        for stage in order[: order.index(self.until) + 1]:
            _time(self.out, stage, getattr(self, f"_{stage}"))
        print(f"done: {self.out}; next: enerverse demo --checkpoint {self.out}")

    def preset(self) -> presets.Preset:
        """The tiny preset, with more steps of every stage where there is a GPU."""
        preset = presets.tiny()
        factor = self.gpu_factor if stages.default_device() == "cuda" else 1
        sections = ("train_autoencoder", "train_world", "train_policy")
        longer = {name: _with_steps(getattr(preset, name), factor) for name in sections}
        if self.world_steps:
            longer["train_world"] = replace(preset.train_world, steps=self.world_steps)
        return replace(preset, **longer)

    def _data(self) -> None:
        check_data(self.out)
        jobs = [(self.out / "data", split, task) for split in SPLITS for task in TASKS]
        with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
            for line in pool.map(_record_job, jobs):
                print(line, flush=True)

    def _autoencoder(self) -> None:
        run, datasets = self.out / "autoencoder", list(read_split(self.out, "train").values())
        check_settings(run, self.preset(), "autoencoder")
        made = (run / "checkpoints", run / "autoencoder")
        remember(run / "data.json", describe_data(datasets), *made, adopt=True)
        if not (run / "autoencoder" / "config.json").exists():
            stages.train_autoencoder(datasets, self.preset(), run)

    def _world(self) -> None:
        run, datasets = self.out / "world", list(read_split(self.out, "train").values())
        check_settings(run, self.preset(), "world")
        autoencoder = PatchAutoencoder.from_pretrained(self.out / "autoencoder" / "autoencoder").eval()
        facts = {**describe_data(datasets), "autoencoder": fingerprint(autoencoder)}
        remember(self.out / "latents.json", facts, self.out / "latents.safetensors", adopt=True)
        remember(run / "data.json", facts, run / "checkpoints", run / "pipeline", adopt=True)
        if (run / "pipeline" / INDEX).exists():
            return
        episodes = stages.encode(datasets, autoencoder, self.preset(), self.out / "latents.safetensors")
        stages.train_world(episodes, autoencoder, self.preset(), run)

    def _policy(self) -> None:
        run, device = self.out / "policy", stages.default_device()
        pipe = EnerVersePipeline.from_pretrained(self.out / "world" / "pipeline").to(device)
        cache = self.out / "features.safetensors"
        datasets = list(read_split(self.out, "train").values())
        facts = {**describe_data(datasets), "world": fingerprint(pipe.unet)}
        remember(run / "data.json", facts, run / "checkpoints", run / "policy", cache, adopt=True)
        episodes = stages.LatentEpisodes.load(self.out / "latents.safetensors")
        policy = train_policy(episodes, pipe, self.preset(), run, feature_cache=cache, device=device)
        export_checkpoint(pipe.to("cpu"), policy.to("cpu"), self.out / "checkpoint")


def _with_steps(config: TrainConfig, factor: int) -> TrainConfig:
    return replace(config, steps=config.steps * factor)


def check_data(out: Path) -> None:
    """Write what the data of the run `out` are to be; ValueError where those there were planned otherwise."""
    for split in SPLITS:
        for task, (_, episodes, _) in plan(split).items():
            there = len(list((out / "data" / split / task / "meta" / "episodes").glob("*/*.parquet")))
            if there > episodes:
                raise ValueError(
                    f"{out / 'data' / split / task}: expected at most {episodes} episodes as the recipe says, got "
                    f"{there}; choose another --out or delete it"
                )
    facts = {split: plan(split) for split in SPLITS}
    remember(out / "data.json", facts, out / "data", adopt=True)


def plan(split: str) -> dict[str, tuple[int, int, float]]:
    """Per task of a split: first seed, episodes, share of undisturbed ones."""
    first, episodes, clean = SPLITS[split]
    return {
        task: (first + 100_000 * index, episodes or count, clean)
        for index, (task, count) in enumerate(TASKS.items())
    }


def check_settings(run: Path, preset: presets.Preset, stage: str) -> None:
    """ValueError where the stage in `run` was made with other settings of its own than those of `preset`.

    Settings of other stages may differ, and so may those that the preset got after the run was made.
    """
    path = run / "config.json"
    if not path.exists():
        return
    there, here = read_json(path), json.loads(to_json(preset))
    for section in READS[stage]:
        difference = _find_difference(there.get(section), here[section], section)
        if difference:
            raise ValueError(
                f"{run}: the stage was made with other settings ({difference}); choose another --out or delete it"
            )


def _find_difference(there: Any, here: Any, place: str) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        inner = (_find_difference(there[key], here[key], f"{place}.{key}") for key in here if key in there)
        return next(filter(None, inner), "")
    return "" if there == here else f"{place} is {there} there and {here} here"


def read_split(out: Path, split: str) -> dict[str, EpisodeDataset]:
    """The datasets of one split by task."""
    return {task: EpisodeDataset(out / "data" / split / task) for task in TASKS}


def _record_job(job: tuple[Path, str, str]) -> str:
    root, split, task = job
    torch.set_num_threads(1)
    seed, episodes, clean = plan(split)[task]
    settings = Record(
        task=task,
        out=root / split / task,
        episodes=episodes,
        seed=seed,
        clean_share=clean,
        segmentation=split != "train",
    )
    report = record_task(settings)
    return f"{split}/{task}: kept {report.kept} of {report.tried} episodes in {report.seconds:.0f} s"


def _time(out: Path, stage: str, work: object) -> None:
    """Do `work` and add its seconds to `seconds.json`."""
    began = time.perf_counter()
    print(f"{stage} ...", flush=True)
    work()  # type: ignore[operator]
    path = out / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    seconds[stage] = round(seconds.get(stage, 0) + time.perf_counter() - began, 1)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(seconds, indent=2))


if __name__ == "__main__":
    tyro.cli(Tiny).run()
