"""`enerverse record`: demonstrations of a simulator task as an episode dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

import sims  # noqa: F401 - registers the environments
from dataengine.episodes import EpisodeWriter
from dataengine.record import RecordReport, record, writer_arguments
from enerverse.config import unknown
from sims.experts import Expert, make_expert
from sims.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Record:
    """Record demonstrations of a task into a LeRobot v3 dataset (with cameras); run again to go on.

    task: one of the simulator's tasks. out: dataset folder. episodes: how many successful ones to keep.
    noise: strength of the disturbance on the expert (the clean action is kept as the label). clean_share:
    share of episodes without it.
    """

    task: str
    out: Path
    episodes: int = 50
    seed: int = 0
    noise: float = 1.0
    clean_share: float = 0.25
    cameras: tuple[str, ...] = ("front", "left", "top")
    image_size: int = 64
    segmentation: bool = False
    depth: bool = False
    randomize: bool = False

    def run(self) -> None:
        report = record_task(self)
        print(
            f"kept {report.kept} of {report.tried} episodes, {report.frames} frames "
            f"in {report.seconds:.0f} s: {self.out}"
        )
        print(f"next: enerverse train autoencoder --data {self.out} --out runs/mine")


class SeededExpert:
    """The scripted expert of an environment as a recording policy: noise depends on the episode's seed
    alone."""

    def __init__(self, env: gymnasium.Env, noise: float, clean_share: float):
        self.env, self.noise, self.clean_share = env, noise, clean_share

    def reset(self, seed: int) -> None:
        rng = np.random.default_rng((7, seed))
        noise = 0.0 if rng.random() < self.clean_share else self.noise
        self.expert: Expert = make_expert(self.env, noise=noise, rng=rng)

    def act(self, obs: dict[str, Any], info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        return self.expert.act(obs, info)


def make_env(task: str, **options: Any) -> gymnasium.Env:
    """The environment of a task; ValueError names the closest task when there is none."""
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    return gymnasium.make(f"enerverse/{task}-v0", **options)


def record_task(settings: Record) -> RecordReport:
    """Do what `settings` say."""
    modalities = ["rgb"] + ["segmentation"] * settings.segmentation + ["depth"] * settings.depth
    env = make_env(
        settings.task, cameras=settings.cameras, image_size=settings.image_size, modalities=tuple(modalities),
        randomize=settings.randomize,
    )  # fmt: skip
    try:
        with EpisodeWriter(settings.out, robot_type="panda", **writer_arguments(env)) as writer:
            policy = SeededExpert(env, settings.noise, settings.clean_share)
            return record(env, policy, writer, settings.episodes, settings.seed)
    finally:
        env.close()
