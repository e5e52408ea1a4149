"""Episodes as latents in memory: encoded once, cached beside the run, read by every training afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dataengine.episodes import Episode, EpisodeDataset
from enerverse.data.checks import check_episode
from enerverse.files import load_tensors, save_tensors
from enerverse.latents import Autoencoder


@dataclass(frozen=True, kw_only=True)
class LatentEpisodes:
    """All episodes of a dataset, frames in one row.

    latents [N, V, C, h, w] float16, standardised; starts [E + 1] first frame of each episode; state [N, S],
    action [N, A] executed, label [N, A] what a policy should learn (the clean action where recorded);
    privileged [N, S'] simulator state where recorded; intrinsics [E, V, 3, 3], camera_to_world [E, V, 4, 4]
    of the (static) cameras; success [E] bool; tasks: instruction per episode; views; image (H, W); fps.
    """

    latents: Tensor
    starts: Tensor
    state: Tensor
    action: Tensor
    label: Tensor
    privileged: Tensor
    intrinsics: Tensor
    camera_to_world: Tensor
    success: Tensor
    tasks: tuple[str, ...]
    views: tuple[str, ...]
    image: tuple[int, int]
    fps: float

    def __len__(self) -> int:
        return len(self.tasks)

    def span(self, episode: int) -> slice:
        """Rows of one episode."""
        return slice(int(self.starts[episode]), int(self.starts[episode + 1]))

    def length(self, episode: int) -> int:
        """Frames of one episode."""
        return int(self.starts[episode + 1] - self.starts[episode])

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        tensors = {
            f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        words = {"tasks": self.tasks, "views": self.views, "image": self.image, "fps": self.fps}
        save_tensors(path, tensors, {key: json.dumps(value) for key, value in words.items()})

    @classmethod
    def load(cls, path: str | Path) -> LatentEpisodes:
        """Read what `save` wrote."""
        tensors, words = load_tensors(path)
        plain = {key: json.loads(words[key]) for key in ("tasks", "views", "image", "fps")}
        plain |= {key: tuple(plain[key]) for key in ("tasks", "views", "image")}
        return cls(**tensors, **plain)


def group_views(episodes: LatentEpisodes, groups: Sequence[Sequence[tuple[str, ...]]]) -> LatentEpisodes:
    """Every episode once for each of its groups of views, as if those were all that stood there.

    A model of V views that shall work from anywhere is trained on groups of V out of many views: `groups[i]` lists those
    of episode i, each of V names in the order of the slots. The result's views are named by slot, `view_0` and so on.

    Raises:
        ValueError: groups of different sizes, or not one list for every episode; a view that is not there.
    """
    sizes = {len(group) for chosen in groups for group in chosen}
    if len(groups) != len(episodes) or len(sizes) != 1:
        raise ValueError(
            f"groups: expected a list for each of {len(episodes)} episodes, of groups of one size, got {len(groups)} "
            f"lists and the sizes {sorted(sizes)}"
        )
    absent = sorted({view for chosen in groups for group in chosen for view in group} - set(episodes.views))
    if absent:
        raise ValueError(f"groups: expected views out of {', '.join(episodes.views)}, got {absent[0]!r}")
    index = [
        (episode, [episodes.views.index(view) for view in group])
        for episode, chosen in enumerate(groups)
        for group in chosen
    ]
    spans = [episodes.span(episode) for episode, _ in index]
    by_frame = {
        name: torch.cat([getattr(episodes, name)[span] for span in spans])
        for name in ("state", "action", "label", "privileged")
    }
    by_episode = {
        name: torch.stack([getattr(episodes, name)[episode, views] for episode, views in index])
        for name in PER_EPISODE
    }
    return replace(
        episodes, **by_frame, **by_episode,
        latents=torch.cat([episodes.latents[span][:, views] for span, (_, views) in zip(spans, index, strict=True)]),
        starts=torch.tensor([0, *(span.stop - span.start for span in spans)]).cumsum(0),
        success=episodes.success[[episode for episode, _ in index]],
        tasks=tuple(episodes.tasks[episode] for episode, _ in index),
        views=tuple(f"view_{slot}" for slot in range(sizes.pop())),
    )  # fmt: skip


Datasets = EpisodeDataset | Sequence[EpisodeDataset]


def iterate_episodes(datasets: Datasets, views: tuple[str, ...], name: str) -> Iterator[Episode]:
    """Every episode of one or several datasets, with a progress bar on a terminal."""
    parts = [datasets] if isinstance(datasets, EpisodeDataset) else list(datasets)
    jobs = [(dataset, index) for dataset in parts for index in range(len(dataset))]
    for dataset, index in tqdm(jobs, desc=name, disable=None):
        yield dataset.episode(index, views=views)


def read_images(datasets: Datasets, views: tuple[str, ...], every: int = 1) -> Tensor:
    """Every `every`-th frame of every episode: uint8 [N, V, 3, H, W]."""
    parts = []
    for episode in iterate_episodes(datasets, views, "reading frames"):
        frames = np.ascontiguousarray(episode.stacked_images[::every])
        parts.append(torch.from_numpy(frames).permute(0, 1, 4, 2, 3))
    return torch.cat(parts)


@torch.no_grad()
def encode_images(autoencoder: Autoencoder, images: np.ndarray, batch: int = 64) -> Tensor:
    """Latents float16 [T, V, C, h, w] of uint8 pictures [T, V, H, W, 3]."""
    device = next(autoencoder.parameters()).device
    frames = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 1, 4, 2, 3)
    return torch.cat(
        [autoencoder.encode(part.to(device).float() / 255).half().cpu() for part in frames.split(batch)]
    )


def encode_dataset(datasets: Datasets, autoencoder: Autoencoder, views: tuple[str, ...]) -> LatentEpisodes:
    """Encode every frame of every episode with `autoencoder`; raises ValueError, naming the
    episode and the frame, for what no model can be trained on: see `check_episode`."""
    rows: dict[str, list[Tensor]] = {}
    tasks, success, starts, image, fps = [], [], [0], (0, 0), 0.0
    for episode in iterate_episodes(datasets, views, "encoding"):
        for key, value in _episode_rows(episode, autoencoder, views).items():
            rows.setdefault(key, []).append(value)
        tasks.append(episode.task)
        success.append(episode.success is not False)
        starts.append(starts[-1] + len(episode))
        image, fps = tuple(episode.stacked_images.shape[2:4]), episode.fps
    if not tasks:
        raise ValueError("dataset: expected at least one episode, got none; record some first")
    joined = {key: (torch.stack if key in PER_EPISODE else torch.cat)(value) for key, value in rows.items()}
    words = {"tasks": tuple(tasks), "views": views, "image": image, "fps": fps}
    return LatentEpisodes(starts=torch.tensor(starts), success=torch.tensor(success), **joined, **words)


PER_EPISODE = ("intrinsics", "camera_to_world")


def _episode_rows(episode: Episode, autoencoder: Autoencoder, views: tuple[str, ...]) -> dict[str, Tensor]:
    check_episode(episode, views)
    assert episode.cameras is not None
    cameras = episode.cameras.select(views)
    label = episode.extra.get("action.clean", episode.action)
    privileged = episode.extra.get("privileged", np.zeros((len(episode), 0)))
    return {
        "latents": encode_images(autoencoder, episode.stacked_images),
        "state": torch.from_numpy(np.array(episode.state)).float(),
        "action": torch.from_numpy(np.array(episode.action)).float(),
        "label": torch.from_numpy(np.array(label)).float(),
        "privileged": torch.from_numpy(np.array(privileged)).float(),
        "intrinsics": _first_frame(cameras.intrinsics, 4),
        "camera_to_world": _first_frame(cameras.camera_to_world, 4),
    }


def _first_frame(array: np.ndarray, per_frame_dims: int) -> Tensor:
    """Cameras come as [V, ..] or per frame as [T, V, ..]; they stand still, so the first frame is enough."""
    return torch.from_numpy(np.array(array[0] if array.ndim == per_frame_dims else array)).float()
