"""The dataset folder as a writer sees it: what is in it, and how the next episode becomes visible."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from dataengine.errors import DatasetError
from dataengine.lerobot import files, layout, metadata
from dataengine.lerobot.frames import EpisodeRows
from dataengine.lerobot.layout import DatasetSpec
from dataengine.lerobot.metadata import EpisodeMeta
from dataengine.lerobot.stats import aggregate, read_stored_stats
from dataengine.lerobot.stored import StoredEpisode
from dataengine.lerobot.video import DepthCodec


class DatasetFolder:
    """A locked dataset folder with the features of ``spec``.

    Args:
        root: created when missing; a dataset in it must have the same features.
        spec: features of every frame.
        cameras_decided: False lets an existing dataset, or else the first frame, say whether there are camera
            poses.
        depth_decided: False lets an existing dataset say how depth is coded.

    Raises:
        ValueError, DatasetError, OSError: as :class:`dataengine.episodes.EpisodeWriter` says; the lock is
            released then.
    """

    def __init__(self, root: Path, spec: DatasetSpec, *, cameras_decided: bool, depth_decided: bool = True):
        self.root, self.spec = root, spec
        self.cameras_decided, self.depth_decided = cameras_decided, depth_decided
        self.episodes: list[EpisodeMeta] = []
        self.tasks: list[str] = []
        root.mkdir(parents=True, exist_ok=True)
        self.lock = files.FolderLock(root)
        try:
            self.clear_workspace()  # the lock says that no living writer owns it
            self._load()
        except BaseException:
            self.lock.release()
            raise

    def _load(self) -> None:
        info_path = self.root / layout.INFO_PATH
        if not info_path.exists() and {p.name for p in self.root.iterdir()} - {
            "data",
            "videos",
            "meta",
            layout.PARTS,
        }:
            raise DatasetError(
                f"{self.root}: expected an empty folder or a LeRobot v3 dataset, got other files; choose "
                "another root",
                path=self.root,
            )
        if info_path.exists() and not str(
            version := files.read_json(info_path).get("codebase_version")
        ).startswith("v3"):
            raise DatasetError(
                f"{self.root}: expected a LeRobot v3 dataset to append to, got {version}; choose another root",
                path=info_path,
            )
        episodes = metadata.read_episode_table(self.root)
        self.episodes = sorted(episodes.values(), key=lambda e: e.index)
        if self.episodes:  # a dataset without episodes binds nobody
            self._join(files.read_json(info_path))
        self._remove_orphans()

    def _join(self, info: dict) -> None:
        if not self.cameras_decided:
            self.decide_cameras(any(k.startswith(layout.CAMERA) for k in info["features"]))
        layout.check_same_features(info["features"], self.spec.features(), self.root)
        if float(info["fps"]) != float(self.spec.fps):
            raise ValueError(
                f"fps: expected {info['fps']} as in the dataset in {self.root}, got {self.spec.fps}; use a "
                "new root"
            )
        if self.spec.depth:
            self._join_depth(DepthCodec.from_info(info["features"][layout.DEPTH + self.spec.views[0]]))
        self.tasks = metadata.read_tasks(self.root)

    def _join_depth(self, stored: DepthCodec | None) -> None:
        """Go on with the codes of the dataset: it has one range, and frames coded otherwise would be misread."""
        if stored is None or stored == self.spec.depth_codec:
            return
        if self.depth_decided:
            wanted = self.spec.depth_codec
            raise ValueError(
                f"depth_range: expected ({stored.near}, {stored.far}) as in the dataset in {self.root}, got "
                f"({wanted.near}, {wanted.far}); leave it out or use a new root"
            )
        self.spec = replace(self.spec, depth_codec=stored)

    def _remove_orphans(self) -> None:
        """Remove what a writer left that died between its first rename and its last: the next slot."""
        slot = "chunk-{:03d}/file-{:03d}.*".format(*self.next_file())
        for orphan in [*self.root.glob(f"data/{slot}"), *self.root.glob(f"videos/*/{slot}")]:
            orphan.unlink()

    def decide_cameras(self, present: bool) -> None:
        """Settle whether frames carry camera poses."""
        self.spec = replace(self.spec, cameras=present)
        self.cameras_decided = True

    @property
    def workspace(self) -> Path:
        """Where the unfinished episode grows; on the same file system, so that a rename publishes it."""
        return self.root / ".unfinished"

    def clear_workspace(self) -> None:
        shutil.rmtree(self.workspace, ignore_errors=True)

    def next_meta(
        self, length: int, tasks: tuple[str, ...], success: bool | None, seed: int | None
    ) -> EpisodeMeta:
        """Where the next episode, of `length` frames, will lie."""
        last = self.episodes[-1] if self.episodes else None
        start = last.to_index if last else 0
        chunk, file = self.next_file()
        return EpisodeMeta(
            index=last.index + 1 if last else 0,
            length=length,
            tasks=tasks,
            chunk_index=chunk,
            file_index=file,
            from_index=start,
            to_index=start + length,
            videos=dict.fromkeys(self.spec.video_keys, (chunk, file, 0.0, length / self.spec.fps)),
            success=None if success is None else bool(success),
            seed=None if seed is None else int(seed),
        )

    def next_file(self) -> tuple[int, int]:
        """(chunk, file) after the last one that any episode uses."""
        used = [(e.chunk_index, e.file_index) for e in self.episodes]
        used += [v[:2] for e in self.episodes for v in e.videos.values()]
        if not used:
            return 0, 0
        chunk, file = max(used)
        return (chunk, file + 1) if file + 1 < layout.CHUNK_SIZE else (chunk + 1, 0)

    def publish(self, rows: EpisodeRows, meta: EpisodeMeta, videos: dict[str, Path]) -> None:
        """Make an episode visible that was written in the workspace."""
        meta = replace(meta, checksums={key: files.checksum(path) for key, path in videos.items()})
        tasks = self._with_tasks(meta)
        table = rows.data_table(meta, tasks)
        self._install(meta, tasks, table, rows.meta_table(meta, table), videos)

    def adopt(self, stored: StoredEpisode) -> EpisodeMeta:
        """Make an episode of another folder visible here, which stays there too; its new row in ``meta/episodes``."""
        self._check_same(stored)
        old = stored.meta
        meta = self.next_meta(old.length, old.tasks, old.success, old.seed)
        videos = stored.link_videos(self.workspace)
        meta = replace(meta, checksums={key: files.checksum(path) for key, path in videos.items()})
        stored.check(meta.checksums)
        tasks = self._with_tasks(meta)
        data = stored.data_table(meta, tasks, self.spec)
        self._install(meta, tasks, data, stored.meta_table(meta, data), videos)
        return meta

    def _check_same(self, stored: StoredEpisode) -> None:
        """Raise ``ValueError`` unless an episode has the features, rate and depth codes of this dataset."""
        features, here = stored.info["features"], self.spec.features()
        layout.check_same_features(here, features, self.root)
        if float(stored.info["fps"]) != float(self.spec.fps):
            raise ValueError(
                f"fps: expected {self.spec.fps} as in {self.root}, got {stored.info['fps']} in {stored.root}"
            )
        for key in self.spec.video_keys if self.spec.depth else ():
            codecs = [DepthCodec.from_info(f[key]) for f in (here, features) if key.startswith(layout.DEPTH)]
            if codecs and codecs[0] != codecs[1]:
                raise ValueError(
                    f"{key}: expected the depth codes of {self.root}, got others in {stored.root}"
                )

    def _with_tasks(self, meta: EpisodeMeta) -> list[str]:
        return self.tasks + [t for t in meta.tasks if t not in self.tasks]

    def _install(
        self, meta: EpisodeMeta, tasks: list[str], data: pa.Table, row: pa.Table, videos: dict[str, Path]
    ) -> None:
        """Move an episode to its place: videos and data first, its row in ``meta/episodes`` last."""
        moves = [(path, meta.video_path(self.root, key)) for key, path in videos.items()]
        for name, content, target in (
            ("data.parquet", data, layout.DATA_PATH),
            ("episode.parquet", row, layout.EPISODES_PATH),
        ):
            moves.append((self._temporary(name, content), self.root / target.format(**meta.file)))
        if tasks != self.tasks:
            content = files.parquet_bytes(metadata.tasks_table(tasks))
            files.write_atomically(self.root / layout.TASKS_PATH, content)
        if not self.episodes:  # an episode is readable only beside an info.json with its features
            self.write_info()
        files.move_all(moves)
        self.episodes.append(meta)
        self.tasks = tasks

    def _temporary(self, name: str, table: pa.Table) -> Path:
        path = self.workspace / name
        files.write_atomically(path, files.parquet_bytes(table, compact=table.num_rows == 1))
        return path

    def write_info(self) -> None:
        """Rewrite ``info.json`` with the current totals; keys that others added to it stay."""
        frames = sum(e.length for e in self.episodes)
        info = metadata.new_info(self.spec, episodes=len(self.episodes), frames=frames, tasks=len(self.tasks))
        path = self.root / layout.INFO_PATH
        if self.episodes and path.exists():
            totals = {k: v for k, v in info.items() if k.startswith("total_") or k == "splits"}
            info = {**files.read_json(path), **totals}
        if self.spec.cameras and not (self.episodes and (self.root / layout.CAMERAS_PATH).exists()):
            convention = {**layout.CAMERA_CONVENTION, "views": list(self.spec.views)}
            files.write_json(self.root / layout.CAMERAS_PATH, convention)
        files.write_json(path, info)

    def write_stats(self) -> None:
        """Write ``stats.json`` over all episodes."""
        if self.episodes:
            files.write_json(self.root / layout.STATS_PATH, aggregate(read_stored_stats(self.root)))
