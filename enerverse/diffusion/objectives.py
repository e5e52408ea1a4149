"""What the network predicts and how samples walk back from noise, both through diffusers' schedulers.

`FlowX0` (default): clean latents on the straight path x_t = (1 - t) x_0 + t e, times shifted towards noise.
`VPrediction`: the paper's choice, v = alpha e - sigma x_0 on a linear schedule rescaled to zero terminal SNR
(EnerVerse, arXiv 2501.01895, table 10; Lin et al., arXiv 2305.08891).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from enerverse.config import unknown


class Objective(Protocol):
    """Training pairs and the matching sampler. Times lie in [0, 1]; 1 is pure noise."""

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor: ...

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor: ...

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor: ...

    def clean(self, prediction: Tensor, noisy: Tensor, time: Tensor) -> Tensor: ...

    def scheduler(self) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler: ...


def _like(time: Tensor, x: Tensor) -> Tensor:
    return time.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class FlowX0:
    """Predict x_0 on the flow path. `pure_noise` of the samples sit exactly at t = 1, where features are
    read."""

    shift: float = 3.0
    pure_noise: float = 0.2

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(count, generator=generator)
        time = self.shift * u / (1 + (self.shift - 1) * u)
        return torch.where(torch.rand(count, generator=generator) < self.pure_noise, torch.ones(()), time)

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        t = _like(time, clean)
        return (1 - t) * clean + t * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return clean

    def clean(self, prediction: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        return prediction

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(shift=self.shift)


@dataclass(frozen=True, kw_only=True)
class VPrediction:
    """Predict v with zero terminal SNR; 1000 training steps, betas linear from 8.5e-4 to 0.012."""

    steps: int = 1000

    def scheduler(self) -> DDIMScheduler:
        return DDIMScheduler(
            num_train_timesteps=self.steps,
            beta_start=8.5e-4,
            beta_end=0.012,
            beta_schedule="linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
        )

    def _coefficients(self, time: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        index = (time * self.steps).round().long().clamp(1, self.steps) - 1
        products = self.scheduler().alphas_cumprod.to(time.device)[index]
        return _like(products.sqrt(), x), _like((1 - products).sqrt(), x)

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        return (torch.randint(self.steps, (count,), generator=generator) + 1) / self.steps

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = self._coefficients(time, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = self._coefficients(time, clean)
        return alpha * noise - sigma * clean

    def clean(self, prediction: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = self._coefficients(time, noisy)
        return alpha * noisy - sigma * prediction


OBJECTIVES = {"flow_x0": FlowX0, "v_zero_snr": VPrediction}


def make_objective(name: str, **options: float) -> Objective:
    """The objective called `name`; ValueError names the closest one when there is none."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name](**options)
