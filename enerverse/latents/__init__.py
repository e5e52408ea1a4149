"""Autoencoders between images and the latent grid that the world model works on."""

from enerverse.latents.kl import KLAutoencoder
from enerverse.latents.patch import PatchAutoencoder

Autoencoder = PatchAutoencoder | KLAutoencoder

__all__ = ["Autoencoder", "KLAutoencoder", "PatchAutoencoder"]
