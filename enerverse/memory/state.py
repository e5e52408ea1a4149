"""The frames a rollout remembers: state goes in, state comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from enerverse.memory.policies import MemoryPolicy


@dataclass(frozen=True)
class MemoryState:
    """Frames kept so far. frames [B, V, n, C, h, w] at integer `times` (ascending); `now` is the newest
    time."""

    frames: Tensor
    times: tuple[int, ...]
    now: int

    @property
    def bytes(self) -> int:
        """Bytes held by the remembered frames."""
        return self.frames.element_size() * self.frames.numel()


def start_memory(policy: MemoryPolicy, frames: Tensor) -> MemoryState:
    """Memory of the observed latents `frames` [B, V, n, C, h, w], oldest first."""
    return _prune(policy, MemoryState(frames, tuple(range(frames.shape[2])), frames.shape[2] - 1))


def push_chunk(policy: MemoryPolicy, state: MemoryState, chunk: Tensor) -> MemoryState:
    """The state after `chunk` [B, V, M, C, h, w] has followed it; size stays bounded."""
    count = chunk.shape[2]
    times = state.times + tuple(range(state.now + 1, state.now + 1 + count))
    return _prune(policy, MemoryState(torch.cat([state.frames, chunk], 2), times, state.now + count))


def read_context(policy: MemoryPolicy, state: MemoryState) -> tuple[Tensor, Tensor]:
    """Context frames [B, V, K, C, h, w], oldest first, and their offsets to now [K] (<= 0, in frames)."""
    chosen = policy.select(list(state.times), state.now)
    index = torch.tensor([state.times.index(time) for time in chosen], device=state.frames.device)
    offsets = torch.tensor([time - state.now for time in chosen], device=state.frames.device)
    return state.frames.index_select(2, index), offsets


def _prune(policy: MemoryPolicy, state: MemoryState) -> MemoryState:
    kept = policy.retain(list(state.times), state.now)
    if len(kept) == len(state.times):
        return state
    index = torch.tensor([state.times.index(time) for time in kept], device=state.frames.device)
    return MemoryState(state.frames.index_select(2, index), tuple(kept), state.now)
