"""Diffusion action head: a transformer that turns noise into a chunk of actions, given condition tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from enerverse.config import from_dict
from enerverse.diffusion import FlowX0, Generators, denoise, draw_noise
from enerverse.model.attention import CrossAttention, SelfAttention
from enerverse.model.blocks import fourier_features
from enerverse.model.component import Component
from enerverse.model.locator import Locator
from enerverse.policy.condition import ConditionTokens, PolicyInputs
from enerverse.policy.config import PolicyConfig


class ActionBlock(nn.Module):
    """Attention among the actions of a chunk, attention to the condition, and an MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attention = SelfAttention(width, heads)
        self.cross_attention = CrossAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, R, M, C]: R noise draws share one condition [B, S, C]."""
        b, r, m, c = x.shape
        x = self.self_attention(x.view(b * r, m, c))
        x = self.cross_attention(x.view(b, r * m, c), context)
        return (x + self.mlp(x)).view(b, r, m, c)


class ActionHead(Component):
    """Predicts x_0 of an action chunk (EnerVerse-A predicts the sample, DDPM-style; here on the flow
    path)."""

    objective = FlowX0(shift=1.0, pure_noise=0.1)
    action_mean: Tensor
    action_std: Tensor

    @register_to_config
    def __init__(
        self,
        policy: dict[str, Any] | None = None,
        views: int = 3,
        latent_channels: int = 16,
        world_shape: tuple[int, ...] | None = None,
        facts: int = 0,
    ):
        super().__init__()
        self.settings = from_dict(PolicyConfig, policy or {})
        config = self.settings
        self.condition = ConditionTokens(
            config, views, latent_channels, tuple(world_shape) if world_shape else None
        )
        locates = config.localize > 0 and facts > 0 and not config.privileged
        self.locator = Locator(config.width, config.heads, facts) if locates else None
        self.register_buffer("action_mean", torch.zeros(config.action_dim))
        self.register_buffer("action_std", torch.ones(config.action_dim))
        self.inputs = nn.Linear(config.action_dim, config.width)
        self.place = nn.Parameter(0.02 * torch.randn(config.chunk, config.width))
        self.time = nn.Sequential(
            nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.blocks = nn.ModuleList(ActionBlock(config.width, config.heads) for _ in range(config.layers))
        self.out = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.action_dim))

    @classmethod
    def build(
        cls,
        config: PolicyConfig,
        views: int,
        channels: int,
        world_shape: tuple[int, ...] | None,
        facts: int = 0,
    ) -> ActionHead:
        """A head from a `PolicyConfig`; `facts`: width of the simulator's facts that its data hold."""
        return cls(asdict(config), views, channels, world_shape if config.world else None, facts)

    @torch.no_grad()
    def set_statistics(self, body: Tensor, actions: Tensor, facts: Tensor | None = None) -> None:
        """Store the mean and deviation of proprioception (with privileged entries) [N, S], of actions [N, A] and of the
        simulator's facts [N, S']."""
        self.condition.state_mean.copy_(body.mean(0))
        self.condition.state_std.copy_(body.std(0).clamp_min(1e-3))
        self.action_mean.copy_(actions.mean(0))
        self.action_std.copy_(actions.std(0).clamp_min(1e-2))
        if self.locator is not None and facts is not None:
            self.locator.set_statistics(facts)

    def predict(self, noisy: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """x_0 [B, R, M, A] of `noisy` [B, R, M, A] at `time` [B, R]."""
        embedding = self.time(fourier_features(time * 1000, self.place.shape[1]))[:, :, None]
        x = self.inputs(noisy) + self.place + embedding
        for block in self.blocks:
            x = block(x, context)
        return self.out(x)

    def _context(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor | None]:
        """Condition tokens [B, N, D] with the locator's among them, and those alone [B, 4, D]."""
        context = self.condition(inputs)
        if self.locator is None:
            return context, None
        places = self.locator(context)
        return torch.cat([context, places], 1), places

    def loss(
        self,
        inputs: PolicyInputs,
        actions: Tensor,
        generator: torch.Generator,
        facts: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of x_0 over `noise_draws` draws per decision, plus the locator's; actions [B, M, A], facts
        [B, S']. Also returns the parts by name."""
        b, draws = len(actions), self.settings.noise_draws
        clean = ((actions - self.action_mean) / self.action_std)[:, None].expand(-1, draws, -1, -1)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        time = self.objective.sample_times(b * draws, generator).to(clean)
        noisy = self.objective.corrupt(clean.flatten(0, 1), noise.flatten(0, 1), time).view_as(clean)
        context, places = self._context(inputs)
        loss = F.mse_loss(self.predict(noisy, time.view(b, draws), context).float(), clean)
        logs = {"actions": float(loss.detach())}
        if self.locator is not None and places is not None and facts is not None:
            located = self.locator.loss(places, facts)
            loss = loss + self.settings.localize * located
            logs["places"] = float(located.detach())
        return loss, logs

    @torch.no_grad()
    def sample(self, inputs: PolicyInputs, generator: Generators = None, steps: int | None = None) -> Tensor:
        """Action chunks [B, M, A], clipped to [-1, 1]; `generator` is one, or one per decision; `steps` of denoising,
        default those of the settings."""
        context, _ = self._context(inputs)
        shape = (len(inputs.texts), self.settings.chunk, self.settings.action_dim)
        noise = draw_noise(shape, generator).to(context)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            return self.predict(noisy[:, None], time[:, None], context)[:, 0]

        steps = self.settings.steps if steps is None else steps
        clean = denoise(predict, noise, self.objective, self.objective.scheduler(), steps)
        return (clean * self.action_std + self.action_mean).clamp(-1, 1)
