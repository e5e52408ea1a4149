"""What each stage of `enerverse train` does in the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dataengine.episodes import EpisodeDataset
from enerverse.environment import versions
from enerverse.files import atomic_write, fingerprint
from enerverse.latents import Autoencoder, KLAutoencoder, PatchAutoencoder
from enerverse.pipelines import EnerVersePipeline
from enerverse.pipelines.saving import export_checkpoint
from enerverse.presets import Preset
from enerverse.train import stages
from enerverse.train.policy import train_policy

if TYPE_CHECKING:
    from enerverse.cli.train import Train


def autoencoder(verb: Train, preset: Preset, datasets: Sequence[EpisodeDataset], device: str) -> Path:
    """Train the autoencoder into `RUN/autoencoder/autoencoder`."""
    run = verb.out / "autoencoder"
    remember(run / "data.json", describe_data(datasets), run / "checkpoints")
    stages.train_autoencoder(list(datasets), preset, run, device)
    return run / "autoencoder"


def world(verb: Train, preset: Preset, datasets: Sequence[EpisodeDataset], device: str) -> Path:
    """Encode the data and train the world model into `RUN/world/pipeline`."""
    trained = load_autoencoder(verb.autoencoder or verb.out, preset).to(device)
    episodes = encode(verb.out, datasets, trained, preset)
    stages.train_world(episodes, trained, preset, verb.out / "world", device)
    return verb.out / "world" / "pipeline"


def policy(verb: Train, preset: Preset, datasets: Sequence[EpisodeDataset], device: str) -> Path:
    """Train the policy into `RUN/policy/policy` and put both parts together in `RUN/checkpoint`."""
    from enerverse.loading import find_part

    here = verb.out / "world" / "pipeline"  # in full precision, unlike the one in RUN/checkpoint
    source = verb.world or (here if here.exists() else verb.out)
    pipe = EnerVersePipeline.from_pretrained(find_part(source, "EnerVersePipeline")).to(device)
    episodes = encode(verb.out, datasets, pipe.autoencoder, preset)
    facts = {**describe_data(datasets), "world": fingerprint(pipe.unet)}
    run = verb.out / "policy"
    remember(run / "data.json", facts, run / "features.safetensors")
    trained = train_policy(episodes, pipe, preset, run, device=device)
    checkpoint = export_checkpoint(pipe.to("cpu"), trained.to("cpu"), verb.out / "checkpoint")
    write_card(checkpoint, preset, datasets)
    return checkpoint


def encode(
    out: Path, datasets: Sequence[EpisodeDataset], trained: Autoencoder, preset: Preset
) -> stages.LatentEpisodes:
    """Latents of the data, cached in the run folder. Raises ValueError where the cache is of other data."""
    cache = out / "latents.safetensors"
    remember(out / "latents.json", {**describe_data(datasets), "autoencoder": fingerprint(trained)}, cache)
    return stages.encode(list(datasets), trained, preset, cache)


def load_autoencoder(folder: Path, preset: Preset) -> Autoencoder:
    """The autoencoder in `folder` or in the run that lies there.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of another shape.
    """
    places = [folder / name for name in ("", "autoencoder", "autoencoder/autoencoder")]
    found = [place for place in places if (place / "diffusion_pytorch_model.safetensors").is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder}: expected a trained autoencoder, found none; run `enerverse train autoencoder` first"
        )
    kind = KLAutoencoder if preset.autoencoder.kind == "kl" else PatchAutoencoder
    try:
        trained = kind.from_pretrained(found[0]).eval()
    except Exception as error:  # diffusers and safetensors raise many kinds for a damaged file
        raise ValueError(
            f"{found[0]}: expected a whole autoencoder, got a damaged one ({str(error).splitlines()[0][:120]}); "
            "train it again"
        ) from error
    channels = trained.config["channels"]
    if channels != preset.autoencoder.channels:
        raise ValueError(
            f"{found[0]}: expected {preset.autoencoder.channels} latent channels for the preset "
            f"{preset.name}, got {channels}; choose its preset"
        )
    return trained


def describe_data(datasets: Sequence[EpisodeDataset]) -> dict[str, Any]:
    """Names, episodes and frames of the datasets: enough to notice that others were given."""
    rows = [[dataset.root.name, len(dataset), sum(dataset.lengths)] for dataset in datasets]
    return {"datasets": sorted(rows)}


def remember(path: Path, facts: dict[str, Any], made: Path) -> None:
    """Write to `path` what `made` is made from; ValueError where it exists and was made from something else."""
    if path.exists() and made.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        for key, value in facts.items():
            if there.get(key) != value:
                raise ValueError(
                    f"{path}: the folder was made from other {key} ({there.get(key)} there, {value} here); "
                    "choose another --out or delete it"
                )
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def write_card(checkpoint: Path, preset: Preset, datasets: Sequence[EpisodeDataset]) -> None:
    """`card.md`: what the checkpoint is and what it was trained on."""
    data = [f"- {name}: {episodes} episodes, {frames} frames" for name, episodes, frames in
            describe_data(datasets)["datasets"]]  # fmt: skip
    steps = ", ".join(f"{stage} {getattr(preset, f'train_{stage}').steps}" for stage in ("world", "policy"))
    lines = [
        f"# A checkpoint of the preset {preset.name}", "",
        f"Views {', '.join(preset.views)}, {preset.image_size} px; steps: {steps}; torch {versions()['torch']}.",
        "", "Trained on:", "", *data, "",
    ]  # fmt: skip
    with atomic_write(checkpoint / "card.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def count_parameters(preset: Preset) -> dict[str, int]:
    """Parameters of autoencoder, video UNet and instruction encoder, without allocating them."""
    from enerverse.model import VideoUNet

    with torch.device("meta"):
        parts = {
            "autoencoder": stages.build_autoencoder(preset.autoencoder),
            "unet": VideoUNet(**preset.unet_arguments()),
        }
        if preset.text.kind == "hashed":
            parts["text"] = stages.build_text_encoder(preset.text)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
