"""An episode as it lies in a dataset, to be put into another without coding its pictures again."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine.errors import DatasetError
from dataengine.lerobot import files, layout, metadata
from dataengine.lerobot.layout import DatasetSpec
from dataengine.lerobot.metadata import EpisodeMeta
from dataengine.lerobot.stats import vector_stats

PLACES = (
    "episode_index",
    "index",
    "task_index",
)  # columns that depend on where in which dataset an episode lies


@dataclass(frozen=True)
class StoredEpisode:
    """An episode of a dataset that keeps one file per episode, as ours do.

    Attributes:
        root: folder of the dataset.
        meta: where in it the episode lies.
    """

    root: Path
    meta: EpisodeMeta

    @cached_property
    def info(self) -> dict[str, Any]:
        """``info.json`` of the dataset; raises ``DatasetError`` where it cannot be read."""
        return files.read_json(self.root / layout.INFO_PATH)

    @property
    def paths(self) -> list[Path]:
        """All files that are the episode's own, that which makes it visible first."""
        templates = (layout.EPISODES_PATH, layout.DATA_PATH)
        videos = [self.meta.video_path(self.root, key) for key in self.meta.videos]
        return [*(self.root / template.format(**self.meta.file) for template in templates), *videos]

    def link_videos(self, folder: Path) -> dict[str, Path]:
        """Its video files under second names in `folder`, or copies where the file system has no links; by key."""
        folder.mkdir(parents=True, exist_ok=True)
        found = {key: folder / f"{key}.mp4" for key in self.meta.videos}
        for key, target in found.items():
            source = self.meta.video_path(self.root, key)
            if not source.exists():
                raise DatasetError(f"{source}: expected a video, found none; record it again", path=source)
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
        return found

    def check(self, checksums: dict[str, int]) -> None:
        """Raise ``DatasetError`` unless the videos are what was written."""
        for key, value in self.meta.checksums.items():
            if checksums.get(key) != value:
                path = self.meta.video_path(self.root, key)
                raise DatasetError(f"{path}: is damaged; remove {self.root} and record again", path=path)

    def data_table(self, meta: EpisodeMeta, tasks: list[str], spec: DatasetSpec) -> pa.Table:
        """Its rows as those of the episode `meta` of a dataset with the features `spec` and the instructions `tasks`."""
        table = self._read(self.root / layout.DATA_PATH.format(**self.meta.file))
        here = metadata.read_tasks(self.root)
        own = table["task_index"].to_pylist()
        index = {
            "episode_index": [meta.index] * meta.length,
            "index": range(meta.from_index, meta.to_index),
            "task_index": [tasks.index(here[number]) for number in own],
        }
        schema = layout.arrow_schema(spec.features())
        columns = [
            pa.array(index[field.name], field.type)
            if field.name in index
            else table[field.name].combine_chunks().cast(field.type)
            for field in schema
        ]
        return pa.table(columns, schema=schema)

    def meta_table(self, meta: EpisodeMeta, data: pa.Table) -> pa.Table:
        """Its row in ``meta/episodes``, moved to the place of `meta`; `data`: its rows there."""
        table = self._read(self.root / layout.EPISODES_PATH.format(**self.meta.file))
        stats = {k: v for k, v in table.to_pylist()[0].items() if k.startswith("stats/")}
        for key in PLACES:
            stats |= {f"stats/{key}/{name}": value for name, value in vector_stats(data[key]).items()}
        return metadata.row_table(meta.to_row() | stats)

    def _read(self, path: Path) -> pa.Table:
        try:
            return pq.read_table(path, use_threads=False, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as cause:
            raise DatasetError(f"{path}: cannot be read ({cause}); record it again", path=path) from cause

    def remove(self) -> None:
        """Take its files away; from the first on it is no longer part of its dataset."""
        for path in self.paths:
            path.unlink(missing_ok=True)
