"""Diffusers' KL autoencoder behind the interface of `PatchAutoencoder`, for larger presets on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from enerverse.latents.patch import check_images
from enerverse.model.component import Component


class KLAutoencoder(Component):
    """[N, 3, P, P] in [0, 1] to standardised latents [N, channels, P/8, P/8] (three halvings by default)."""

    kl: Any  # diffusers types what its calls return as bare tuples
    latent_mean: Tensor
    latent_std: Tensor

    @register_to_config
    def __init__(
        self, channels: int = 16, widths: tuple[int, ...] = (32, 64, 128, 128), layers_per_block: int = 1
    ):
        super().__init__()
        self.channels, self.patch = channels, 2 ** (len(widths) - 1)
        sizes: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths),
            "block_out_channels": tuple(widths),
            "layers_per_block": layers_per_block,
            "latent_channels": channels,
            "norm_num_groups": 16,
        }
        self.kl = AutoencoderKL(**sizes)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))

    def initialise_from(self, images: Tensor) -> None:
        """Nothing to do: convolutions have no closed-form start."""

    @torch.no_grad()
    def set_statistics(self, images: Tensor) -> None:
        """Measure the per-channel mean and deviation of the posterior means of `images` [N, 3, P, P]."""
        latents = torch.cat(
            [self.kl.encode(part * 2 - 1).latent_dist.mode() for part in images.split(64)]
        ).float()
        self.latent_mean.copy_(latents.mean((0, 2, 3)))
        self.latent_std.copy_(latents.std((0, 2, 3)).clamp_min(1e-4))

    def encode(self, images: Tensor) -> Tensor:
        """Standardised latents [..., C, h, w] of images [..., 3, P, P] in [0, 1] (the posterior mean).

        Raises ValueError when the sides are not multiples of `patch`.
        """
        check_images(images, self.patch)
        flat = self.kl.encode(images.reshape(-1, *images.shape[-3:]) * 2 - 1).latent_dist.mode()
        flat = (flat - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        return flat.reshape(*images.shape[:-3], *flat.shape[-3:])

    def decode(self, latents: Tensor) -> Tensor:
        """Images [..., 3, P, P] in [0, 1] of standardised latents [..., C, h, w]."""
        flat = latents.reshape(-1, *latents.shape[-3:])
        flat = flat * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        images = ((self.kl.decode(flat).sample + 1) / 2).clamp(0, 1)
        return images.reshape(*latents.shape[:-3], *images.shape[-3:])

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruction [N, 3, P, P] from a posterior sample; the KL term is left in `self.kl_loss`."""
        posterior = self.kl.encode(images * 2 - 1).latent_dist
        self.kl_loss = posterior.kl().mean()
        return (self.kl.decode(posterior.sample()).sample + 1) / 2
