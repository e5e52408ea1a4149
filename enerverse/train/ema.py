"""Exponential moving average of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """A running average of every floating-point entry of a module's state."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the weights of `module` after optimiser step number `step` (counted from 1)."""
        # The average follows closely at first, so a short run is not dominated by its initialisation.
        decay = min(self.decay, step / (step + 10))
        for name, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved average."""
        self.average = tensors
