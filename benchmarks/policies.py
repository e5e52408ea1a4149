"""Which inputs make a policy succeed: arms that differ only in what the action head sees, on paired seeds.

    python -m benchmarks.policies train --arm latents --run runs/tiny
    python -m benchmarks.policies evaluate --run runs/tiny

trains the arms (each resumable, in `run/arms/<arm>`) and plays 50 episodes per task with each. Every arm has the same
head, labels, optimiser steps and evaluation seeds; `state` reads the simulator and proves the harness, `random` acts
at random, `untrained` reads tokens of a world model that was never trained.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.results_io import write_result
from enerverse.cli.record import make_env
from enerverse.data import LatentEpisodes, read_images
from enerverse.files import atomic_write, fingerprint
from enerverse.latents import PatchAutoencoder
from enerverse.metrics import mcnemar_exact, wilson
from enerverse.model import VideoUNet
from enerverse.pipelines import EnerVersePipeline, EnerVersePolicy
from enerverse.policy import PolicyConfig
from enerverse.presets import Preset, tiny
from enerverse.recipes.tiny import TASKS, read_split
from enerverse.train.policy import train_policy
from enerverse.train.stages import assemble_world, build_text_encoder
from enerverse.train.world import WorldModel
from sims.rollout import Outcome, evaluate

BASE = PolicyConfig()
ARMS: dict[str, PolicyConfig | None] = {
    "tokens": BASE,
    "latents": replace(BASE, world=None),
    "untrained": BASE,
    "mean": replace(BASE, world="mean"),
    "pixels": replace(BASE, world=None, latents=False, pixels=True),
    "state": replace(BASE, world=None, latents=False, privileged=24),
    "random": None,
}
FIRST_SEED = 900_000


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one arm in `run/arms/<arm>`; run again to go on."""

    arm: str
    run: Path = Path("runs/tiny")
    steps: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Play `episodes` paired seeds per task with every trained arm and write `policies.json`.

    Finished (arm, task) pairs are kept in the run folder and not played again.
    """

    run: Path = Path("runs/tiny")
    episodes: int = 50
    arms: tuple[str, ...] = tuple(ARMS)
    tasks: tuple[str, ...] = tuple(TASKS)
    case: str = "policies"


def arm_folder(run: Path, arm: str) -> Path:
    """Where an arm is trained; the shipped policy is the `tokens` arm."""
    return run / "policy" if arm == "tokens" else run / "arms" / arm


def train_arm(settings: Train) -> None:
    """Train the head of one arm on the recipe's data."""
    config = ARMS[settings.arm]
    assert config is not None, "the random arm has nothing to train"
    torch.set_num_threads(1)
    preset = tiny()
    steps = settings.steps or preset.train_policy.steps
    preset = replace(
        preset, policy=config, train_policy=replace(preset.train_policy, steps=steps, seed=settings.seed)
    )
    pipe = read_world(settings, preset)
    images = (
        read_images(list(read_split(settings.run, "train").values()), preset.views) if config.pixels else None
    )
    episodes = LatentEpisodes.load(settings.run / "latents.safetensors")
    # The pooled arm averages the tokens itself, so both read one cache; the untrained backbone needs its own.
    cache = settings.run / (
        "features_untrained.safetensors" if settings.arm == "untrained" else "features.safetensors"
    )
    train_policy(
        episodes,
        pipe,
        preset,
        arm_folder(settings.run, settings.arm),
        images=images,
        feature_cache=cache,
        device="cpu",
    )


def read_world(settings: Train, preset: Preset) -> EnerVersePipeline:
    """The run's world model; for the arms that read none of it, and for `untrained`, its autoencoder alone with a
    backbone that was never trained, so that these arms need not wait for it."""
    config = ARMS[settings.arm]
    if config is not None and config.world and settings.arm != "untrained":
        return EnerVersePipeline.from_pretrained(settings.run / "world" / "pipeline")
    torch.manual_seed(settings.seed)
    model = WorldModel(VideoUNet(**preset.unet_arguments()), build_text_encoder(preset.text)).eval()
    autoencoder = PatchAutoencoder.from_pretrained(settings.run / "autoencoder" / "autoencoder").eval()
    return assemble_world(autoencoder, model, preset)


