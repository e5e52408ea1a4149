"""A take: one true episode in memory, from a dataset or fresh from the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dataengine.episodes import Episode
from enerverse.data.actions import actions_ahead


@dataclass(frozen=True, kw_only=True)
class Take:
    """T frames of what really happened.

    pictures: uint8 [T, V, P, P, 3]; state: float32 [T, S]; action: float32 [T - 1, A], row t taken at frame t;
    intrinsics: [V, 3, 3] pixels; camera_to_world: [V, 4, 4] metres; task: the instruction; fps: frames per
    second; views: V names.
    """

    pictures: np.ndarray
    state: np.ndarray
    action: np.ndarray
    intrinsics: np.ndarray
    camera_to_world: np.ndarray
    task: str
    fps: float
    views: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pictures)

    def actions_after(self, seen: int, count: int) -> np.ndarray:
        """The actions [count, A] that lead to frames seen, seen + 1, ...; past the end the arm rests."""
        rows = torch.arange(seen - 1, seen - 1 + count)[None]
        return actions_ahead(torch.from_numpy(self.action), rows, torch.tensor([len(self)]))[0].numpy()


def from_episode(episode: Episode) -> Take:
    """The take of a dataset's episode. Raises ValueError where it was recorded without cameras."""
    if episode.cameras is None:
        raise ValueError(
            f"episode {episode.index}: expected camera poses, got none; record with `enerverse record`"
        )
    return Take(
        pictures=episode.stacked_images,
        state=episode.state,
        action=episode.action[:-1],
        intrinsics=_first(episode.cameras.intrinsics),
        camera_to_world=_first(episode.cameras.camera_to_world),
        task=episode.task,
        fps=episode.fps,
        views=episode.views,
    )


def from_rollout(
    observations: list[dict[str, Any]],
    infos: list[dict[str, Any]],
    actions: np.ndarray,
    views: tuple[str, ...],
    fps: float,
) -> Take:
    """The take of T observations and infos of an environment and the T - 1 actions between them."""
    cameras = [infos[0]["cameras"][view] for view in views]
    return Take(
        pictures=np.stack([np.stack([seen["images"][view] for view in views]) for seen in observations]),
        state=np.stack([seen["state"] for seen in observations]),
        action=np.asarray(actions, np.float32),
        intrinsics=np.stack([camera["intrinsics"] for camera in cameras]),
        camera_to_world=np.stack([camera["camera_to_world"] for camera in cameras]),
        task=str(infos[0]["task"]),
        fps=fps,
        views=views,
    )


def _first(cameras: np.ndarray) -> np.ndarray:
    """Cameras of the first frame: [T, V, ., .] or [V, ., .] -> [V, ., .]."""
    return cameras[0] if cameras.ndim == 4 else cameras
