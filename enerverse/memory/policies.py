"""Which past frames a world model sees: inference memory policies behind one small interface.

A policy answers two questions about frame times (integers, 0 = first frame of the episode): `select(times,
now)` names the K frames that form the context, oldest first, the last observed frame always last;
`retain(times, now)` names the frames that must be kept to answer later questions. A policy keeps a bounded number of
frames however long the rollout is. Source: EnerVerse (arXiv 2501.01895, section 3.1) for sparse memory and
the sliding window; EVAC's inference for the fractions 0, 1/3, 2/3, last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from enerverse.config import unknown


class MemoryPolicy(Protocol):
    """What a memory policy offers; see the module text."""

    slots: int

    def select(self, times: list[int], now: int) -> list[int]: ...

    def retain(self, times: list[int], now: int) -> list[int]: ...


def _nearest(times: list[int], target: float) -> int:
    return min(times, key=lambda time: (abs(time - target), time))


@dataclass(frozen=True, kw_only=True)
class NoMemory:
    """Only the last frame, repeated in every slot."""

    slots: int = 4

    def select(self, times: list[int], now: int) -> list[int]:
        return [now] * self.slots

    def retain(self, times: list[int], now: int) -> list[int]:
        return [now]


@dataclass(frozen=True, kw_only=True)
class DenseMemory:
    """The last K consecutive frames; early in an episode the first frame repeats."""

    slots: int = 4

    def select(self, times: list[int], now: int) -> list[int]:
        return [_nearest(times, max(0, now - lag)) for lag in reversed(range(self.slots))]

    def retain(self, times: list[int], now: int) -> list[int]:
        return [time for time in times if time > now - self.slots]


@dataclass(frozen=True, kw_only=True)
class SparseUniformMemory:
    """Evenly spread over the whole past, then the last `recent` frames (2 by default: velocity becomes
    visible).

    The past is kept as a grid of at most `capacity` frames whose stride doubles as the rollout grows, so the
    first frame is never lost and memory stays constant. `recent=1` is EVAC's rule: fractions 0, 1/3, 2/3,
    last.
    """

    slots: int = 4
    recent: int = 2
    capacity: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.recent <= self.slots:
            raise ValueError(
                f"recent: expected 1 to {self.slots} (the memory slots), got {self.recent}; choose fewer or add slots"
            )

    def select(self, times: list[int], now: int) -> list[int]:
        spread = self.slots - self.recent
        steps = spread if self.recent == 1 else max(1, spread)
        latest = max(0, now - self.recent + 1)
        past = [_nearest(times, min(latest, now * index / steps)) for index in range(spread)]
        return past + [_nearest(times, max(0, now - lag)) for lag in reversed(range(self.recent))]

    def retain(self, times: list[int], now: int) -> list[int]:
        stride = 1
        while now // stride >= self.capacity:
            stride *= 2
        return [time for time in times if time % stride == 0 or time > now - self.recent]


@dataclass(frozen=True, kw_only=True)
class FifoMemory:
    """One frame per chunk: drop the oldest, push the last frame of the newest chunk (EVAC's sparse DDIM
    loop)."""

    slots: int = 4
    chunk: int = 8

    def select(self, times: list[int], now: int) -> list[int]:
        return [_nearest(times, max(0, now - lag * self.chunk)) for lag in reversed(range(self.slots))]

    def retain(self, times: list[int], now: int) -> list[int]:
        return [time for time in times if now - time < self.slots * self.chunk]


POLICIES = {
    "none": NoMemory,
    "dense": DenseMemory,
    "sparse_uniform": SparseUniformMemory,
    "fifo": FifoMemory,
}


def make_memory(name: str, *, slots: int = 4, **options: int) -> MemoryPolicy:
    """The memory policy called `name`; ValueError names the closest policy when there is none."""
    if name not in POLICIES:
        raise unknown("memory policy", name, POLICIES)
    return POLICIES[name](slots=slots, **options)
