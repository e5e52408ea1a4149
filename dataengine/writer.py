"""Write episodes to disk as they happen, in the LeRobot v3.0 layout, so that a crash costs at most the unfinished one.

Every finished episode owns its parquet, video and meta files (v3 allows any split). Files are written under temporary names
and renamed into place; the meta file comes last, so an episode is there entirely or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataengine import lerobot as layout
from dataengine.cameras import Cameras
from dataengine.errors import DatasetError, DatasetWriteError
from dataengine.frames import EpisodeRows, check_frame
from dataengine.lerobot import DatasetSpec
from dataengine.reader import EpisodeMeta, read_episode_table
from dataengine.stats import aggregate, read_stored_stats
from dataengine.video import DepthCodec, VideoCodec, VideoEncoder

try:
    import fcntl
except ImportError:  # Windows has no advisory locks on folders; there the user must not start two writers
    fcntl = None


class EpisodeWriter:
    """Append episodes to a dataset folder; a context manager that finalises on exit.

    Args:
        root: dataset folder; created, or appended to when it holds a dataset with the same features.
        fps: frames per second.
        views: camera names.
        image_size: (height, width) of every image in pixels.
        state_dim, action_dim: vector lengths.
        depth, segmentation: whether frames carry depth (metres) and segmentation (ids) for every view.
        cameras: whether frames carry camera poses; None decides by the first frame.
        extra: further float32 vectors, name -> length.
        robot_type: free text kept in ``info.json``.
        video: compression of the colour images; see :class:`VideoCodec`.
        depth_range: (near, far) in metres for the depth codes.

    Raises:
        ValueError: bad sizes or names; features that differ from the dataset in ``root`` (the feature is named).
        DatasetError: ``root`` holds something damaged, or another writer has it open.
        DatasetWriteError: the file system refuses a write; finished episodes are kept.

    Crash safety holds for a killed process and, because files are synced before they are renamed, for a lost machine on file
    systems that order renames. A frame costs one encoder step and one row in memory, whatever the episode's length.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float,
        views: Sequence[str],
        image_size: tuple[int, int],
        state_dim: int,
        action_dim: int,
        depth: bool = False,
        segmentation: bool = False,
        cameras: bool | None = None,
        extra: Mapping[str, int] | None = None,
        robot_type: str = "unknown",
        video: VideoCodec | None = None,
        depth_range: tuple[float, float] = (0.05, 10.0),
    ):
        self.root = Path(root)
        self.spec = DatasetSpec(
            fps=fps, views=tuple(views), image_size=(int(image_size[0]), int(image_size[1])), state_dim=state_dim,
            action_dim=action_dim, depth=depth, segmentation=segmentation, cameras=bool(cameras), extra=dict(extra or {}),
            robot_type=robot_type, video=video or VideoCodec(),
            depth_codec=DepthCodec(near=depth_range[0], far=depth_range[1]),
        )  # fmt: skip
        self._cameras_decided = cameras is not None
        self._episodes: list[EpisodeMeta] = []
        self._tasks: list[str] = []
        self._rows: EpisodeRows | None = None
        self._encoders: dict[str, VideoEncoder] = {}
        self._lock: int | None = None
        self._open_root()

    # ---- opening -------------------------------------------------------------------------------------------------

    def _open_root(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._load_root()
        except OSError as cause:
            self._release_lock()
            raise self._refused(cause, self.root) from cause
        except BaseException:
            self._release_lock()
            raise

    def _load_root(self) -> None:
        shutil.rmtree(self._workspace, ignore_errors=True)  # the lock says that no living writer owns it
        if (self.root / layout.INFO_PATH).exists():
            self._continue_dataset()
        elif {p.name for p in self.root.iterdir()} - {"data", "videos", "meta"}:
            raise DatasetError(
                f"{self.root}: expected an empty folder or a LeRobot v3 dataset, got other files; choose another root",
                path=self.root,
            )

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        self._lock = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release_lock()
            raise DatasetError(
                f"{self.root}: expected one writer at a time, but another one has this dataset open; wait or use another root",
                path=self.root,
            ) from None

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _workspace(self) -> Path:
        return self.root / ".unfinished"

    def _continue_dataset(self) -> None:
        info = layout.read_json(self.root / layout.INFO_PATH)
        stored = info["features"]
        if not self._cameras_decided:
            self._decide_cameras(any(k.startswith(layout.CAMERA) for k in stored))
        layout.check_same_features(stored, self.spec.features(), self.root)
        if float(info["fps"]) != float(self.spec.fps):
            raise ValueError(f"fps: expected {info['fps']} as in the dataset in {self.root}, got {self.spec.fps}; use a new root")
        self._tasks = layout.read_tasks(self.root)
        self._episodes = sorted(read_episode_table(self.root).values(), key=lambda e: e.index)

    def _decide_cameras(self, present: bool) -> None:
        self.spec = replace(self.spec, cameras=present)
        self._cameras_decided = True

    # ---- what is there -------------------------------------------------------------------------------------------

    @property
    def finished(self) -> int:
        """Number of finished episodes in the dataset, including those of earlier writers."""
        return len(self._episodes)

    @property
    def frames(self) -> int:
        """Frames of the unfinished episode."""
        return len(self._rows) if self._rows else 0

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the finished episodes that have one."""
        return tuple(e.seed for e in self._episodes if e.seed is not None)

    # ---- one frame -----------------------------------------------------------------------------------------------

    def add_frame(
        self,
        *,
        images: Mapping[str, NDArray[np.uint8]],
        state: Any,
        action: Any,
        task: str,
        cameras: Mapping[str, Mapping[str, Any]] | Cameras | None = None,
        depth: Mapping[str, Any] | None = None,
        segmentation: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        provenance: str | Mapping[str, str] = "observed",
        timestamp: float | None = None,
    ) -> None:
        """Append one frame to the unfinished episode; constant cost.

        Args:
            images: view -> uint8 ``[height, width, 3]``.
            state, action: vectors, finite.
            task: the instruction in words.
            cameras: view -> ``{"intrinsics" [3, 3], "camera_to_world" [4, 4]}``, or one :class:`Cameras`.
            depth: view -> metres ``[height, width]``; beyond the far end of ``depth_range`` counts as the far end.
            segmentation: view -> integer ids ``[height, width]`` from -1 to 65534; stored exactly.
            extra: every vector named in the writer's ``extra``.
            provenance: ``observed``, ``rendered`` or ``generated``; one for all views or view -> word.
            timestamp: seconds since the first frame; None means ``frame / fps``. LeRobot's own loader wants times within
                1e-4 s of that grid.

        Raises:
            ValueError: one sentence about the argument at fault; nothing is written then.
            DatasetWriteError: the file system refuses; the unfinished episode is dropped, finished ones are kept.
        """
        self._check_open()
        if not self._cameras_decided:
            self._decide_cameras(cameras is not None)
        frame = check_frame(
            self.spec, index=self.frames, images=images, state=state, action=action, task=task, cameras=cameras, depth=depth,
            segmentation=segmentation, extra=extra or {}, provenance=provenance, timestamp=timestamp,
            last_timestamp=self._rows.last_timestamp if self._rows else None,
        )  # fmt: skip
        if self._rows is None:
            self._start_episode()
        assert self._rows is not None
        for key, image in frame.pictures.items():
            self._guarded(self._encoders[key].path, lambda k=key, i=image: self._encoders[k].add(i))
        self._rows.append(frame)

    def _start_episode(self) -> None:
        self._guarded(self._workspace, lambda: self._workspace.mkdir(parents=True, exist_ok=True))
        height, width = self.spec.image_size
        for key in self.spec.video_keys:
            codec = self.spec.depth_codec if key.startswith(layout.DEPTH) else self.spec.video
            path = self._workspace / f"{key}.mp4"
            self._encoders[key] = self._guarded(
                path, lambda p=path, c=codec: VideoEncoder(p, fps=self.spec.fps, height=height, width=width, codec=c)
            )
        self._rows = EpisodeRows(self.spec)

    def _check_open(self) -> None:
        if self._lock is None and fcntl is not None:
            raise ValueError(f"EpisodeWriter: {self.root} was finalised; open a new EpisodeWriter on it to append")

    def _guarded(self, path: Path, write: Any) -> Any:
        """Run a write; when the disk refuses, drop the unfinished episode and say what is kept."""
        try:
            return write()
        except OSError as cause:
            self.discard_episode()
            raise self._refused(cause, path) from cause

    def _refused(self, cause: OSError, path: Path) -> DatasetWriteError:
        reason = os.strerror(cause.errno) if cause.errno else str(cause)
        return DatasetWriteError(
            f"{path}: cannot write ({reason}); the {self.finished} finished episodes in {self.root} are kept and readable, "
            "the unfinished one was dropped; free space and continue with a new EpisodeWriter on the same root",
            errno=cause.errno,
        )

    # ---- ending an episode ---------------------------------------------------------------------------------------

    def save_episode(self, *, success: bool | None = None, seed: int | None = None) -> int:
        """Publish the unfinished episode and return its index.

        Args:
            success: whether the task was solved; also sets ``next.success`` of the last frame. None: not known.
            seed: the environment's seed, kept so that a recording can be resumed. None: not known.

        Raises:
            ValueError: no frame was added.
            DatasetWriteError: the file system refuses; the episode is dropped, finished ones are kept.
        """
        self._check_open()
        if self._rows is None:
            raise ValueError("save_episode: expected at least one add_frame before it, got none; add frames first")
        rows = self._rows
        return self._guarded(self._workspace, lambda: self._publish(rows, success, seed))

    def _publish(self, rows: EpisodeRows, success: bool | None, seed: int | None) -> int:
        for encoder in self._encoders.values():
            encoder.close()
        tasks = self._tasks + [t for t in rows.tasks if t not in self._tasks]
        meta = self._next_meta(rows, success, seed)
        table = rows.data_table(meta, tasks)
        meta_table = rows.meta_table(meta, table)
        moves = [(e.path, meta.video_path(self.root, key)) for key, e in self._encoders.items()]
        moves.append((self._temporary("data.parquet", table), self.root / layout.DATA_PATH.format(**meta.file)))
        moves.append((self._temporary("episode.parquet", meta_table), self.root / layout.EPISODES_PATH.format(**meta.file)))
        if tasks != self._tasks:
            layout.write_atomically(self.root / layout.TASKS_PATH, layout.parquet_bytes(layout.tasks_table(tasks)))
        if not (self.root / layout.INFO_PATH).exists():
            self._write_info()
        _move_all(moves)
        self._episodes.append(meta)
        self._tasks = tasks
        self._forget_episode()
        self._write_info()
        return meta.index

    def _next_meta(self, rows: EpisodeRows, success: bool | None, seed: int | None) -> EpisodeMeta:
        last = self._episodes[-1] if self._episodes else None
        start = last.to_index if last else 0
        chunk, file = self._next_file()
        files = {key: (chunk, file, 0.0, len(rows) / self.spec.fps) for key in self.spec.video_keys}
        return EpisodeMeta(
            index=last.index + 1 if last else 0, length=len(rows), tasks=rows.tasks, chunk_index=chunk, file_index=file,
            from_index=start, to_index=start + len(rows), videos=files,
            success=None if success is None else bool(success), seed=None if seed is None else int(seed),
        )  # fmt: skip

    def _next_file(self) -> tuple[int, int]:
        used = [(e.chunk_index, e.file_index) for e in self._episodes]
        used += [v[:2] for e in self._episodes for v in e.videos.values()]
        if not used:
            return 0, 0
        chunk, file = max(used)
        return (chunk, file + 1) if file + 1 < layout.CHUNK_SIZE else (chunk + 1, 0)

    def _temporary(self, name: str, table: pa.Table) -> Path:
        path = self._workspace / name
        layout.write_atomically(path, layout.parquet_bytes(table))
        return path

    def _write_info(self) -> None:
        frames = sum(e.length for e in self._episodes)
        info = layout.new_info(self.spec, episodes=self.finished, frames=frames, tasks=len(self._tasks))
        stored = self.root / layout.INFO_PATH
        if stored.exists():  # keep what others wrote beside our keys
            info = {**layout.read_json(stored), **{k: v for k, v in info.items() if k.startswith("total") or k == "splits"}}
        if self.spec.cameras and not (self.root / layout.CAMERAS_PATH).exists():
            layout.write_json(self.root / layout.CAMERAS_PATH, {**layout.CAMERA_CONVENTION, "views": list(self.spec.views)})
        layout.write_json(stored, info)

    def discard_episode(self) -> None:
        """Drop the unfinished episode; does nothing when there is none."""
        for encoder in self._encoders.values():
            encoder.abort()
        self._forget_episode()

    def _forget_episode(self) -> None:
        self._encoders, self._rows = {}, None
        shutil.rmtree(self._workspace, ignore_errors=True)

    # ---- the end -------------------------------------------------------------------------------------------------

    def finalize(self) -> None:
        """Drop an unfinished episode, write ``stats.json`` and the totals, and release the folder. Safe to call twice."""
        if self._lock is None and fcntl is not None:
            return
        self.discard_episode()
        try:
            if self._cameras_decided or self._episodes:
                self._write_info()
            if self._episodes:
                layout.write_json(self.root / layout.STATS_PATH, aggregate(read_stored_stats(self.root)))
        except OSError as cause:
            raise self._refused(cause, self.root / "meta") from cause
        finally:
            self._release_lock()

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finalize()


def _move_all(moves: list[tuple[Path, Path]]) -> None:
    """Rename in order, the meta file last; on failure take back what was moved, so that no file stays that nobody owns."""
    done: list[Path] = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            done.append(target)
    except OSError:
        for target in done:
            target.unlink(missing_ok=True)
        raise