class RandomPolicy:
    """Uniform actions."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def select_actions(self, observations: list, infos: list, keys: list) -> list[np.ndarray]:
        """One random action per episode."""
        return [self.rng.uniform(-1, 1, 7).astype(np.float32) for _ in observations]


def play(policy: object, task: str, episodes: int, needs_pictures: bool) -> list[Outcome]:
    """Outcomes on the evaluation seeds of a task."""
    cameras = tiny().views if needs_pictures else ()
    seeds = range(FIRST_SEED, FIRST_SEED + episodes)
    return evaluate(lambda: make_env(task, cameras=cameras), policy, seeds)  # type: ignore[arg-type]


def play_arm(settings: Evaluate, arm: str) -> dict[str, dict[str, Any]]:
    """Success per seed, and seconds, of every task of one arm, kept beside its training; outcomes of other weights are
    played anew."""
    folder, config = arm_folder(settings.run, arm), ARMS[arm]
    path = folder / f"outcomes_{settings.episodes}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    policy = RandomPolicy() if config is None else EnerVersePolicy.from_pretrained(folder / "policy")
    weights = name_weights(policy)
    known = kept["tasks"] if kept.get("weights") == weights else {}
    pictures = config is not None and bool(config.world or config.latents or config.pixels)
    for task in settings.tasks:
        if task in known:
            continue
        began = time.perf_counter()
        wins = [bool(outcome.success) for outcome in play(policy, task, settings.episodes, pictures)]
        known[task] = {"wins": wins, "seconds": round(time.perf_counter() - began, 1)}
        print(f"{arm:10} {task:14} {sum(wins)}/{len(wins)} in {known[task]['seconds']:.0f} s", flush=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"weights": weights, "tasks": known}))
    return {task: known[task] for task in settings.tasks}


def name_weights(policy: EnerVersePolicy | RandomPolicy) -> str:
    """What tells one policy from another: the fingerprints of its parts."""
    if isinstance(policy, RandomPolicy):
        return "random"
    parts = (policy.head, policy.unet, policy.autoencoder)
    return " ".join(fingerprint(part) for part in parts if part is not None)


def summarise(outcomes: dict[str, dict[str, list[bool]]]) -> dict[str, object]:
    """Rates with 95 % intervals per arm and task, and paired tests against the latents-only control."""
    values: dict[str, object] = {}
    for arm, tasks in outcomes.items():
        row: dict[str, object] = {}
        for task, wins in tasks.items():
            rate = wilson(sum(wins), len(wins))
            row[task] = {"success": rate.estimate, "interval": [rate.low, rate.high], "episodes": len(wins)}
        if "latents" in outcomes and arm != "latents":
            pooled = [np.concatenate([np.array(t[k]) for k in tasks]) for t in (tasks, outcomes["latents"])]
            row["p_against_latents"] = mcnemar_exact(pooled[0].tolist(), pooled[1].tolist())
        values[arm] = row
    return values


def main(settings: Train | Evaluate) -> None:
    """Train an arm, or play them all."""
    if isinstance(settings, Train):
        train_arm(settings)
        return
    torch.set_num_threads(1)
    ready = [
        arm
        for arm in settings.arms
        if ARMS[arm] is None or (arm_folder(settings.run, arm) / "policy").exists()
    ]
    played = {arm: play_arm(settings, arm) for arm in ready}
    outcomes = {arm: {task: row["wins"] for task, row in tasks.items()} for arm, tasks in played.items()}
    seconds = sum(row["seconds"] for tasks in played.values() for row in tasks.values())
    path = write_result(settings.case, summarise(outcomes), seconds=seconds)
    print(path)


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"train": Train, "evaluate": Evaluate}))
