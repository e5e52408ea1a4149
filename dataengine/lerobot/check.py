"""Read a whole dataset and say in sentences what is wrong with it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from dataengine.errors import DatasetError
from dataengine.lerobot import files
from dataengine.lerobot.metadata import EpisodeMeta
from dataengine.lerobot.video import count_frames

if TYPE_CHECKING:
    from dataengine.lerobot.reader import EpisodeDataset


def find_problems(dataset: EpisodeDataset) -> list[str]:
    """One sentence per problem: rows, indices, times, every picture, every camera."""
    owners = Counter((key, *video[:2]) for meta in dataset.readable for key, video in meta.videos.items())
    found: list[str] = []
    for index in range(len(dataset)):
        try:
            meta = dataset.meta(index)
            dataset.episode(index)  # decodes every picture and checks every camera
            found += _row_problems(dataset, meta) + _video_problems(dataset, meta, owners)
        except (DatasetError, ValueError) as error:
            found.append(str(error))
    return found


def _row_problems(dataset: EpisodeDataset, meta: EpisodeMeta) -> list[str]:
    table = dataset.rows(meta)
    name = f"{dataset.root}: episode {meta.index}"
    found = []
    wrong = np.flatnonzero(table["frame_index"].to_numpy() != np.arange(meta.length))
    if wrong.size:
        got = table["frame_index"][int(wrong[0])].as_py()
        found.append(f"{name}, frame {wrong[0]}: expected frame_index {wrong[0]}, got {got}; record it again")
    if meta.to_index - meta.from_index != meta.length:
        found.append(
            f"{name}: expected {meta.length} frames between its indices, got {meta.from_index} to "
            f"{meta.to_index}; record it again"
        )
    if (np.diff(table["timestamp"].to_numpy()) <= 0).any():
        found.append(
            f"{name}: expected rising timestamps, got times that stand still or go back; record it again"
        )
    return found


def _video_problems(dataset: EpisodeDataset, meta: EpisodeMeta, owners: Counter) -> list[str]:
    """Video files that belong to this episode alone must hold exactly its frames, byte for byte."""
    found = []
    for key, video in meta.videos.items():
        if owners[(key, *video[:2])] > 1:
            continue
        path = dataset.video_path(meta, key)
        if key in meta.checksums and files.checksum(path) != meta.checksums[key]:
            found.append(
                f"{path}: expected the bytes that were written for episode {meta.index}, got others (CRC-32 "
                "differs); restore this file from a copy"
            )
        count = count_frames(path)
        if count != meta.length:
            found.append(
                f"{path}: expected {meta.length} frames of episode {meta.index}, got {count}; restore this "
                "file from a copy"
            )
    return found
