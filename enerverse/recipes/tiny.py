"""The recipe of the shipped checkpoint, end to end: record -> autoencoder -> latents -> world model ->
policy.

`python -m enerverse.recipes.tiny --out runs/tiny` does all of it on a CPU (hours) and can be interrupted at
any point: running it again goes on where it stopped. On a GPU the same preset trains with more steps.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from dataengine.episodes import EpisodeDataset
from enerverse import presets
from enerverse.cli.record import Record, record_task
from enerverse.files import atomic_write
from enerverse.folders import INDEX
from enerverse.latents import PatchAutoencoder
from enerverse.pipelines import EnerVersePipeline
from enerverse.pipelines.saving import export_checkpoint
from enerverse.train import stages
from enerverse.train.policy import train_policy

TASKS = {"Lift": 400, "Push": 400, "PickPlace": 300, "OpenDrawer": 200, "CueDelayReach": 240}
SPLITS = {  # split: (first seed, episodes per task or None for TASKS, share of undisturbed episodes)
    "train": (0, None, 0.25),
    "test": (50_000, 20, 0.0),
    "test_clean": (60_000, 20, 1.0),
    "masks": (70_000, 10, 0.5),
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
        """The tiny preset, with more steps where there is a GPU."""
        preset = presets.tiny()
        factor = self.gpu_factor if stages.default_device() == "cuda" else 1
        steps = self.world_steps or preset.train_world.steps * factor
        return replace(preset, train_world=replace(preset.train_world, steps=steps))

    def _data(self) -> None:
        jobs = [(self.out / "data", split, task) for split in SPLITS for task in TASKS]
        with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
            for line in pool.map(_record_job, jobs):
                print(line, flush=True)

    def _autoencoder(self) -> None:
        if (self.out / "autoencoder" / "autoencoder" / "config.json").exists():
            return
        datasets = list(read_split(self.out, "train").values())
        stages.train_autoencoder(datasets, self.preset(), self.out / "autoencoder")

    def _world(self) -> None:
        if (self.out / "world" / "pipeline" / INDEX).exists():
            return
        datasets = list(read_split(self.out, "train").values())
        autoencoder = PatchAutoencoder.from_pretrained(self.out / "autoencoder" / "autoencoder").eval()
        episodes = stages.encode(datasets, autoencoder, self.preset(), self.out / "latents.safetensors")
        stages.train_world(episodes, autoencoder, self.preset(), self.out / "world")

    def _policy(self) -> None:
        pipe = EnerVersePipeline.from_pretrained(self.out / "world" / "pipeline")
        episodes = stages.LatentEpisodes.load(self.out / "latents.safetensors")
        cache = self.out / "features.safetensors"
        policy = train_policy(episodes, pipe, self.preset(), self.out / "policy", feature_cache=cache)
        export_checkpoint(pipe, policy, self.out / "checkpoint")


def read_split(out: Path, split: str) -> dict[str, EpisodeDataset]:
    """The datasets of one split by task."""
    return {task: EpisodeDataset(out / "data" / split / task) for task in TASKS}


def _record_job(job: tuple[Path, str, str]) -> str:
    root, split, task = job
    torch.set_num_threads(1)
    seed, count, clean = SPLITS[split]
    settings = Record(
        task=task,
        out=root / split / task,
        episodes=count or TASKS[task],
        seed=seed + 100_000 * list(TASKS).index(task),
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
