"""Saving and loading pipelines: errors in one sentence, half-precision export, parts shared between two folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

# Diffusers loads components only from modules that are already imported.
import enerverse.latents
import enerverse.model
import enerverse.policy  # noqa: F401
from enerverse.folders import INDEX, staged_folder

if TYPE_CHECKING:
    from enerverse.pipelines.policy import EnerVersePolicy
    from enerverse.pipelines.world import EnerVersePipeline

SHARED = ("autoencoder", "unet", "text_encoder")


class SavedPipeline(DiffusionPipeline):
    """A diffusers pipeline of our own components that loads in float32 and fails in one sentence."""

    if TYPE_CHECKING:  # diffusers types it as a plain dict
        config: Any

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write every part and `model_index.json` into a folder; the index comes last, so half a folder is none."""
        with staged_folder(save_directory) as stage:
            super().save_pretrained(str(stage), **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a saved folder. Raises FileNotFoundError or ValueError naming the folder when it is missing,
        damaged, or holds another kind of pipeline."""
        folder = Path(pretrained_model_name_or_path)
        index = _read_index(folder, cls.__name__)
        options.setdefault("dtype", torch.float32)
        options = _shared_parts(folder, index) | options
        try:
            with _quiet():
                pipeline = super().from_pretrained(str(folder), **options)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ValueError(
                f"{folder}: expected a complete {cls.__name__}, got a damaged one ({_first_line(error)}); "
                "restore the folder from a copy or train it again"
            ) from error
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        if index.get("world"):  # loaded, the pipeline is whole: saved elsewhere, it needs no neighbour
            pipeline.register_to_config(world=None, shared=())
        return pipeline


def _read_index(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: expected a saved {kind} (model_index.json), found none; train one first"
        )
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a damaged file; restore it from a copy") from error
    if not isinstance(index, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(index).__name__}; restore it from a copy"
        )
    if index.get("_class_name") != kind:
        raise ValueError(
            f"{folder}: expected a saved {kind}, got a {index.get('_class_name')}; give another folder"
        )
    return index


def _shared_parts(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The parts that a policy in `folder` leaves to the world model beside it; none where it holds its own."""
    absent = [name for name in index.get("shared", []) if (index.get(name) or [None])[0] is None]
    if not index.get("world") or not absent:
        return {}
    from enerverse.pipelines.world import EnerVersePipeline

    pipeline = EnerVersePipeline.from_pretrained(folder / str(index["world"]))
    return {name: getattr(pipeline, name) for name in absent}


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar for the few small parts, and no remarks on the types of our own arguments."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(level)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def export_checkpoint(world: EnerVersePipeline, policy: EnerVersePolicy, folder: Path) -> Path:
    """Write `folder/world` and `folder/policy` in half precision; the policy refers to the world's parts.

    The two load with `EnerVersePipeline.from_pretrained(folder / "world")` and
    `EnerVersePolicy.from_pretrained(folder / "policy")`.
    """
    _in_half(world).save_pretrained(folder / "world")
    shared = [name for name in SHARED if getattr(policy, name) is not None]
    light = type(policy)(
        **dict.fromkeys(SHARED),
        head=_half(policy.head),
        **_settings(policy),
        world="../world",
        shared=tuple(shared),
    )
    light.save_pretrained(folder / "policy")
    return folder


def _half(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module).half()


def _in_half(world: EnerVersePipeline) -> EnerVersePipeline:
    parts = {name: _half(getattr(world, name)) for name in SHARED}
    return type(world)(**parts, scheduler=world.scheduler, **_settings(world))


def _settings(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The plain settings of a pipeline: its configuration without components and private entries."""
    skip = {*pipeline.components, "world", "shared"}
    return {k: v for k, v in dict(pipeline.config).items() if not k.startswith("_") and k not in skip}
