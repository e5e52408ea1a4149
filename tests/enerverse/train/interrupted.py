"""Small training runs that can be cut short: `python interrupted.py KIND RUN [STEP]` dies by SIGKILL at STEP."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from enerverse.data import ClipConfig, ClipSampler, LatentEpisodes
from enerverse.diffusion import FlowX0
from enerverse.latents import KLAutoencoder, PatchAutoencoder
from enerverse.model import HashedTextEncoder, VideoUNet
from enerverse.train import TrainConfig, train
from enerverse.train.autoencoder import AutoencoderTask
from enerverse.train.world import WorldLossConfig, WorldModel, WorldTask

CONFIG = TrainConfig(steps=14, batch=2, warmup=3, save_every=4, log_every=1, precision="no", average=0.9)


def random_episodes() -> LatentEpisodes:
    """Three episodes of random latents [60, 2, 4, 4, 4]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    pose = torch.eye(4)
    pose[2, 3] = -1.0
    action = draw(60, 7).tanh()
    return LatentEpisodes(
        latents=draw(60, 2, 4, 4, 4).half(), starts=torch.tensor([0, 25, 45, 60]), state=0.1 * draw(60, 11),
        action=action, label=action, privileged=torch.zeros(60, 0),
        intrinsics=torch.tensor([[18.0, 0, 8], [0, 18, 8], [0, 0, 1]]).expand(3, 2, -1, -1),
        camera_to_world=pose.expand(3, 2, -1, -1), success=torch.tensor([True, False, True]),
        tasks=("lift the cube", "push it", "lift it"), views=("front", "top"), image=(16, 16), fps=10.0,
    )  # fmt: skip


def make_world_task(episodes: LatentEpisodes | None = None, plan_tokens: int = 0, **loss: Any) -> WorldTask:
    """A small world model on random latents."""
    torch.manual_seed(0)
    unet = VideoUNet(
        channels=4,
        grid=4,
        widths=(8, 16),
        blocks=(0, 1),
        head_width=8,
        text_width=8,
        embedding=16,
        plan_tokens=plan_tokens,
    )
    model = WorldModel(unet, HashedTextEncoder(8, 64))
    sampler = ClipSampler(episodes or random_episodes(), ClipConfig(), batch=2)
    config = WorldLossConfig(**loss)
    return WorldTask(model, sampler, FlowX0(), config, channel_std=torch.ones(4), residual_scale=0.7)


def make_task(kind: str) -> Any:
    """The training task `autoencoder`, `kl` or `world`."""
    if kind == "world":
        return make_world_task()
    torch.manual_seed(0)
    images = torch.randint(256, (12, 2, 3, 16, 16), dtype=torch.uint8)
    module: nn.Module = (
        KLAutoencoder(channels=4, widths=(16, 16)) if kind == "kl" else PatchAutoencoder(4, 4, 8, 1, 1)
    )
    return AutoencoderTask(module, images, batch=2)


def strike(task: Any, step: int, blow: Callable[[], None]) -> Any:
    """The same task, but `blow` is called when the batch of `step` is drawn."""
    draw = task.batch

    def batch(number: int) -> Any:
        if number == step:
            blow()
        return draw(number)

    task.batch = batch
    return task


if __name__ == "__main__":
    torch.set_num_threads(1)
    task = make_task(sys.argv[1])
    if len(sys.argv) > 3:
        strike(task, int(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(task, CONFIG, Path(sys.argv[2]), device="cpu")
