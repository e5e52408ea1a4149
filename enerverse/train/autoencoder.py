"""Training an autoencoder on the frames of a dataset."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class AutoencoderTask:
    """L1 and squared error; pixels that move weigh more, since the arm and the objects are few of them.

    images uint8 [N, V, 3, P, P]; `background` [V, 3, P, P] is the median picture per view. Batches are a pure
    function of the step.
    """

    def __init__(
        self, module: nn.Module, images: Tensor, *, batch: int = 32, seed: int = 0, moving_weight: float = 5.0
    ):
        self.module, self.images = module, images
        self.batch_size, self.seed, self.moving_weight = batch, seed, moving_weight
        sample = images[:: max(1, len(images) // 200)]
        self.background = sample.float().median(0).values / 255

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images [B, 3, P, P] and weights [B, 1, P, P]."""
        rng = np.random.default_rng((self.seed, step))
        rows = torch.from_numpy(rng.integers(len(self.images), size=self.batch_size))
        views = torch.from_numpy(rng.integers(self.images.shape[1], size=self.batch_size))
        images = self.images[rows, views].float() / 255
        moving = (images - self.background[views]).abs().amax(1, keepdim=True) > 20 / 255
        return images, 1 + (self.moving_weight - 1) * moving

    def loss(
        self, batch: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """0.5 L1 + squared error, weighted; plus a small KL term where the autoencoder has one."""
        device = next(self.module.parameters()).device
        images, weights = (part.to(device) for part in batch)
        error = self.module(images.contiguous(memory_format=torch.channels_last)).float() - images
        loss = (weights * (0.5 * error.abs() + error.square())).mean()
        kl = getattr(self.module, "kl_loss", None)
        if kl is not None:
            loss = loss + 1e-6 * kl
        return loss, {"psnr": float(-10 * error.detach().square().mean().log10())}
