"""`enerverse train`: the three stages, one after another, in one run folder.

    RUN/autoencoder/            run folder of the stage (config.json, metrics.jsonl, checkpoints/) ...
    RUN/autoencoder/autoencoder ... and its result
    RUN/latents.safetensors     the dataset as latents; latents.json says of which data and autoencoder
    RUN/world/pipeline          the world model (EnerVersePipeline), in its own run folder RUN/world
    RUN/policy/policy           the policy (EnerVersePolicy), in its own run folder RUN/policy
    RUN/checkpoint/             what to ship: `world`, `policy` and `card.md`; --checkpoint RUN finds it

Running a stage again goes on where it stopped; another config or other data in the same folder is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from enerverse.cli.messages import announce, command, count
from enerverse.cli.record import recorded_task
from enerverse.cli.simulator import check_seed
from enerverse.loading import check_device

if TYPE_CHECKING:
    from dataengine.episodes import EpisodeDataset
    from enerverse.presets import Preset

STAGES = ("autoencoder", "world", "policy")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one stage (autoencoder, then world, then policy) in a run folder; run again to go on."""

    stage: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="{autoencoder,world,policy}")]
    """autoencoder, world or policy; each needs the one before it."""
    data: tuple[Path, ...]
    """One or more dataset folders."""
    out: Path = Path("runs/mine")
    """Run folder, the same for all three stages."""
    views: tuple[str, ...] = ()
    """Views to train on; when not given, the preset's, or the first three of data that lack those."""
    preset: str = "tiny"
    """Sizes and optimisation; `enerverse info` lists them."""
    steps: int | None = None
    """Optimiser steps; when not given, the preset's."""
    batch: int | None = None
    """Windows or pictures per step; when not given, the preset's."""
    seed: int | None = None
    """Seed of weights, windows and noise; when not given, the preset's (0)."""
    device: str | None = None
    """cpu or cuda; when not given, the GPU if there is one."""
    autoencoder: Path | None = None
    """For the stage world: a trained autoencoder; when not given, the one in the run folder."""
    attention: str | None = None
    """For the stage world: a method over views and places, such as s2 (`enerverse sparse list`); when not given, dense."""
    world: Path | None = None
    """For the stage policy: a trained world model; when not given, the one in the run folder."""

    def run(self) -> None:
        """Train the stage and say what comes next."""
        preset, device = self.settings(), check_device(self.device)
        from enerverse.cli import stages

        datasets, preset = open_datasets(self.data, preset, self.views)
        self._announce(preset, device)
        result = getattr(stages, self.stage)(self, preset, datasets, device)
        print(f"done: {result}")
        print(f"next: {self._next(preset.views)}")

    def settings(self) -> Preset:
        """The preset with the flags worked in. Raises ValueError for an unknown preset or stage."""
        from enerverse.config import unknown
        from enerverse.presets import get_preset, with_attention

        if self.stage not in STAGES:
            raise unknown("stage", self.stage, STAGES)
        if self.seed is not None:
            check_seed(self.seed)
        preset = get_preset(self.preset)
        if self.attention is not None and self.stage != "world":
            raise ValueError(
                f"attention: expected none for the stage {self.stage}, got {self.attention}; it belongs to the stage world"
            )
        if self.attention is not None:
            preset = with_attention(preset, self.attention)
        given = {name: getattr(self, name) for name in ("steps", "batch", "seed")}
        changed = {name: value for name, value in given.items() if value is not None}
        section = f"train_{self.stage}"
        return replace(preset, **{section: replace(getattr(preset, section), **changed)})

    def _announce(self, preset: Preset, device: str) -> None:
        config = getattr(preset, f"train_{self.stage}")
        announce(
            f"train {self.stage}: preset {preset.name}, {count(config.steps, 'step')} of {config.batch} on {device}",
            f"reads {', '.join(map(str, self.data))}, views {', '.join(preset.views)}",
            f"writes {self.out / self.stage}; Ctrl-C saves, the same command goes on",
        )

    def _next(self, views: Sequence[str] = ()) -> str:
        """The next stage; after the last one a trial, in the simulator where it has the `views`."""
        if self.stage == "policy":
            from sims.cameras import CAMERAS

            if not set(views) <= set(CAMERAS):
                return command(
                    "enerverse imagine", checkpoint=self.out, data=self.data[0], device=self.device
                )
            task = recorded_task(self.data[0])
            return command("enerverse rollout", checkpoint=self.out, task=task, device=self.device)
        following = STAGES[STAGES.index(self.stage) + 1]
        preset = None if self.preset == Train.preset else self.preset
        return command(
            f"enerverse train {following}", data=self.data, out=self.out, views=self.views or None, preset=preset,
            device=self.device,
        )  # fmt: skip


def open_datasets(
    folders: tuple[Path, ...], preset: Preset, views: tuple[str, ...] = ()
) -> tuple[list[EpisodeDataset], Preset]:
    """The datasets, and the preset with the views to train on, which all of them have in its picture size.

    Those are `views`, else the preset's, or, where the first dataset has none of these, as many of its own. Raises
    DatasetError or ValueError.
    """
    from dataengine.episodes import EpisodeDataset

    if not folders:
        raise ValueError("data: expected at least one dataset folder, got none")
    datasets = [EpisodeDataset(folder) for folder in folders]
    preset = replace(preset, views=choose_views(datasets[0], preset.views, views))
    for dataset in datasets:
        check_pictures(dataset, preset.views, preset.image_size, f"preset {preset.name}")
    return datasets, preset


def choose_views(dataset: EpisodeDataset, usual: tuple[str, ...], asked: tuple[str, ...]) -> tuple[str, ...]:
    """The views `asked` for, which ValueError names where there is none such; else the `usual` ones, or, of a dataset that
    lacks one of them, as many of its first."""
    from enerverse.config import unknown

    for view in asked:
        if view not in dataset.views:
            raise unknown("view", view, dataset.views)
    if len(set(asked)) < len(asked):
        raise ValueError(f"views: expected every view once, got {' '.join(asked)}")
    complete = all(view in dataset.views for view in usual)
    return asked or (usual if complete or len(dataset.views) < len(usual) else dataset.views[: len(usual)])


def check_pictures(dataset: EpisodeDataset, views: tuple[str, ...], size: int, reader: str) -> None:
    """ValueError unless `dataset` has episodes with `views`, each of `size` x `size` pixels."""
    missing = [view for view in views if view not in dataset.views]
    if missing:
        raise ValueError(
            f"{dataset.root}: expected the {len(views)} views {', '.join(views)} for the {reader}, got "
            f"{', '.join(dataset.views) or 'none'}; record with --cameras {' '.join(views)}"
        )
    if not len(dataset):
        raise ValueError(f"{dataset.root}: expected at least one episode, got none; record some first")
    for view in views:
        height, width = dataset.picture_size(view)
        if (height, width) != (size, size):
            raise ValueError(
                f"{dataset.root}: expected pictures of {size} x {size} pixels for the {reader}, got "
                f"{height} x {width}; record with --image-size {size}"
            )
