"""How fast the world model trains and imagines on a device: milliseconds per step and per chunk, by preset.

python -m benchmarks.throughput --device cuda --preset small
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from benchmarks.results_io import write_result
from enerverse.diffusion import make_objective
from enerverse.model import Conditions, VideoUNet
from enerverse.presets import Preset, get_preset
from enerverse.train.stages import build_text_encoder, default_device


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Time one preset. batch 0 takes the preset's; repeats are timed after three warm-up calls."""

    device: str | None = None
    preset: str = "small"
    batch: int = 0
    repeats: int = 10


def random_inputs(preset: Preset, batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    """Latents, times and conditions of the preset's shapes."""
    v, k, m = len(preset.views), preset.clips.memory, preset.clips.chunk
    c, g = preset.autoencoder.channels, preset.grid
    conditions = Conditions(
        memory=torch.randn(batch, v, k, c, g, g, device=device),
        offsets=torch.tensor([[-20, -10, -1, 0]], device=device).expand(batch, -1),
        rays=torch.randn(batch, v, 6, g, g, device=device),
        text=torch.randn(batch, preset.text.width, device=device),
        actions=torch.rand(batch, m, 7, device=device) * 2 - 1,
        path=torch.randn(batch, v, m, 4, g, g, device=device),
    )
    return torch.randn(batch, v, m, c, g, g, device=device), torch.rand(batch, device=device), conditions


def median_ms(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median milliseconds of `call`, the device idle before and after."""
    times = []
    for index in range(repeats + 3):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        if index >= 3:
            times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main(settings: Throughput) -> None:
    """Time a training step and the denoising of a chunk, and write the result file."""
    began, device = time.perf_counter(), settings.device or default_device()
    preset = get_preset(settings.preset)
    batch = settings.batch or preset.train_world.batch
    unet = VideoUNet(**preset.unet_arguments()).to(device)
    encoder = build_text_encoder(preset.text)
    objective = make_objective(preset.diffusion.objective, **preset.diffusion.options())

    def train_step() -> None:
        noisy, times, conditions = random_inputs(preset, batch, device)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            loss = (unet(noisy, times, conditions).float() - noisy).square().mean()
        loss.backward()
        unet.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(count: int) -> None:
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            unet(*random_inputs(preset, count, device))

    values = {
        "preset": preset.name,
        "objective": type(objective).__name__,
        "parameters": sum(p.numel() for p in unet.parameters())
        + sum(p.numel() for p in encoder.parameters()),
        "batch": batch,
        "train_step_ms": median_ms(train_step, device, settings.repeats),
        "forward_ms_batch_1": median_ms(lambda: forward(1), device, settings.repeats),
        f"forward_ms_batch_{batch}": median_ms(lambda: forward(batch), device, settings.repeats),
    }
    print(values)
    print(
        write_result(f"speed/world_{preset.name}", values, seconds=time.perf_counter() - began, device=device)
    )


if __name__ == "__main__":
    main(tyro.cli(Throughput))
