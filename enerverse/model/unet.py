"""The chunkwise multi-view video UNet: K memory frames and M future frames of V views in one window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from enerverse.model.blocks import Downsample, FrameConv, SpaceTimeBlock, Upsample, fourier_features
from enerverse.model.component import Component, start_at_zero
from enerverse.model.locator import Plan
from sparse_core.sparsify import sparsify

RAY_CHANNELS = 6
PATH_CHANNELS = 4


@dataclass(frozen=True)
class Conditions:
    """What one denoising pass is told besides the noisy latents.

    memory [B, V, K, C, h, w] clean context, oldest first; offsets [B, K] their times to the last (<= 0); rays
    [B, V, 6, h, w]; text [B, E] instruction embedding or zeros; actions [B, M, A] in [-1, 1] and path [B, V,
    M, 4, h, w] (`enerverse.views.path_map`), or None for both: then the model imagines from the instruction
    alone.
    """

    memory: Tensor
    offsets: Tensor
    rays: Tensor
    text: Tensor
    actions: Tensor | None = None
    path: Tensor | None = None
    has_actions: Tensor | None = None


class VideoUNet(Component):
    """Predicts the diffusion target of M future frames, all views at once.

    Input channels per frame, as in EnerVerse (arXiv 2501.01895) and EVAC: latents (clean for memory, noisy
    for the future), the last memory frame repeated, a mask that marks the future, and a 6-channel ray map;
    for action-conditioned passes four more hold where the commanded gripper lies in each picture.
    attention: `dense` or a method of `sparse_core` (`s2` or `attention/s2`) with `attention_options` for its config, in
    the attentions over views (`.views.`) and over time (`.time.`) whose name `attention_places` matches. A method that
    takes a condition (SeerAttention) may be told, over views, the `embedding` channels of diffusion time and frame. A mask
    serves `mask_steps` denoising steps, and the first `dense_steps` attend to everything.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 16,
        grid: int = 8,
        memory: int = 4,
        chunk: int = 8,
        widths: tuple[int, ...] = (64, 160),
        blocks: tuple[int, ...] = (0, 2),
        mid_blocks: int = 1,
        head_width: int = 32,
        text_width: int = 128,
        action_dim: int = 7,
        embedding: int = 256,
        plan_tokens: int = 0,
        attention: str = "dense",
        attention_options: dict[str, Any] | None = None,
        attention_places: str = "",
        mask_steps: int = 1,
        dense_steps: int = 0,
    ):
        super().__init__()
        if grid % 2 ** (len(widths) - 1):
            raise ValueError(
                f"grid: expected a multiple of {2 ** (len(widths) - 1)} for {len(widths)} levels, got {grid}"
            )
        self.channels, self.memory, self.chunk = channels, memory, chunk
        self.feature_width, self.feature_grid = widths[-1], grid // 2 ** (len(widths) - 1)

        def stage(level: int) -> nn.ModuleList:
            heads = max(1, widths[level] // head_width)
            count = max(1, blocks[level])
            return nn.ModuleList(
                SpaceTimeBlock(widths[level], embedding, heads, attention=blocks[level] > 0, memory=memory)
                for _ in range(count)
            )

        self.inputs = FrameConv(2 * channels + 1 + RAY_CHANNELS + PATH_CHANNELS, widths[0])
        self.place = nn.Parameter(torch.zeros(grid, grid, widths[0]))
        self.time_mlp = _mlp(embedding, embedding)
        self.slot_mlp = _mlp(embedding, embedding)
        self.text_mlp = _mlp(text_width, embedding)
        self.action_mlp = _mlp(2 * action_dim, embedding)
        levels = range(len(widths))
        self.down = nn.ModuleList(stage(level) for level in levels)
        self.downsample = nn.ModuleList(Downsample(widths[i], widths[i + 1]) for i in levels[:-1])
        self.mid = nn.ModuleList(
            SpaceTimeBlock(widths[-1], embedding, max(1, widths[-1] // head_width), memory=memory)
            for _ in range(mid_blocks)
        )
        self.plan = (
            Plan(widths[-1], max(1, widths[-1] // head_width), embedding, (chunk, action_dim), plan_tokens)
            if plan_tokens
            else None
        )
        self.upsample = nn.ModuleList(Upsample(widths[i + 1], widths[i]) for i in levels[:-1])
        self.merge = nn.ModuleList(nn.Linear(widths[i], widths[i]) for i in levels)
        self.up = nn.ModuleList(stage(level) for level in levels)
        self.out_norm = nn.LayerNorm(widths[0])
        self.out = start_at_zero(FrameConv(widths[0], channels))
        if attention != "dense":
            sparsify(self, attention, attention_places, **(attention_options or {}))

    def forward(self, noisy: Tensor, time: Tensor, conditions: Conditions, *, look: bool = False) -> Any:
        """Prediction [B, V, M, C, h, w] for `noisy` of that shape at diffusion `time` [B] in [0, 1] (1 = pure noise).

        With `look`, a pair: the prediction, and the plan's tokens [B, n, D] (None for a UNet without a plan).
        """
        x, embedding, skips = self._descend(noisy, time, conditions)
        tokens = None
        if self.plan is not None:
            tokens, told = self.plan(x)
            embedding = embedding + told
        for level in reversed(range(len(self.up))):
            x = x + self.merge[level](skips[level])
            for block in cast(nn.ModuleList, self.up[level]):
                x = block(x, embedding)
            if level:
                x = self.upsample[level - 1](x)
        x = self.out(F.silu(self.out_norm(x[:, :, self.memory :])))
        prediction = x.permute(0, 1, 2, 5, 3, 4)
        return (prediction, tokens) if look else prediction

    def features(self, noisy: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Mid-block activations [B, V, K + M, h', w', D] after one pass down; the way up is not run."""
        return self._descend(noisy, time, conditions)[0]

    def _descend(
        self, noisy: Tensor, time: Tensor, conditions: Conditions
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        embedding = F.silu(self._embed(time, conditions))
        x = self.inputs(self._stack_inputs(noisy, conditions))
        # The residual stream stays in the autocast dtype: on a CPU this halves the memory traffic of a step.
        x = x + self.place.to(x.dtype)
        skips = []
        for level, stage in enumerate(self.down):
            for block in cast(nn.ModuleList, stage):
                x = block(x, embedding)
            skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)
        for block in self.mid:
            x = block(x, embedding)
        return x, embedding, skips

    def _embed(self, time: Tensor, conditions: Conditions) -> Tensor:
        """Per-frame embedding [B, K + M, E]: diffusion time, frame offset, instruction, actions."""
        width = self.config.embedding
        future = torch.arange(1, self.chunk + 1, device=time.device).expand(len(time), -1)
        offsets = torch.cat([conditions.offsets.to(time.device).expand(len(time), -1), future], 1)
        frames = self.slot_mlp(fourier_features(offsets, width, 1000.0))
        whole = self.time_mlp(fourier_features(time * 1000, width)) + self.text_mlp(conditions.text)
        embedding = frames + whole[:, None]
        if conditions.actions is None:
            return embedding
        moves = torch.cat([conditions.actions, conditions.actions.cumsum(1) / self.chunk], -1)
        told = self.action_mlp(moves) * _presence(conditions, moves)
        return embedding + F.pad(told, (0, 0, self.memory, 0))

    def _stack_inputs(self, noisy: Tensor, conditions: Conditions) -> Tensor:
        memory, rays = conditions.memory, conditions.rays
        frames = torch.cat([memory, noisy.to(memory.dtype)], 2)
        b, v, t, _, h, w = frames.shape
        last = memory[:, :, -1:].expand(-1, -1, t, -1, -1, -1)
        mask = frames.new_zeros(b, v, t, 1, h, w)
        mask[:, :, self.memory :] = 1
        path = frames.new_zeros(b, v, t, PATH_CHANNELS, h, w)
        if conditions.path is not None:
            path[:, :, self.memory :] = conditions.path * _presence(conditions, conditions.path)
        stacked = torch.cat([frames, last, mask, rays[:, :, None].expand(-1, -1, t, -1, -1, -1), path], 3)
        return stacked.permute(0, 1, 2, 4, 5, 3)


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs))


def _presence(conditions: Conditions, like: Tensor) -> Tensor:
    """1 where a sample was told its actions, 0 where they were dropped; shaped to multiply `like`."""
    if conditions.has_actions is None:
        return like.new_ones(())
    return conditions.has_actions.to(like).view(-1, *[1] * (like.ndim - 1))
