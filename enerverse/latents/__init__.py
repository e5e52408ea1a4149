"""Autoencoders between images and the latent grid that the world model works on."""

from enerverse.latents.kl import KLAutoencoder
from enerverse.latents.patch import PatchAutoencoder

__all__ = ["KLAutoencoder", "PatchAutoencoder"]
