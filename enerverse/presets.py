"""Presets: complete, frozen settings. `tiny` trains on two CPU cores; `small` and `paper` want a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from enerverse.config import unknown
from enerverse.data.clips import ClipConfig
from enerverse.policy.config import PolicyConfig
from enerverse.train.loop import TrainConfig
from enerverse.train.world import WorldLossConfig
from sparse_core import get_method
from sparse_core.sparsify import check_options


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Which autoencoder: `patch` (PatchAutoencoder) or `kl` (diffusers' AutoencoderKL), and its sizes."""

    kind: Literal["patch", "kl"] = "patch"
    channels: int = 16
    patch: int = 8
    width: int = 160
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    widths: tuple[int, ...] = (32, 64, 128, 128)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of `VideoUNet`; grid, channels, memory and chunk are filled in from the rest of the preset. The attention
    fields are explained there."""

    widths: tuple[int, ...] = (64, 160)
    blocks: tuple[int, ...] = (0, 1)
    mid_blocks: int = 1
    head_width: int = 32
    embedding: int = 256
    plan_tokens: int = 4
    attention: str = "dense"
    attention_options: dict[str, Any] = field(default_factory=dict)
    attention_places: str = ""
    mask_steps: int = 1
    dense_steps: int = 0

    def __post_init__(self) -> None:
        if self.attention != "dense":
            check_options(self.attention, **self.attention_options)
        elif self.attention_options:
            raise ValueError(
                f"attention_options: expected none for dense attention, got {', '.join(self.attention_options)}; name a "
                "method"
            )
        if self.mask_steps < 1 or self.dense_steps < 0:
            raise ValueError(
                f"mask_steps and dense_steps: expected at least 1 and 0, got {self.mask_steps} and {self.dense_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Instruction encoder: `hashed` needs no download; `pretrained` loads a CLIP or T5 folder named by
    `model`."""

    kind: Literal["hashed", "pretrained"] = "hashed"
    width: int = 128
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Objective by name (`enerverse.diffusion.OBJECTIVES`) and its options."""

    objective: str = "flow_x0"
    shift: float = 3.0
    pure_noise: float = 0.2

    def options(self) -> dict[str, float]:
        """Keyword arguments of the objective."""
        return {"shift": self.shift, "pure_noise": self.pure_noise} if self.objective == "flow_x0" else {}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything that makes a model: sizes, window, losses, optimisation."""

    name: str
    views: tuple[str, ...] = ("front", "left", "top")
    image_size: int = 64
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    text: TextConfig = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    world_loss: WorldLossConfig = field(default_factory=WorldLossConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    train_autoencoder: TrainConfig = field(default_factory=TrainConfig)
    train_world: TrainConfig = field(default_factory=TrainConfig)
    train_policy: TrainConfig = field(default_factory=TrainConfig)

    @property
    def grid(self) -> int:
        """Side of the latent grid."""
        shrink = (
            self.autoencoder.patch
            if self.autoencoder.kind == "patch"
            else 2 ** (len(self.autoencoder.widths) - 1)
        )
        return self.image_size // shrink

    def unet_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `VideoUNet`."""
        return {
            **vars(self.unet),
            "channels": self.autoencoder.channels,
            "grid": self.grid,
            "memory": self.clips.memory,
            "chunk": self.clips.chunk,
            "text_width": self.text.width,
        }


# Options with which a method suits the 48 tokens of three 4 x 4 views; the papers' are for thousands.
TINY_ATTENTION: dict[str, dict[str, Any]] = {
    "attention/combiner": {"segment": 16},
    "attention/hip": {"budget": 24, "block_q": 4, "block_k": 2, "window": 0, "sink": 0},
    "attention/minference": {"pattern": "block_sparse", "block": 4, "slash_block": 4, "share": 0.5},
    "attention/moa": {"block": 4, "sink": 4, "density": 0.5},
    "attention/routing": {"num_clusters": 3, "window": 16, "local_window": 16},
    "attention/s2": {"block": 16, "local_blocks": 1, "stride": 3},
    "attention/sea": {"pred_len": 16, "k": 16},
    "attention/seer": {"block": 4, "gate_dim": 16, "selection": "ratio", "amount": 0.5},
}


def with_attention(preset: Preset, attention: str, **options: Any) -> Preset:
    """The preset with `attention`, `dense` or a method of `sparse_core`, over views and places.

    options: of the method's config. `plan`, for a method that has plans, is the path of one, or paths by place, which must
    be there whenever the model is loaded; what tiny sets for a method then does not hold. Raises ValueError naming the
    closest method where there is none, and for options that it does not have.
    """
    usual = {}
    if preset.name == "tiny" and attention != "dense" and "plan" not in options:
        usual = TINY_ATTENTION.get(get_method(attention).name, {})
    unet = replace(
        preset.unet, attention=attention, attention_options=usual | options, attention_places=r"\.views\."
    )
    return replace(preset, unet=unet)


def tiny(attention: str = "dense", **options: Any) -> Preset:
    """64 px, three views, 8 x 8 latents, chunk 8, memory 4: everything trains on a CPU in a few hours.

    attention and options: see `with_attention`.
    """
    preset = Preset(
        name="tiny",
        train_autoencoder=TrainConfig(steps=1500, batch=32, rate=2e-3, average=0.99),
        # The cue of a memory task tells its colour once, long ago, and only a few windows need it: draw those often.
        clips=ClipConfig(mix=(0.15, 0.75, 0.05, 0.05), onset=0.65, emphasis={"reach": 4.0}),
        world_loss=WorldLossConfig(drop_actions=0.65),
        train_world=TrainConfig(steps=10_000, batch=8, rate=1e-3, average=0.998, save_every=250),
        train_policy=TrainConfig(steps=4000, batch=64, rate=1e-3, average=0.998, log_every=50),
    )
    return with_attention(preset, attention, **options) if attention != "dense" or options else preset


def small() -> Preset:
    """128 px, 16 x 16 latents, about 40 M parameters: minutes on one data-centre GPU."""
    return Preset(
        name="small",
        image_size=128,
        autoencoder=AutoencoderConfig(width=320, encoder_blocks=3, decoder_blocks=4),
        unet=UNetConfig(widths=(128, 256, 384), blocks=(0, 2, 2), head_width=64, embedding=512),
        train_autoencoder=TrainConfig(steps=5000, batch=64, rate=1e-3, average=0.999),
        train_world=TrainConfig(steps=20_000, batch=32, rate=5e-4, average=0.9995, save_every=1000),
        train_policy=TrainConfig(steps=20_000, batch=128, rate=5e-4, average=0.999),
    )


def paper() -> Preset:
    """The published sizes where they are stated (320 channels, heads of 64, v with zero terminal SNR, rate
    5e-5, clipping at 0.5), on square pictures. Nobody has trained this preset here.
    """
    return replace(
        small(),
        name="paper",
        image_size=256,
        autoencoder=AutoencoderConfig(kind="kl", channels=4, widths=(128, 256, 512, 512)),
        unet=UNetConfig(widths=(320, 640, 1280, 1280), blocks=(2, 2, 2, 2), head_width=64, embedding=1280),
        diffusion=DiffusionConfig(objective="v_zero_snr"),
        world_loss=WorldLossConfig(residual=False, channel_power=0.0),
        train_world=TrainConfig(steps=100_000, batch=8, rate=5e-5, clip=0.5, average=0.9999, save_every=1000),
    )


PRESETS = {"tiny": tiny, "small": small, "paper": paper}


def get_preset(name: str) -> Preset:
    """The preset called `name`; ValueError names the closest one when there is none."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]()
