"""Settings of the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Condition = Literal["tokens", "mean"]


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What the action head sees and how big it is.

    world: read the world model's mid-block feature, as spatial `tokens`, pooled `mean` (the paper's), or
    None. latents: read the frozen latents of the last two frames; pixels: read the last two frames with a
    trained CNN; privileged: width of a simulator-state input (0 for none), for the policy that proves the
    harness. frames: which frames of the window give world tokens (memory frames first, then imagined ones).
    localize: weight of telling the simulator's facts in training, where the data hold them (see `Locator`).
    chunk: actions predicted; execute: actions carried out before looking again; steps: denoising steps.
    """

    world: Condition | None = "tokens"
    latents: bool = True
    pixels: bool = False
    privileged: int = 0
    frames: tuple[int, ...] = (3, 7, 11)
    width: int = 128
    layers: int = 3
    heads: int = 4
    keypoints: int = 48
    localize: float = 0.3
    chunk: int = 8
    execute: int = 4
    steps: int = 6
    action_dim: int = 7
    state_dim: int = 11
    noise_draws: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.execute <= self.chunk:
            raise ValueError(f"execute: expected 1 to {self.chunk} (the chunk), got {self.execute}")
        if self.world is None and not (self.latents or self.pixels or self.privileged):
            raise ValueError(
                "policy inputs: expected at least one of world, latents, pixels or privileged, got none"
            )
