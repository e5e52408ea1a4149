"""What must hold on a GPU; `make test-gpu` runs these, and they are skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.throughput import random_inputs
from enerverse import presets
from enerverse.model import Conditions, VideoUNet
from enerverse.train.loop import TrainConfig, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]


def on(conditions: Conditions, device: str) -> Conditions:
    return replace(conditions, **{k: v.to(device) for k, v in vars(conditions).items() if v is not None})


def test_unet_agrees_with_the_cpu():
    torch.manual_seed(0)
    preset = presets.tiny()
    unet = VideoUNet(**preset.unet_arguments())
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    noisy, time, conditions = random_inputs(preset, 2, "cpu")
    with torch.no_grad():
        expected = unet(noisy, time, conditions)
        found = unet.cuda()(noisy.cuda(), time.cuda(), on(conditions, "cuda")).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_gradients_agree_with_the_cpu():
    torch.manual_seed(0)
    preset = presets.tiny()
    noisy, time, conditions = random_inputs(preset, 2, "cpu")
    gradients = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        unet = VideoUNet(**preset.unet_arguments())
        for parameter in unet.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        unet.to(device)
        unet(noisy.to(device), time.to(device), on(conditions, device)).square().mean().backward()
        gradients.append([p.grad.cpu() for p in unet.parameters() if p.grad is not None])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3 * float(expected.abs().max()) + 1e-7)


class _Line:
    """Fits y = 2 x: the smallest thing the loop can train."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(1, 1).cuda()

    def batch(self, step: int) -> torch.Tensor:
        return torch.randn(64, 1, generator=torch.Generator().manual_seed(step))

    def loss(self, batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = batch.cuda()
        return (self.module(x).float() - 2 * x).square().mean(), {}


def test_the_training_loop_learns_in_bfloat16(tmp_path: Path):
    config = TrainConfig(steps=200, rate=5e-2, warmup=5, average=0.9, weight_decay=0.0, save_every=100)
    module = train(_Line(), config, tmp_path)
    assert float(module.weight) == pytest.approx(2.0, abs=0.05)
