"""Patch autoencoder: images to a small grid of latents, with every convolution at the latent resolution.

A linear path per patch, initialised from principal components, carries most of the picture from the first
step; a residual convolutional path adds what neighbouring patches know. No convolution runs above the latent
grid, so training it takes minutes on one core.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from enerverse.model.component import Component, start_at_zero


def check_images(images: Tensor, patch: int) -> None:
    """Raise ValueError unless `images` is [..., 3, H, W] with sides in multiples of `patch`."""
    if images.shape[-3] != 3 or images.shape[-1] % patch or images.shape[-2] % patch:
        raise ValueError(
            f"images: expected [..., 3, H, W] with sides in multiples of {patch}, got {list(images.shape)}; "
            "resize the images first"
        )


class ResidualConv(nn.Module):
    """x + conv(act(norm(x))) twice, at constant width; the last convolution starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = start_at_zero(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def _residual_path(inputs: int, width: int, outputs: int, blocks: int) -> nn.Sequential:
    last = start_at_zero(nn.Conv2d(width, outputs, 3, padding=1))
    stages = [ResidualConv(width) for _ in range(blocks)]
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1), *stages, nn.GroupNorm(8, width), nn.SiLU(), last
    )


class PatchAutoencoder(Component):
    """Deterministic autoencoder from [N, 3, P, P] in [0, 1] to [N, channels, P/patch, P/patch].

    Latents leave `encode` standardised per channel once `set_statistics` has been called (training does it).
    """

    latent_mean: Tensor
    latent_std: Tensor

    @register_to_config
    def __init__(
        self,
        patch: int = 8,
        channels: int = 16,
        width: int = 160,
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
    ):
        super().__init__()
        self.patch, self.channels = patch, channels
        pixels = 3 * patch * patch
        self.to_latent = nn.Conv2d(pixels, channels, 1)
        self.to_pixels = nn.Conv2d(channels, pixels, 1)
        self.encoder = _residual_path(pixels, width, channels, encoder_blocks)
        self.decoder = _residual_path(channels, width, pixels, decoder_blocks)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))

    @torch.no_grad()
    def initialise_from(self, images: Tensor) -> None:
        """Set the linear paths to the principal components of the patches of `images` [N, 3, P, P]."""
        patches = F.pixel_unshuffle(images * 2 - 1, self.patch).permute(0, 2, 3, 1).flatten(0, 2).double()
        mean = patches.mean(0)
        _, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        basis = vectors[:, -self.channels :].flip(1).T.float()
        self.to_latent.weight.copy_(basis[:, :, None, None])
        assert self.to_latent.bias is not None
        assert self.to_pixels.bias is not None
        self.to_latent.bias.copy_(-basis @ mean.float())
        self.to_pixels.weight.copy_(basis.T[:, :, None, None])
        self.to_pixels.bias.copy_(mean.float())

    @torch.no_grad()
    def set_statistics(self, images: Tensor) -> None:
        """Measure the per-channel mean and deviation of the raw latents of `images` [N, 3, P, P]."""
        latents = torch.cat([self._raw_latents(part) for part in images.split(256)]).float()
        self.latent_mean.copy_(latents.mean((0, 2, 3)))
        self.latent_std.copy_(latents.std((0, 2, 3)).clamp_min(1e-4))

    def _raw_latents(self, images: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(images * 2 - 1, self.patch)
        return self.to_latent(patches) + self.encoder(patches)

    def _raw_images(self, latents: Tensor) -> Tensor:
        patches = self.to_pixels(latents) + self.decoder(latents)
        return (F.pixel_shuffle(patches, self.patch) + 1) / 2

    def encode(self, images: Tensor) -> Tensor:
        """Standardised latents [..., C, h, w] of images [..., 3, P, P] in [0, 1].

        Raises ValueError when the sides are not multiples of the patch.
        """
        check_images(images, self.patch)
        flat = self._raw_latents(images.flatten(0, -4) if images.ndim > 4 else images)
        flat = (flat - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        return flat.reshape(*images.shape[:-3], *flat.shape[-3:])

    def decode(self, latents: Tensor) -> Tensor:
        """Images [..., 3, P, P] in [0, 1] of standardised latents [..., C, h, w]."""
        flat = latents.flatten(0, -4) if latents.ndim > 4 else latents
        flat = flat * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        images = self._raw_images(flat).clamp(0, 1)
        return images.reshape(*latents.shape[:-3], *images.shape[-3:])

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruction [N, 3, P, P] without clamping, for training."""
        return self._raw_images(self._raw_latents(images))
