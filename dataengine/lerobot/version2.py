"""The metadata of LeRobot v2.0 and v2.1 datasets: lines of JSON instead of parquet, one data and video file per episode.

Source: the published layout of LeRobot datasets, codebase versions v2.0 and v2.1 (``info.json``, ``tasks.jsonl``,
``episodes.jsonl``). Statistics (``stats.json``, ``episodes_stats.jsonl``) are not needed to read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataengine.errors import DatasetError
from dataengine.lerobot.layout import CHUNK_SIZE
from dataengine.lerobot.metadata import EpisodeMeta

DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
TASKS_PATH, EPISODES_PATH = "meta/tasks.jsonl", "meta/episodes.jsonl"


def is_version2(info: Mapping[str, Any]) -> bool:
    """Whether an ``info.json`` is of codebase version v2.0 or v2.1."""
    return str(info["codebase_version"]).startswith("v2.")


def read_tasks(root: Path) -> list[str]:
    """Instructions by task index; an absent file is an empty list, a damaged one a :class:`DatasetError`."""
    path = root / TASKS_PATH
    if not path.exists():
        return []
    try:
        rows = sorted((row["task_index"], row["task"]) for row in _rows(path))
    except (KeyError, TypeError) as cause:
        raise _unreadable(path, cause) from cause
    tasks = [""] * (rows[-1][0] + 1 if rows else 0)
    for index, task in rows:
        tasks[index] = task
    return tasks


def read_episodes(root: Path, info: Mapping[str, Any]) -> dict[int, EpisodeMeta]:
    """Every episode of ``episodes.jsonl`` by index; a damaged file is a :class:`DatasetError`."""
    path = root / EPISODES_PATH
    if not path.exists():
        raise DatasetError(
            f"{path}: expected this file in a LeRobot v2 dataset, found none; restore it from a copy",
            path=path,
        )
    keys = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    size = int(info.get("chunks_size") or CHUNK_SIZE)
    episodes, start = {}, 0
    try:
        for row in sorted(_rows(path), key=lambda row: row["episode_index"]):
            index, length = int(row["episode_index"]), int(row["length"])
            episodes[index] = EpisodeMeta(
                index=index,
                length=length,
                tasks=tuple(row.get("tasks") or ("",)),
                chunk_index=index // size,
                file_index=index,
                from_index=start,
                to_index=start + length,
                videos={key: (index // size, index, 0.0, length / float(info["fps"])) for key in keys},
                success=row.get("success"),
                seed=row.get("seed"),
            )
            start += length
    except (KeyError, TypeError, ValueError) as cause:
        raise _unreadable(path, cause) from cause
    return episodes


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as cause:
        raise _unreadable(path, cause) from cause


def _unreadable(path: Path, cause: object) -> DatasetError:
    return DatasetError(f"{path}: cannot be read ({cause}); restore this file from a copy", path=path)
