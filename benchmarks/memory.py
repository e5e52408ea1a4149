"""Does the imagined arm remember? Cue recall on CueDelayReach for every memory policy, and the cost of a long rollout.

    python -m benchmarks.memory recall --run runs/tiny
    python -m benchmarks.memory cost --run runs/tiny

A cue is shown in frames 0-7 and hidden for 64 frames. At the go frame the model imagines one chunk; a small classifier,
trained on true pictures, says which of the three places the imagined arm went to. `history` gives true frames up to the
go frame, `planned` the state of the go frame as well, so that the model plans its actions, `rollout` only the first
twelve frames: everything after is imagined.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from benchmarks.results_io import write_result
from dataengine.episodes import Episode, EpisodeDataset
from enerverse.memory import POLICIES, MemoryPolicy, MemoryState, start_memory
from enerverse.metrics import wilson
from enerverse.pipelines import EnerVersePipeline

TASK = "CueDelayReach"
SLOT_Y = (0.10, 0.0, -0.10)
GO = 72
EARLY = 5
SITUATIONS = {  # frames seen, and whether the model plans
    "history": (GO + 1, False),
    "planned": (GO + 1, True),
    "rollout": (12, False),
}
HELD_OUT = ("test", "test_clean", "masks")


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Cue recall per memory policy, with true history and through an imagined rollout."""

    run: Path = Path("runs/tiny")
    world: Path | None = None
    steps: int = 5
    case: str = "memory_recall"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Milliseconds and resident bytes per chunk at chunk 5 and at chunk 100."""

    run: Path = Path("runs/tiny")
    world: Path | None = None
    chunks: int = 100
    repeats: int = 40
    steps: int = 5
    case: str = "memory_cost"


class PlaceClassifier(nn.Module):
    """Which of three places the arm is at, from all views [N, V, 3, P, P]."""

    def __init__(self, views: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3 * views, 24, 5, 2, 2), nn.ReLU(), nn.Conv2d(24, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3),
        )  # fmt: skip

    def forward(self, frames: Tensor) -> Tensor:
        return self.net(frames.flatten(1, 2))


def slot_of(episode: Episode) -> int:
    """Index of the place that the cued cube stands at."""
    return int(np.abs(np.array(SLOT_Y) - episode.extra["privileged"][0, 1]).argmin())


def pictures(episode: Episode, views: tuple[str, ...], frames: slice) -> Tensor:
    """Frames [T, V, 3, P, P] in [0, 1]."""
    stacked = np.stack([episode.images[view][frames] for view in views], 1)
    return torch.from_numpy(stacked).movedim(-1, -3).float() / 255


def fit_classifier(run: Path, views: tuple[str, ...], seed: int = 0) -> PlaceClassifier:
    """Train on the true pictures of the last frames of the training episodes."""
    dataset = EpisodeDataset(run / "data" / "train" / TASK)
    images, labels = [], []
    for index in range(len(dataset)):
        episode = dataset.episode(index, views=views)
        frames = pictures(episode, views, slice(GO + 7, None))
        images.append(frames)
        labels.append(torch.full((len(frames),), slot_of(episode)))
    torch.manual_seed(seed)
    data, target, model = torch.cat(images), torch.cat(labels), PlaceClassifier(len(views))
    model(data[:1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(400):
        rows = torch.randint(len(data), (32,), generator=torch.Generator().manual_seed(seed * 10_007 + step))
        batch = data[rows]
        if step % 2:  # imagined pictures are softer than rendered ones
            batch = F.avg_pool2d(batch.flatten(0, 1), 3, 1, 1).view_as(batch)
        loss = F.cross_entropy(model(batch), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def imagined_place(
    pipe: EnerVersePipeline,
    model: PlaceClassifier,
    episode: Episode,
    memory: str,
    seen: int,
    seed: int,
    steps: int,
    planned: bool = False,
) -> int:
    """The place that the imagined arm is at 8 frames after the go frame."""
    views = tuple(pipe.config.views)
    assert episode.cameras is not None
    cameras = episode.cameras.select(views)
    pair = tuple(
        part[0] if part.ndim == 4 else part for part in (cameras.intrinsics, cameras.camera_to_world)
    )
    observed = pictures(episode, views, slice(0, seen))[None]
    imagined = pipe(
        observed, episode.task, pair, num_frames=GO + 9 - seen, memory=memory, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed), stop_at_end=False,
        state=episode.state[None, seen - 1] if planned else None,
    )  # fmt: skip
    return int(model(imagined.frames[:, -1].clamp(0, 1)).argmax())


def measure_recall(settings: Recall) -> dict[str, object]:
    """Recall of every memory policy with intervals."""
    pipe = EnerVersePipeline.from_pretrained(settings.world or settings.run / "world" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    views = tuple(pipe.config.views)
    model = fit_classifier(settings.run, views)
    episodes = []
    for split in HELD_OUT:
        dataset = EpisodeDataset(settings.run / "data" / split / TASK)
        episodes += [dataset.episode(index, views=views) for index in range(len(dataset))]
    long_enough = [episode for episode in episodes if len(episode) > GO + 8]
    correct = [
        int(model(pictures(e, views, slice(GO + 8, GO + 9))).argmax()) == slot_of(e) for e in long_enough
    ]
    values: dict[str, object] = {"classifier_on_truth": _rate(correct), "chance": 1 / 3}
    for name, (seen, planned) in SITUATIONS.items():
        if planned and pipe.unet.plan is None:
            continue
        row = {}
        for memory in POLICIES:
            hits = [
                imagined_place(pipe, model, episode, memory, seen, index, settings.steps, planned)
                == slot_of(episode)
                for index, episode in enumerate(tqdm(episodes, desc=f"{name} {memory}", disable=None))
            ]
            row[memory] = _rate(hits)
            print(name, memory, row[memory], flush=True)
        values[name] = row
    return values


def _rate(hits: list[bool]) -> dict[str, object]:
    found = wilson(sum(hits), len(hits))
    return {
        "rate": round(found.estimate, 3),
        "interval": [round(found.low, 3), round(found.high, 3)],
        "n": len(hits),
    }


@torch.no_grad()
def measure_cost(settings: Cost) -> dict[str, object]:
    """Milliseconds per chunk from the states after 5 and after 100 chunks, and resident memory at both."""
    pipe = EnerVersePipeline.from_pretrained(settings.world or settings.run / "world" / "pipeline")
    views = tuple(pipe.config.views)
    episode = EpisodeDataset(settings.run / "data" / "test" / "Lift").episode(0, views=views)
    assert episode.cameras is not None
    cameras = episode.cameras.select(views).at(0)
    poses = [
        torch.from_numpy(np.array(part)).float()[None]
        for part in (cameras.intrinsics, cameras.camera_to_world)
    ]
    latents = pipe.autoencoder.encode(pictures(episode, views, slice(0, 8))[None]).transpose(1, 2)
    rays = pipe.draw_rays(poses[0], poses[1], (latents.shape[-2], latents.shape[-1]))
    text = pipe.text_encoder([episode.task])
    values: dict[str, object] = {}
    for name in POLICIES:
        policy = pipe.make_memory(name)

        def go_on(state: MemoryState, policy: MemoryPolicy = policy) -> MemoryState:
            chunk, state = pipe.imagine_chunk(state, policy, rays, text, steps=settings.steps)
            pipe.read_out(chunk)
            return state

        state, kept, resident = start_memory(policy, latents), {}, {}
        for chunk in tqdm(range(1, settings.chunks + 1), desc=name):
            state = go_on(state)
            if chunk in (EARLY, settings.chunks):
                kept[chunk], resident[chunk] = state, _resident()
        early, late = kept[EARLY], kept[settings.chunks]
        ms = alternate(go_on, (early, late), settings.repeats)
        values[name] = {
            "ms_chunk_5": ms[0],
            "ms_chunk_100": ms[1],
            "resident_mb_chunk_5": resident[EARLY],
            "resident_mb_chunk_100": resident[settings.chunks],
            "memory_bytes_chunk_5": early.bytes,
            "memory_bytes_chunk_100": late.bytes,
        }
        print(name, values[name], flush=True)
    return values


def alternate(call: Callable[[Any], object], arguments: tuple[Any, ...], repeats: int) -> list[float]:
    """Median milliseconds of `call` for each argument, made in turn, so that whatever else the machine does falls on
    all alike."""
    seconds: list[list[float]] = [[] for _ in arguments]
    for _ in range(repeats):
        for argument, row in zip(arguments, seconds, strict=True):
            began = time.perf_counter()
            call(argument)
            row.append(time.perf_counter() - began)
    return [1000 * float(np.median(row)) for row in seconds]


def _resident() -> float:
    """Resident megabytes now (peak where the system does not tell the current figure)."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(settings: Recall | Cost) -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    values = measure_recall(settings) if isinstance(settings, Recall) else measure_cost(settings)
    print(write_result(settings.case, values, seconds=time.perf_counter() - began))


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"recall": Recall, "cost": Cost}))
