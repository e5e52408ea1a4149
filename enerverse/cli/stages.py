"""What each stage of `enerverse train` does in the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dataengine.episodes import EpisodeDataset
from dataengine.lerobot.files import checksum
from enerverse.cli.messages import count
from enerverse.environment import versions
from enerverse.files import atomic_write, fingerprint, read_json
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
    remember(run / "data.json", describe_data(datasets), run / "checkpoints", run / "autoencoder")
    stages.train_autoencoder(list(datasets), preset, run, device)
    return run / "autoencoder"


def world(verb: Train, preset: Preset, datasets: Sequence[EpisodeDataset], device: str) -> Path:
    """Encode the data and train the world model into `RUN/world/pipeline`."""
    trained = load_autoencoder(verb.autoencoder or verb.out, preset).to(device)
    facts = {**describe_data(datasets), "autoencoder": fingerprint(trained)}
    run = verb.out / "world"
    remember(run / "data.json", facts, run / "checkpoints", run / "pipeline")
    episodes = encode(verb.out, datasets, trained, preset)
    stages.train_world(episodes, trained, preset, run, device)
    return run / "pipeline"


def policy(verb: Train, preset: Preset, datasets: Sequence[EpisodeDataset], device: str) -> Path:
    """Train the policy into `RUN/policy/policy` and put both parts together in `RUN/checkpoint`."""
    from enerverse.loading import find_part

    here = verb.out / "world" / "pipeline"  # in full precision, unlike the one in RUN/checkpoint
    part = find_part(verb.world or (here if here.exists() else verb.out), "EnerVersePipeline")
    pipe = EnerVersePipeline.from_pretrained(part).to(device)
    facts = {**describe_data(datasets), "world": fingerprint(pipe.unet)}
    run = verb.out / "policy"
    remember(run / "data.json", facts, run / "checkpoints", run / "features.safetensors", run / "policy")
    episodes = encode(verb.out, datasets, pipe.autoencoder, preset)
    trained = train_policy(episodes, pipe, preset, run, device=device)
    checkpoint = export_checkpoint(pipe.to("cpu"), trained.to("cpu"), verb.out / "checkpoint")
    write_card(
        checkpoint, preset, datasets, {"world": trained_steps(part), "policy": preset.train_policy.steps}
    )
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
    """Name, episodes, frames and digest of every dataset, in the order in which windows are drawn from them."""
    return {
        "datasets": [
            [dataset.root.resolve().name, len(dataset), sum(dataset.lengths), digest(dataset)]
            for dataset in datasets
        ]
    }


def digest(dataset: EpisodeDataset) -> str:
    """Twelve hexadecimal digits of what training reads: instructions, vectors and videos, by the checksums that the
    dataset holds (by the sizes of the files where it holds none)."""
    metas = sorted(dataset.readable, key=lambda meta: meta.index)
    facts: list[Any] = [dataset.tasks]
    facts += [(meta.index, meta.length, meta.tasks, sorted(meta.checksums.items())) for meta in metas]
    facts += [checksum(path) for path in sorted((dataset.root / "data").rglob("*.parquet"))]
    if not all(meta.checksums for meta in metas):
        facts += [path.stat().st_size for path in sorted((dataset.root / "videos").rglob("*.mp4"))]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def remember(path: Path, facts: dict[str, Any], *made: Path, adopt: bool = False) -> None:
    """Write to `path` what `made` is made from.

    Raises ValueError where some of it is there already and was made from something else, or, unless `adopt`, from
    nobody knows what.
    """
    facts, present = json.loads(json.dumps(facts)), [part for part in made if part.exists()]
    if present and path.exists():
        return _check_facts(path, facts, present)
    if present and not adopt:
        raise ValueError(
            f"{path}: expected the facts that say what {_names(present)} was made from, found none; choose another "
            f"--out or delete {_places(present)}"
        )
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _check_facts(path: Path, facts: dict[str, Any], made: list[Path]) -> None:
    there = read_json(path)
    for key, value in facts.items():
        if there.get(key) != value:
            raise ValueError(
                f"{path}: the folder was made from other {key} ({there.get(key)} there, {value} here); choose "
                f"another --out, or delete {_places(made)} and whatever was made from it"
            )


def _names(made: list[Path]) -> str:
    return " and ".join(part.name for part in made)


def _places(made: list[Path]) -> str:
    return " and ".join(map(str, made))


def trained_steps(part: Path) -> int | None:
    """The steps that the world model saved in `part` was trained for, from its run folder; None where that is gone."""
    for run in (part.parent, part.parent.parent / "world"):
        if (run / "config.json").is_file():
            return read_json(run / "config.json").get("train_world", {}).get("steps")
    return None


def write_card(
    checkpoint: Path, preset: Preset, datasets: Sequence[EpisodeDataset], steps: dict[str, int | None]
) -> None:
    """`card.md`: what the checkpoint is, how long its parts were trained, and on what."""
    data = ", ".join(
        f"{name} ({count(episodes, 'episode')}, {count(frames, 'frame')})"
        for name, episodes, frames, _ in describe_data(datasets)["datasets"]
    )
    trained = ", ".join(f"{part} {number or 'unknown'}" for part, number in steps.items())
    lines = [
        f"# A checkpoint of the preset {preset.name}", "",
        f"Views {', '.join(preset.views)}, {preset.image_size} px; steps: {trained}; torch {versions()['torch']}.",
        f"Trained on {data}.", "",
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
