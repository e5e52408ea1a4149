"""What training asks of an episode beyond a readable file, each refusal naming the episode and the frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataengine.episodes import Episode

OUT_OF_RANGE = 1e-4  # rounding of an action that was clipped at 1
MOVED = 1e-5  # metres, or pixels of intrinsics: above float32 storage, below any motion


def check_episode(episode: Episode, views: Sequence[str]) -> None:
    """Raise ValueError for an episode that training would misread.

    Asked are two frames (a transition), actions and clean actions in [-1, 1], and poses of all `views` with every
    frame, of cameras that stand still.
    """
    name = f"episode {episode.index}"
    if len(episode) < 2:
        raise ValueError(
            f"dataset: expected at least 2 frames in every episode, got {len(episode)} in {name}; record the "
            "dataset again without it"
        )
    for column, values in (("action", episode.action), ("action.clean", episode.extra.get("action.clean"))):
        if values is not None:
            _check_range(values, column, name)
    if episode.cameras is None:
        raise ValueError(
            f"dataset: expected camera poses with every frame, got none in {name}; "
            "record with an environment whose info holds 'cameras'"
        )
    cameras = episode.cameras.select(views)
    for part, matrices in (("pose", cameras.camera_to_world), ("intrinsics", cameras.intrinsics)):
        if matrices.ndim == 4:
            _check_static(matrices, part, cameras.names, name)


def _check_range(values: np.ndarray, column: str, name: str) -> None:
    inside = (np.abs(values) <= 1 + OUT_OF_RANGE).all(1)  # False for NaN too
    if not inside.all():
        frame = int(np.argmin(inside))
        worst = values[frame][np.argmax(np.abs(values[frame]))]  # NaN counts as the largest
        raise ValueError(
            f"dataset: expected {column} in [-1, 1], got {worst:.4g} in {name}, frame {frame}; divide actions by "
            "their largest size before recording"
        )


def _check_static(matrices: np.ndarray, part: str, views: tuple[str, ...], name: str) -> None:
    moved = np.abs(matrices - matrices[0]).max((-1, -2)) > MOVED
    if moved.any():
        frame, view = np.argwhere(moved)[0]
        raise ValueError(
            f"dataset: expected cameras that stand still, got another {part} of {views[view]!r} in {name} from "
            f"frame {frame} on; train without that view"
        )
