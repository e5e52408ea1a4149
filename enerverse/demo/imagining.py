"""Imagining takes, several at once, and comparing each frame with what really happened."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from enerverse.demo.takes import Take
from enerverse.evaluate.imagination import Told
from enerverse.pipelines import EnerVersePipeline


@dataclass(frozen=True, kw_only=True)
class Imagined:
    """frames: uint8 [B, T, V, P, P, 3]; ended: per take the imagined frame at which the task was seen to end,
    or -1; chunks and seconds: how many chunks the call made and how long they took together."""

    frames: np.ndarray
    ended: list[int]
    chunks: int
    seconds: float

    @property
    def chunk_ms(self) -> float:
        """Milliseconds per chunk of one take."""
        return 1000 * self.seconds / (self.chunks * len(self.frames))


def imagine(
    pipe: EnerVersePipeline,
    takes: Sequence[Take],
    seen: int,
    count: int,
    *,
    told: Told = "instruction",
    task: str | None = None,
    memory: str | None = None,
    steps: int = 5,
    guidance: float = 1.0,
    seed: int = 0,
    stop_at_end: bool = False,
) -> Imagined:
    """The `count` frames after the first `seen` ones of every take, all takes in one call.

    told: the instruction alone; the state too, so that the model plans its actions (`plan`); or the takes' own actions.
    task: another instruction than theirs. Raises ValueError in one sentence for whatever does not fit the model.
    """
    cameras = (
        np.stack([take.intrinsics for take in takes]),
        np.stack([take.camera_to_world for take in takes]),
    )
    began = time.perf_counter()
    result = pipe(
        np.stack([take.pictures[:seen] for take in takes]),
        [task or take.task for take in takes],
        cameras,
        num_frames=count,
        memory=memory,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        stop_at_end=stop_at_end,
        **_body(takes, seen, count, told),
    )
    chunk = pipe.unet.config.chunk
    return Imagined(
        frames=result.frames,
        ended=[int(value) for value in result.ended],
        chunks=math.ceil(result.frames.shape[1] / chunk),
        seconds=time.perf_counter() - began,
    )


def _body(takes: Sequence[Take], seen: int, count: int, told: Told) -> dict[str, Any]:
    """What the pipeline is told of the robot itself."""
    body = {}
    if told != "instruction":
        body["state"] = np.stack([take.state[seen - 1] for take in takes])
    if told == "actions":
        body["actions"] = np.stack([take.actions_after(seen, count) for take in takes])
    return body


def frame_psnr(frames: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> np.ndarray:
    """PSNR in dB per frame [T], over all pixels of all takes that still have a true frame; nan after the last.

    frames and truths: per take uint8 [T, V, P, P, 3], the truth possibly shorter.
    """
    length = len(frames[0])
    error, pixels = np.zeros(length), np.zeros(length)
    for imagined, truth in zip(frames, truths, strict=True):
        known = min(length, len(truth))
        difference = imagined[:known].astype(np.float64) - truth[:known]
        error[:known] += np.square(difference / 255).reshape(known, -1).sum(1)
        pixels[:known] += difference[0].size if known else 0
    with np.errstate(divide="ignore", invalid="ignore"):
        return -10 * np.log10(error / pixels)


def mean_psnr(values: np.ndarray) -> float:
    """One PSNR for several frames: that of their mean squared error; nan where no frame is known."""
    known = values[~np.isnan(values)]
    with np.errstate(divide="ignore"):
        return float(-10 * np.log10(np.mean(10 ** (-known / 10)))) if len(known) else math.nan
