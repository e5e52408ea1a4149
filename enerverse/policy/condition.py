"""What an action head is conditioned on, as one row of tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enerverse.model import HashedTextEncoder
from enerverse.policy.config import PolicyConfig

FRAMES_SEEN = 2


@dataclass(frozen=True, kw_only=True)
class PolicyInputs:
    """Inputs of B decisions; None where a policy does not use one.

    state [B, S]; latents [B, 2, V, C, h, w] of the last two frames; world [B, F, V, h', w', D] mid-block
    features; pixels [B, 2, V, 3, P, P] in [0, 1]; privileged [B, S']; texts: B instructions.
    """

    state: Tensor
    texts: tuple[str, ...]
    latents: Tensor | None = None
    world: Tensor | None = None
    pixels: Tensor | None = None
    privileged: Tensor | None = None

    def to(self, device: torch.device | str) -> PolicyInputs:
        """The same inputs with tensors on `device`, in float32."""
        moved = {
            f.name: value.to(device).float()
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


class SpatialSoftmax(nn.Module):
    """Expected image position of every channel: [N, C, h, w] -> [N, 2 C], in [-1, 1] (Levine et al.,
    2016)."""

    def forward(self, x: Tensor) -> Tensor:
        ys = torch.linspace(-1, 1, x.shape[-2], device=x.device)
        xs = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        weights = x.flatten(2).softmax(-1).view_as(x)
        return torch.cat([(weights.sum(-2) * xs).sum(-1), (weights.sum(-1) * ys).sum(-1)], 1)


class PictureTokens(nn.Module):
    """Convolutions over each view, then per view one keypoint token and a 4 x 4 grid of patch tokens."""

    def __init__(self, channels: int, views: int, config: PolicyConfig, *, stem_strides: int = 0):
        super().__init__()
        inputs, layers = FRAMES_SEEN * channels, []
        for index in range(stem_strides):
            layers += [nn.Conv2d(inputs, 32 * 2**index, 3, 2, 1), nn.GroupNorm(8, 32 * 2**index), nn.SiLU()]
            inputs = 32 * 2**index
        self.net = nn.Sequential(
            *layers, nn.Conv2d(inputs, 96, 3, padding=1), nn.GroupNorm(8, 96), nn.SiLU(),
            nn.Conv2d(96, 96, 3, padding=1), nn.GroupNorm(8, 96), nn.SiLU(),
        )  # fmt: skip
        self.points = nn.Conv2d(96, config.keypoints, 3, padding=1)
        self.locate = SpatialSoftmax()
        self.point_token = nn.Linear(2 * config.keypoints, config.width)
        self.patch_token = nn.Linear(96, config.width)
        self.view = nn.Parameter(0.02 * torch.randn(views, 1, config.width))
        self.place = nn.Parameter(0.02 * torch.randn(16, config.width))

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 2, V, C, h, w] -> [B, V * 17, D]."""
        b, n, v, c, h, w = pictures.shape
        x = self.net(
            pictures.transpose(1, 2).reshape(b * v, n * c, h, w).contiguous(memory_format=torch.channels_last)
        )
        points = self.point_token(self.locate(self.points(x)))[:, None]
        patches = self.patch_token(F.adaptive_avg_pool2d(x, 4).flatten(2).transpose(1, 2)) + self.place
        tokens = torch.cat([points, patches], 1).view(b, v, 17, -1) + self.view
        return tokens.flatten(1, 2)


class WorldTokens(nn.Module):
    """Mid-block features as spatial tokens, or averaged over space and views (EnerVerse, section 2.3)."""

    def __init__(self, shape: tuple[int, ...], config: PolicyConfig):
        super().__init__()
        self.pool = config.world == "mean"
        frames, views, h, w, width = shape
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.width)
        places = (frames, 1, 1, 1) if self.pool else (frames, views, h, w)
        self.place = nn.Parameter(0.02 * torch.randn(*places, config.width))

    def forward(self, features: Tensor) -> Tensor:
        """[B, F, V, h, w, D] -> [B, tokens, D']."""
        if self.pool:
            features = features.mean((2, 3, 4), keepdim=True)
        return (self.project(self.norm(features)) + self.place).flatten(1, 4)


class ConditionTokens(nn.Module):
    """All inputs a policy uses, as one row of tokens [B, N, D]."""

    state_mean: Tensor
    state_std: Tensor

    def __init__(
        self,
        config: PolicyConfig,
        views: int,
        latent_channels: int,
        world_shape: tuple[int, ...] | None,
    ):
        super().__init__()
        self.register_buffer("state_mean", torch.zeros(config.state_dim + config.privileged))
        self.register_buffer("state_std", torch.ones(config.state_dim + config.privileged))
        self.text = HashedTextEncoder(config.width)
        self.state = nn.Sequential(
            nn.Linear(config.state_dim + config.privileged, 256), nn.SiLU(), nn.Linear(256, config.width)
        )
        self.latents = PictureTokens(latent_channels, views, config) if config.latents else None
        self.pixels = PictureTokens(3, views, config, stem_strides=3) if config.pixels else None
        self.world = WorldTokens(world_shape, config) if config.world and world_shape else None

    def forward(self, inputs: PolicyInputs) -> Tensor:
        body = inputs.state if inputs.privileged is None else torch.cat([inputs.state, inputs.privileged], 1)
        body = ((body - self.state_mean) / self.state_std).clamp(-5, 5)
        rows = [self.text(list(inputs.texts))[:, None], self.state(body)[:, None]]
        for module, value in (
            (self.latents, inputs.latents),
            (self.pixels, inputs.pixels),
            (self.world, inputs.world),
        ):
            if module is not None:
                if value is None:
                    raise ValueError(
                        "inputs: expected every input that this policy was trained on, got None for one"
                    )
                rows.append(module(value))
        return torch.cat(rows, 1)
