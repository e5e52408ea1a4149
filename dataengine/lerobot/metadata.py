"""The metadata files: ``info.json``, ``tasks.parquet`` and one row per episode in ``meta/episodes``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine.errors import DatasetError
from dataengine.lerobot import layout
from dataengine.lerobot.layout import DatasetSpec


def new_info(spec: DatasetSpec, *, episodes: int, frames: int, tasks: int) -> dict[str, Any]:
    """``meta/info.json`` of a dataset with the given totals."""
    return {
        "codebase_version": layout.VERSION,
        "robot_type": spec.robot_type,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": layout.CHUNK_SIZE,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": spec.whole_fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": layout.DATA_PATH,
        "video_path": layout.VIDEO_PATH,
        "features": spec.features(),
        "provenance": {str(code): name for code, name in enumerate(layout.PROVENANCE_LEGEND)},
    }


def tasks_table(tasks: list[str]) -> pa.Table:
    """``tasks.parquet`` with the metadata that makes pandas (not needed here) read ``task`` as the index."""
    table = pa.table(
        {"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())}
    )
    column = {"metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [
            {
                "name": "task_index",
                "field_name": "task_index",
                "pandas_type": "int64",
                "numpy_type": "int64",
                **column,
            },
            {
                "name": "task",
                "field_name": "task",
                "pandas_type": "unicode",
                "numpy_type": "object",
                **column,
            },
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def read_tasks(root: Path) -> list[str]:
    """Instructions by task index; an absent file is an empty list, a damaged one a :class:`DatasetError`."""
    path = root / layout.TASKS_PATH
    if not path.exists():
        return []
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as cause:
        raise DatasetError(
            f"{path}: cannot be read ({cause}); restore this file from a copy", path=path
        ) from cause
    text = [n for n in table.column_names if pa.types.is_string(table.schema.field(n).type) or n == "task"]
    pairs = zip(table["task_index"].to_pylist(), table[text[0]].to_pylist(), strict=True)
    return [task for _, task in sorted(pairs)]


@dataclass(frozen=True)
class EpisodeMeta:
    """One row of ``meta/episodes``.

    Attributes:
        index, length: episode number and number of frames.
        tasks: instructions.
        chunk_index, file_index: its data file.
        from_index, to_index: global frame numbers, end exclusive.
        videos: video key -> (chunk index, file index, first second, last second).
        success, seed: None where not known.
        checksums: video key -> CRC-32 of its file; empty for datasets of other writers.
    """

    index: int
    length: int
    tasks: tuple[str, ...]
    chunk_index: int
    file_index: int
    from_index: int
    to_index: int
    videos: dict[str, tuple[int, int, float, float]]
    success: bool | None = None
    seed: int | None = None
    checksums: dict[str, int] = field(default_factory=dict)

    @property
    def file(self) -> dict[str, int]:
        """What path templates ask for, those of v3 (files) and v2 (one file per episode)."""
        return _places(self.chunk_index, self.file_index, self.index)

    def video_path(self, root: Path, key: str, template: str = layout.VIDEO_PATH) -> Path:
        """The video file that holds ``key`` of this episode."""
        chunk, file, _, _ = self.videos[key]
        return root / template.format(video_key=key, **_places(chunk, file, self.index))

    def to_row(self) -> dict[str, Any]:
        """LeRobot's columns."""
        row: dict[str, Any] = {
            "episode_index": self.index,
            "tasks": list(self.tasks),
            "length": self.length,
            "data/chunk_index": self.chunk_index,
            "data/file_index": self.file_index,
            "dataset_from_index": self.from_index,
            "dataset_to_index": self.to_index,
        }
        for key, values in self.videos.items():
            names = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
            row.update({f"videos/{key}/{n}": v for n, v in zip(names, values, strict=True)})
        row.update({f"videos/{key}/crc32": value for key, value in self.checksums.items()})
        row.update(
            {"meta/episodes/chunk_index": self.chunk_index, "meta/episodes/file_index": self.file_index}
        )
        return {**row, "success": self.success, "seed": self.seed}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> EpisodeMeta:
        """Inverse of :meth:`to_row`; columns of other writers are ignored."""
        keys = [
            n.removeprefix("videos/").removesuffix("/chunk_index")
            for n in row
            if n.startswith("videos/") and n.endswith("/chunk_index")
        ]
        videos = {
            k: tuple(
                row[f"videos/{k}/{n}"]
                for n in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
            )
            for k in keys
            if row[f"videos/{k}/chunk_index"] is not None
        }
        return cls(
            index=row["episode_index"],
            length=row["length"],
            tasks=tuple(row["tasks"]),
            chunk_index=row["data/chunk_index"],
            file_index=row["data/file_index"],
            from_index=row["dataset_from_index"],
            to_index=row["dataset_to_index"],
            videos=videos,
            success=row.get("success"),
            seed=row.get("seed"),
            checksums={
                k: row[f"videos/{k}/crc32"] for k in videos if row.get(f"videos/{k}/crc32") is not None
            },
        )


def row_table(row: dict[str, Any]) -> pa.Table:
    """One row of ``meta/episodes`` as a table."""
    return pa.table({name: pa.array([value], _meta_type(name, value)) for name, value in row.items()})


def _meta_type(name: str, value: Any) -> pa.DataType | None:
    """The type that Arrow would find itself, told because its search looks on disk for pandas again and again where
    that is not installed.
    """
    if value is None:  # a column must keep its type when the value is unknown
        return pa.bool_() if name == "success" else pa.int64()
    if isinstance(value, list):
        inner = _meta_type(name, value[0]) if value else None
        return None if inner is None else pa.list_(inner)
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}.get(type(value))


def _places(chunk: int, file: int, episode: int) -> dict[str, int]:
    return {"chunk_index": chunk, "file_index": file, "episode_chunk": chunk, "episode_index": episode}


def read_episode_table(root: Path, damaged: list[str] | None = None) -> dict[int, EpisodeMeta]:
    """Every episode of ``meta/episodes`` by index.

    Args:
        damaged: when given, a file that cannot be read adds a sentence here instead of raising
            :class:`DatasetError`.
    """
    episodes: dict[int, EpisodeMeta] = {}
    for path in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        try:
            with pq.ParquetFile(path) as file:
                names = [n for n in file.schema_arrow.names if not n.startswith("stats/")]
                table = file.read(columns=names, use_threads=False)
            rows = [EpisodeMeta.from_row(r) for r in table.to_pylist()]
        except (OSError, pa.ArrowException, KeyError) as cause:
            sentence = (
                f"{path}: cannot be read ({cause}); restore this file from a copy, the episodes of other "
                "files are readable"
            )
            if damaged is None:
                raise DatasetError(sentence, path=path) from cause
            damaged.append(sentence)
            continue
        episodes.update({e.index: e for e in rows})
    return episodes
