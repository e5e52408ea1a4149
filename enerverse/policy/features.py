"""Reading features out of the world model: one pass down at the noisiest step."""

from __future__ import annotations

import torch
from torch import Tensor

from enerverse.model import Conditions, VideoUNet


def fixed_noise(unet: VideoUNet, views: int) -> Tensor:
    """The one noise tensor [1, V, M, C, h, w] that features are always read with, so they do not flicker."""
    config = unet.config
    shape = (1, views, config.chunk, config.channels, config.grid, config.grid)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def read_features(
    unet: VideoUNet, memory: Tensor, offsets: Tensor, rays: Tensor, text: Tensor, frames: tuple[int, ...]
) -> Tensor:
    """Mid-block features [B, F, V, h', w', D] of the window frames `frames` for memory [B, V, K, C, h, w].

    One backbone pass at pure noise, the way up is not run (EnerVerse, section 2.3: the first denoising step).
    It runs in bfloat16, in training as in use.
    """
    noise = fixed_noise(unet, memory.shape[1]).to(memory).expand(len(memory), -1, -1, -1, -1, -1)
    time = torch.ones(len(memory), device=memory.device)
    conditions = Conditions(memory=memory, offsets=offsets, rays=rays, text=text)
    with torch.autocast(memory.device.type, torch.bfloat16):
        features = unet.features(noise, time, conditions).float()
    return features[:, :, list(frames)].transpose(1, 2)
