"""One denoising loop for every objective: a diffusers scheduler drives it, the network answers with x_0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from enerverse.diffusion.objectives import Objective

Scheduler = DDIMScheduler | FlowMatchEulerDiscreteScheduler
Generators = torch.Generator | list[torch.Generator] | None


def scheduler_times(scheduler: Scheduler, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Times in (0, 1] that the network is asked at, noisiest first; sets the scheduler to `steps` steps."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Left to itself the scheduler shifts an end that is shifted already, and the last step is all but empty.
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=device)
        return torch.as_tensor(scheduler.sigmas)[:-1].to(device)
    scheduler.set_timesteps(steps, device=device)
    return (torch.as_tensor(scheduler.timesteps) + 1) / len(scheduler.alphas_cumprod)


def draw_noise(shape: tuple[int, ...], generator: Generators = None) -> Tensor:
    """Standard normal noise on the CPU; a list of generators draws one sample of the batch each, so that a
    sample does not depend on its neighbours. Raises ValueError when the list has another length."""
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"generator: expected one per episode ({shape[0]}), got {len(generator)}")
    return randn_tensor(shape, generator=generator, device=torch.device("cpu"))


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    objective: Objective,
    scheduler: Scheduler,
    steps: int,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    start: int = 0,
) -> Tensor:
    """Walk `noise` [B, ...] to a clean sample in `steps` steps.

    predict(noisy, time [B]) returns the network's prediction; on_step(index, time, sample) may look at or
    replace the sample after every step. With `start`, that many of the noisiest steps are left out and `noise` is a
    sample at `scheduler_times(...)[start]` already (SDEdit, arXiv 2108.01073).
    """
    times = scheduler_times(scheduler, steps, noise.device)
    walk: Any = scheduler  # diffusers types its samples as FloatTensor and its results as tuples
    if start and isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        walk.set_begin_index(start)
    sample = noise
    for index, (time, step) in enumerate(zip(times, walk.timesteps, strict=True)):
        if index < start:
            continue
        batch_time = time.expand(len(sample)).float()
        prediction = predict(sample, batch_time)
        output = _output(prediction, sample, batch_time, objective, scheduler)
        sample = walk.step(output, step, sample).prev_sample
        if on_step is not None:
            sample = on_step(index, time, sample)
    return sample


def _output(
    prediction: Tensor, noisy: Tensor, time: Tensor, objective: Objective, scheduler: Scheduler
) -> Tensor:
    """What the scheduler wants: v for DDIM, the velocity (x_t - x_0) / t on the flow path."""
    if isinstance(scheduler, DDIMScheduler):
        return prediction
    clean = objective.clean(prediction, noisy, time)
    return (noisy - clean) / time.view(-1, *[1] * (noisy.ndim - 1))
