"""Training the world model: denoise the M future frames of every view, given sparse memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enerverse.data import Clip, ClipSampler
from enerverse.diffusion import Objective
from enerverse.model import Conditions, FactReader, VideoUNet
from sparse_core import AttentionSlot
from sparse_core.sparsify import sum_losses


@dataclass(frozen=True, kw_only=True)
class WorldLossConfig:
    """Choices of the world-model loss.

    residual: predict the difference to the last memory frame, which keeps what does not move. memory_noise:
    largest deviation of the noise on memory frames, oldest cleanest (EnerVerse, section 3.1; EVAC).
    drop_text, drop_actions: share of samples that are not told the instruction, or the actions. ended_weight:
    weight of end-of-task frames. channel_power: loss weight per latent channel is std ** power. localize: weight of
    telling the simulator's facts from the UNet's plan, where it has one and the data hold them (see `FactReader`).
    act: weight of telling the actions from the plan, where the sample is not told them.
    """

    residual: bool = True
    memory_noise: float = 0.2
    drop_text: float = 0.1
    drop_actions: float = 0.6
    ended_weight: float = 0.2
    channel_power: float = 1.0
    localize: float = 1.0
    act: float = 1.0

    def __post_init__(self) -> None:
        for name in ("drop_text", "drop_actions"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")
        for name in ("memory_noise", "ended_weight", "channel_power", "localize", "act"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)}")


class WorldModel(nn.Module):
    """The trained parts together: UNet, instruction encoder, and a reader of facts that serves training alone."""

    def __init__(self, unet: VideoUNet, text_encoder: nn.Module, reader: FactReader | None = None):
        super().__init__()
        self.unet, self.text_encoder, self.reader = unet, text_encoder, reader


class WorldTask:
    """Random clips, random noise levels, loss on future frames only."""

    def __init__(
        self,
        model: WorldModel,
        sampler: ClipSampler,
        objective: Objective,
        config: WorldLossConfig,
        *,
        channel_std: Tensor,
        residual_scale: float,
    ):
        self.module, self.sampler, self.objective, self.config = model, sampler, objective, config
        weights = channel_std.float().cpu() ** config.channel_power
        self.channel_weights = (weights / weights.mean())[:, None, None]
        self.residual_scale = residual_scale

    def batch(self, step: int) -> Clip:
        return self.sampler.batch(step)

    def loss(self, clip: Clip, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Weighted squared error of the objective's target, averaged over future frames."""
        count = len(clip.texts)
        memory = noisy_memory(clip.memory, self.config.memory_noise, generator)
        reference = memory[:, :, -1:] if self.config.residual else 0.0
        clean = (clip.future - reference) / self.residual_scale
        noise = torch.randn(clean.shape, generator=generator)
        time = self.objective.sample_times(count, generator)
        keep_text = torch.rand(count, generator=generator) >= self.config.drop_text
        told = torch.rand(count, generator=generator) >= self.config.drop_actions
        noisy = self.objective.corrupt(clean, noise, time)
        target = self.objective.target(clean, noise, time)
        device = next(self.module.parameters()).device
        texts = self.module.text_encoder(list(clip.texts)) * keep_text.to(device)[:, None]
        conditions = Conditions(
            memory=memory.to(device),
            offsets=clip.offsets.to(device),
            rays=clip.rays.to(device),
            text=texts,
            actions=clip.actions.to(device),
            path=clip.path.to(device),
            has_actions=told.to(device),
        )
        prediction, plan = self.module.unet(noisy.to(device), time.to(device), conditions, look=True)
        error = (prediction.float() - target.to(device)).square() * self.channel_weights.to(device)
        frames = error.mean((1, 3, 4, 5))
        weights = torch.where(clip.ended > 0, self.config.ended_weight, 1.0).to(device)
        loss = (frames * weights).mean()
        hints = {} if plan is None else self._hints(plan, clip, told)
        logs = {name: float(value.detach()) for name, value in {"pictures": loss, **hints}.items()}
        shares = {"places": self.config.localize, "actions": self.config.act}
        # A sparse attention that learns where to look has a loss of its own.
        looking = sum_losses(
            [part.layer for part in self.module.modules() if isinstance(part, AttentionSlot)]
        )
        if looking is not None:
            loss, logs["attention"] = loss + looking, float(looking.detach())
        return loss + sum(shares[name] * value for name, value in hints.items()), logs

    def _hints(self, plan: Tensor, clip: Clip, told: Tensor) -> dict[str, Tensor]:
        """What the plan's tokens [B, n, D] are asked besides the pictures: the simulator's facts, and the actions of the
        samples that were not told them."""
        hints = {}
        if self.module.reader is not None:
            hints["places"] = self.module.reader.loss(plan, clip.facts.to(plan.device))
        if self.config.act > 0:
            assert self.module.unet.plan is not None
            error = (self.module.unet.plan.actions(plan).float() - clip.actions.to(plan.device)).square()
            blind = (~told).to(error)
            hints["actions"] = (error.mean((1, 2)) * blind).sum() / blind.sum().clamp_min(1)
        return hints


def noisy_memory(memory: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Memory [B, V, K, ...] with noise that grows towards the newest frame; half the frames stay clean.

    Intensity follows 1 - cos(u), u uniform in (-pi/2, pi/2) clipped at 0 and sorted along time, as in EVAC.
    """
    if strength == 0:
        return memory
    u = ((torch.rand(memory.shape[0], memory.shape[2], generator=generator) - 0.5) * math.pi).clamp_min(0)
    amount = strength * (1 - u.cos()).sort(1).values
    noise = torch.randn(memory.shape, generator=generator)
    return memory + noise * amount[:, None, :, None, None, None]


def measure_residual_scale(sampler: ClipSampler, config: WorldLossConfig, batches: int = 32) -> float:
    """Standard deviation of what the network must predict, over some training clips; 1 for absolute
    latents."""
    if not config.residual:
        return 1.0
    squares, counted = 0.0, 0.0
    for step in range(batches):
        clip = sampler.batch(10_000_000 + step)  # steps no training reaches
        running = (1 - clip.ended)[:, None, :, None, None, None]
        moved = (clip.future - clip.memory[:, :, -1:]).square() * running
        squares += float(moved.sum())
        counted += float(running.sum()) * moved[0, :, 0].numel()
    # Where nothing ever moves there is nothing to scale; the floor keeps the loss finite.
    return max(1e-3, math.sqrt(squares / max(1.0, counted)))
