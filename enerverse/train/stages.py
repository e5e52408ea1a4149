"""The stages of a recipe: dataset -> autoencoder -> latents -> world model. Each leaves its result in the
run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from enerverse.config import to_json
from enerverse.data import ClipSampler, Datasets, LatentEpisodes, encode_dataset, read_images
from enerverse.diffusion import make_objective
from enerverse.files import prepare_run
from enerverse.latents import Autoencoder, KLAutoencoder, PatchAutoencoder
from enerverse.model import FactReader, HashedTextEncoder, PretrainedTextEncoder, VideoUNet
from enerverse.pipelines import EnerVersePipeline
from enerverse.presets import AutoencoderConfig, Preset, TextConfig
from enerverse.train.autoencoder import AutoencoderTask
from enerverse.train.loop import train
from enerverse.train.world import WorldModel, WorldTask, measure_residual_scale

FRAME_STEP = 4  # neighbouring frames are nearly the same picture


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """An untrained autoencoder."""
    if config.kind == "kl":
        return KLAutoencoder(channels=config.channels, widths=config.widths)
    return PatchAutoencoder(
        config.patch, config.channels, config.width, config.encoder_blocks, config.decoder_blocks
    )


def build_text_encoder(config: TextConfig) -> nn.Module:
    """An untrained instruction encoder (or a frozen one with an untrained projection)."""
    if config.kind == "pretrained":
        return PretrainedTextEncoder(config.width, config.model)
    return HashedTextEncoder(config.width)


def build_reader(unet: VideoUNet, facts: Tensor) -> FactReader | None:
    """What tells the simulator's facts [N, S'] from the UNet's plan; None where there is no plan or no fact."""
    if unet.plan is None or facts.shape[1] == 0:
        return None
    reader = FactReader(unet.feature_width, facts.shape[1], unet.config.plan_tokens)
    reader.set_statistics(facts)
    return reader


def default_device() -> str:
    """`cuda` when there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def train_autoencoder(
    datasets: Datasets, preset: Preset, run: Path, device: str | None = None
) -> Autoencoder:
    """Train the preset's autoencoder on `datasets` in `run` and save it in `run/autoencoder`."""
    device = device or default_device()
    prepare_run(run, to_json(preset))
    torch.manual_seed(preset.train_autoencoder.seed)
    images = read_images(datasets, preset.views, every=FRAME_STEP)
    autoencoder = build_autoencoder(preset.autoencoder)
    sample = images[:: max(1, len(images) // 300)].flatten(0, 1).float() / 255
    autoencoder.initialise_from(sample)
    autoencoder.to(device, memory_format=torch.channels_last)
    task = AutoencoderTask(
        autoencoder, images, batch=preset.train_autoencoder.batch, seed=preset.train_autoencoder.seed
    )
    train(task, preset.train_autoencoder, run, name="autoencoder", device=device)
    autoencoder.set_statistics(sample.to(device))
    autoencoder.save_pretrained(run / "autoencoder")
    return autoencoder.eval()


def encode(datasets: Datasets, autoencoder: Autoencoder, preset: Preset, path: Path) -> LatentEpisodes:
    """Latents of the whole dataset, cached at `path`. Raises ValueError where the cache is of other views."""
    if path.exists():
        cached = LatentEpisodes.load(path)
        if cached.views != preset.views:
            raise ValueError(
                f"{path}: expected latents of the views {', '.join(preset.views)}, got {', '.join(cached.views)}; pass "
                f"--views {' '.join(cached.views)}, or choose another --out"
            )
        return cached
    episodes = encode_dataset(datasets, autoencoder, preset.views)
    episodes.save(path)
    return episodes


def train_world(
    episodes: LatentEpisodes,
    autoencoder: Autoencoder,
    preset: Preset,
    run: Path,
    device: str | None = None,
    evaluate: Callable[[EnerVersePipeline, int], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    start: EnerVersePipeline | None = None,
) -> EnerVersePipeline:
    """Train the world model on latent episodes in `run` and save the pipeline in `run/pipeline`.

    start: a world model of the same sizes, whose weights the training begins with; its number of views may differ.
    """
    device = device or default_device()
    prepare_run(run, to_json(preset))
    torch.manual_seed(preset.train_world.seed)
    unet = VideoUNet(**preset.unet_arguments(), action_dim=episodes.action.shape[1])
    reader = build_reader(unet, episodes.privileged) if preset.world_loss.localize > 0 else None
    model = WorldModel(unet, build_text_encoder(preset.text), reader).to(device)
    if start is not None:
        unet.load_state_dict(start.unet.state_dict())
        model.text_encoder.load_state_dict(start.text_encoder.state_dict())
    sampler = ClipSampler(
        episodes, preset.clips, batch=preset.train_world.batch, seed=preset.train_world.seed
    )
    scale = measure_residual_scale(sampler, preset.world_loss)
    objective = make_objective(preset.diffusion.objective, **preset.diffusion.options())
    task = WorldTask(
        model, sampler, objective, preset.world_loss, channel_std=autoencoder.latent_std, residual_scale=scale
    )
    pipeline = assemble_world(
        autoencoder.to(device), model, preset, fps=episodes.fps, residual_scale=scale,
        end_threshold=choose_end_threshold(episodes),
    )  # fmt: skip
    check = (lambda _, step: evaluate(pipeline, step)) if evaluate is not None else None
    train(
        task,
        preset.train_world,
        run,
        name="world model",
        device=device,
        evaluate=check,
        evaluate_every=evaluate_every,
    )
    model.eval()
    pipeline.save_pretrained(run / "pipeline")
    return pipeline


def assemble_world(
    autoencoder: Autoencoder,
    model: WorldModel,
    preset: Preset,
    *,
    fps: float = 10.0,
    residual_scale: float = 1.0,
    end_threshold: float = 0.13,
) -> EnerVersePipeline:
    """The pipeline of an autoencoder and a world model, trained or not, with what the preset says of its use."""
    objective = make_objective(preset.diffusion.objective, **preset.diffusion.options())
    return EnerVersePipeline(
        autoencoder, model.unet, model.text_encoder, objective.scheduler(),
        views=preset.views, image_size=preset.image_size, objective=preset.diffusion.objective,
        residual=preset.world_loss.residual, recent=preset.clips.recent,
        action_scale=preset.clips.action_scale, command=preset.clips.command,
        fps=fps, residual_scale=residual_scale, end_threshold=end_threshold,
    )  # fmt: skip


def choose_end_threshold(episodes: LatentEpisodes) -> float:
    """Half the distance (mean L1) between the end-of-task latent, zero, and the nearest real frame: no frame of the
    training data can be taken for the end."""
    distances = [part.float().abs().mean((1, 2, 3, 4)).min() for part in episodes.latents.split(512)]
    return round(0.5 * float(torch.stack(distances).min()), 4)
