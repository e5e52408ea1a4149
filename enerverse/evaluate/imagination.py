"""Scoring imagined frames against what really happened, beside copying the last frame and the autoencoder's
ceiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dataengine.episodes import Episode, EpisodeDataset
from enerverse.data import encode_images
from enerverse.metrics import Interval, mask_iou, moving_mask, ssim_map
from enerverse.pipelines import EnerVersePipeline

HORIZON = 16
Told = Literal["instruction", "plan", "actions"]
SPANS = {"1-8": slice(0, 8), "9-16": slice(8, 16)}


@dataclass(frozen=True, kw_only=True)
class Window:
    """A held-out window: pictures uint8 [T, V, P, P, 3] of which the first `seen` are observed, the latents
    [seen, V, C, h, w] of those, and the episode they come from."""

    pictures: np.ndarray
    seen: int
    episode: Episode
    latents: Tensor

    @property
    def truth(self) -> Tensor:
        """The frames to be imagined, [H, V, 3, P, P] in [0, 1]."""
        return _to_tensor(self.pictures[self.seen :])

    @property
    def last(self) -> Tensor:
        """The last observed frame [V, 3, P, P]."""
        return _to_tensor(self.pictures[self.seen - 1])


def held_out_windows(pipe: EnerVersePipeline, dataset: EpisodeDataset, per_episode: int = 3) -> list[Window]:
    """`per_episode` windows spread evenly over every episode that is long enough for 16 future frames."""
    windows = []
    for index in range(len(dataset)):
        episode = dataset.episode(index, views=tuple(pipe.config.views))
        latest = len(episode) - HORIZON
        if latest < 1:
            continue
        pictures = episode.stacked_images
        latents = encode_images(pipe.autoencoder, pictures[:latest]).float()
        places = 1 + (latest - 1) * (np.arange(per_episode) + 0.5) / per_episode
        for seen in sorted({round(place) for place in places}):
            window = Window(
                pictures=pictures[: seen + HORIZON], seen=seen, episode=episode, latents=latents[:seen]
            )
            windows.append(window)
    return windows


@torch.no_grad()
def imagine_window(
    pipe: EnerVersePipeline,
    window: Window,
    *,
    told: Told = "instruction",
    generator: torch.Generator,
    steps: int = 5,
    samples: int = 1,
) -> Tensor:
    """The 16 frames after a window's observed ones, `samples` times: [samples, H, V, 3, P, P].

    told: the instruction alone; the state too, so that the model plans its actions (`plan`); or the true actions.
    """
    episode, now = window.episode, window.seen - 1
    assert episode.cameras is not None
    cameras = episode.cameras.select(tuple(pipe.config.views)).at(0)
    body: dict[str, Any] = {}
    if told != "instruction":
        body["state"] = np.repeat(episode.state[None, now], samples, 0)
    if told == "actions":
        body["actions"] = np.repeat(episode.action[None, now : now + HORIZON], samples, 0)
    imagined = pipe(
        window.latents[None].expand(samples, -1, -1, -1, -1, -1),
        episode.task,
        cameras,
        num_frames=HORIZON,
        num_inference_steps=steps,
        generator=generator,
        stop_at_end=False,
        **body,
    )
    return imagined.frames


COLUMNS = (
    "error",
    "pixels",
    "moving_error",
    "moving",
    "ssim",
    "frames",
    "ssim_moving",
    "moving_frames",
    "overlap",
)


def measure(
    imagined: Tensor, window: Window, robot: Callable[[Tensor], Tensor] | None = None
) -> dict[str, np.ndarray]:
    """Sums (`COLUMNS`) per horizon span of imagined frames [H, V, 3, P, P]; rates are formed after pooling
    windows.

    Moving pixels differ from the last observed frame by more than 20/255. `robot` finds the robot's pixels.
    """
    truth = window.truth
    moved = moving_mask(truth, window.last)
    squares = (imagined.double() - truth.double()).square().mean(-3)
    similarity = ssim_map(imagined, truth)
    inside = moved[..., 5:-5, 5:-5]
    local = (similarity * inside).sum((-2, -1)) / inside.sum((-2, -1))
    mask = robot_mask(window)
    overlap = (
        mask_iou(robot(imagined), mask)
        if robot is not None and mask is not None
        else torch.zeros(truth.shape[:2])
    )
    parts = (
        squares, torch.ones_like(squares), squares * moved, moved, similarity.mean((-2, -1)),
        torch.ones(truth.shape[:2]),
        local.nan_to_num(0.0), torch.isfinite(local), overlap,
    )  # fmt: skip
    return {name: np.array([float(part[span].sum()) for part in parts]) for name, span in SPANS.items()}


def pool(sums: np.ndarray) -> dict[str, float]:
    """Figures of sums [windows, columns]: PSNR and SSIM on all and on moving pixels, overlap of the robot's
    mask."""
    total = dict(zip(COLUMNS, sums.sum(0), strict=True))
    return {
        "psnr": _decibel(total["error"], total["pixels"]),
        "psnr_moving": _decibel(total["moving_error"], total["moving"]),
        "ssim": total["ssim"] / total["frames"],
        "ssim_moving": total["ssim_moving"] / max(1.0, total["moving_frames"]),
        "robot_iou": total["overlap"] / total["frames"],
    }


def gain(
    sums: np.ndarray, baseline: np.ndarray, groups: np.ndarray, seed: int = 0, resamples: int = 1000
) -> Interval:
    """Gain in moving-pixel PSNR over `baseline` with a 95 % bootstrap interval over `groups` (episodes)."""
    names = np.unique(groups)
    rows = [np.flatnonzero(groups == name) for name in names]
    rng = np.random.default_rng(seed)

    def difference(chosen: np.ndarray) -> float:
        return pool(sums[chosen])["psnr_moving"] - pool(baseline[chosen])["psnr_moving"]

    draws = [
        difference(np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))]))
        for _ in range(resamples)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(difference(np.arange(len(sums))), float(low), float(high))


def _decibel(error: float, count: float) -> float:
    return -10 * float(np.log10(max(error, 1e-12) / max(count, 1.0)))


def robot_mask(window: Window) -> Tensor | None:
    """True robot pixels [H, V, P, P] of the frames to be imagined; None where the dataset has no
    segmentation."""
    segmentation = window.episode.segmentation
    if segmentation is None:
        return None
    stacked = np.stack([masks[window.seen : window.seen + HORIZON] for masks in segmentation.values()], 1)
    return torch.from_numpy(stacked == 1)


def copy_last(window: Window) -> Tensor:
    """The baseline: the last observed frame, repeated."""
    return window.last[None].expand(HORIZON, -1, -1, -1, -1)


@torch.no_grad()
def reconstruct(pipe: EnerVersePipeline, window: Window) -> Tensor:
    """The ceiling: the true frames through the autoencoder."""
    return pipe.autoencoder.decode(pipe.autoencoder.encode(window.truth.to(pipe.device))).cpu()


def best_of(
    pipe: EnerVersePipeline, window: Window, count: int, generator: torch.Generator, steps: int = 5
) -> Tensor:
    """Of `count` imaginations the one closest to the truth on moving pixels: what uncertainty about the
    future costs."""
    moved = moving_mask(window.truth, window.last)[:, :, None]
    samples = imagine_window(pipe, window, generator=generator, steps=steps, samples=count)
    return min(samples, key=lambda frames: float(((frames - window.truth).square() * moved).sum()))


def _to_tensor(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures)).movedim(-1, -3).float() / 255
