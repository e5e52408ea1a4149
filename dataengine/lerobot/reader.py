"""Read LeRobot datasets, v3.0 of ours and others (one file per episode or many in shared files), and v2.0 and v2.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataengine.bodies import Bodies
from dataengine.cameras import Cameras
from dataengine.errors import DatasetError, closest, damaged
from dataengine.lerobot import files, layout, metadata, version2
from dataengine.lerobot.metadata import EpisodeMeta
from dataengine.lerobot.pictures import decode_ids, decode_image
from dataengine.lerobot.sidecar import read_sidecar, sidecar_cameras
from dataengine.lerobot.stats import column_array
from dataengine.lerobot.video import DepthCodec, read_window


@dataclass(frozen=True, eq=False)
class Episode:
    """T frames of one episode, or a window of them.

    Attributes:
        images: view -> uint8 ``[T, H, W, 3]``.
        state: float32 ``[T, S]``; row t is observation t.
        action: float32 ``[T, A]``; row t is the action taken at observation t.
        cameras: poses ``[T, V, ...]``, of its columns or else of ``meta/cameras.json``, or None where there are none.
        depth: view -> float32 ``[T, H, W]`` metres, or None.
        segmentation: view -> int32 ``[T, H, W]`` ids, -1 for nothing, or None.
        bodies: names and poses ``[T, n, 4, 4]`` of rigid bodies, or None.
        body_ids: view -> int32 ``[T, H, W]``, 0 background, 1 + i the i-th of ``bodies``, or None.
        task: the instruction (of the first frame).
        success, seed: None where not known.
        fps: frames per second.
        timestamp: float32 ``[T]`` seconds since the start of the episode.
        provenance: view -> int64 ``[T]``, codes of :data:`dataengine.episodes.PROVENANCE_LEGEND`.
        extra: every other numeric column, ``[T, N]``.
        index, start: number of the episode and of the window's first frame.
    """

    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    cameras: Cameras | None
    depth: dict[str, NDArray[np.float32]] | None
    segmentation: dict[str, NDArray[np.int32]] | None
    task: str
    success: bool | None
    seed: int | None
    fps: float
    timestamp: NDArray[np.float32]
    provenance: dict[str, NDArray[np.int64]]
    extra: dict[str, NDArray[Any]]
    index: int
    start: int = 0
    bodies: Bodies | None = None
    body_ids: dict[str, NDArray[np.int32]] | None = None

    def __len__(self) -> int:
        return len(self.timestamp)

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(self.images)

    @property
    def stacked_images(self) -> NDArray[np.uint8]:
        """uint8 ``[T, V, H, W, 3]``; a ``ValueError`` where the views differ in size."""
        sizes = {v: i.shape[1:3] for v, i in self.images.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"stacked_images: expected views of one size, got {sizes}; use images[view]")
        return np.stack(list(self.images.values()), axis=1)


class EpisodeDataset:
    """Episodes on disk; holds only metadata, decodes on demand, pickles cheaply (for data-loader workers).

    Args:
        root: folder of a LeRobot dataset, v3.0, v2.1 or v2.0.

    Raises:
        DatasetError: no dataset there, or its ``info.json``, tasks or ``cameras.json`` cannot be read. Damage to a
            single episode shows when that episode is read; the others stay readable.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise DatasetError(
                f"{self.root}: expected a dataset folder, found none; record one first or check the path",
                path=self.root,
            )
        self.info = files.read_json(self.root / layout.INFO_PATH)
        self._check_info()
        self.fps = float(self.info["fps"])
        self._damaged: list[str] = []
        self._sidecar = read_sidecar(self.root)
        if version2.is_version2(self.info):
            self.tasks = tuple(version2.read_tasks(self.root))
            self._episodes = version2.read_episodes(self.root, self.info)
            self._paths = version2.DATA_PATH, version2.VIDEO_PATH
        else:
            self.tasks = tuple(metadata.read_tasks(self.root))
            self._episodes = metadata.read_episode_table(self.root, self._damaged)
            self._paths = layout.DATA_PATH, layout.VIDEO_PATH
        # a killed writer leaves info.json one episode behind; lost meta files leave it ahead
        self._length = max([e + 1 for e in self._episodes] + [int(self.info["total_episodes"])])

    def _check_info(self) -> None:
        path = self.root / layout.INFO_PATH
        for key in ("codebase_version", "fps", "features", "total_episodes"):
            if key not in self.info:
                raise DatasetError(
                    f"{path}: expected the key {key!r}, found none; restore this file from a copy", path=path
                )
        if not str(self.info["codebase_version"]).startswith(("v3", "v2.")):
            version = self.info["codebase_version"]
            raise DatasetError(
                f"{path}: expected a LeRobot v3 or v2 dataset, got {version}; convert it with LeRobot's own converter",
                path=path,
            )

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    def _is_depth(self, key: str) -> bool:
        info = self.features[key].get("info") or {}
        return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))

    @property
    def _view_keys(self) -> dict[str, str]:
        pictures = [k for k, f in self.features.items() if f["dtype"] in ("video", "image")]
        colour = [k for k in pictures if not self._is_depth(k) and not k.startswith(layout.ID_PICTURES)]
        return {k.removeprefix(layout.IMAGES): k for k in colour}

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the colour cameras."""
        return tuple(self._view_keys)

    @property
    def bodies(self) -> tuple[str, ...]:
        """Names of the rigid bodies whose poses are recorded; empty where there are none."""
        return layout.body_names(self.features)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames per episode (0 where the metadata is damaged)."""
        return tuple(self._episodes[i].length if i in self._episodes else 0 for i in range(len(self)))

    @property
    def success(self) -> tuple[bool | None, ...]:
        """Success per episode, None where not known."""
        return tuple(self._episodes[i].success if i in self._episodes else None for i in range(len(self)))

    @property
    def readable(self) -> tuple[EpisodeMeta, ...]:
        """Metadata of every episode whose metadata is sound."""
        return tuple(self._episodes.values())

    def __len__(self) -> int:
        return self._length

    def meta(self, index: int) -> EpisodeMeta:
        """Metadata of one episode, without decoding; IndexError outside, DatasetError where damaged."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"episode {index}: expected 0 to {len(self) - 1} in {self.root}")
        index %= len(self)
        if index not in self._episodes:
            reason = "; ".join(self._damaged) or f"{self.root}/meta/episodes has no row for it"
            raise DatasetError(
                f"episode {index}: its metadata is missing or damaged ({reason}); restore it from a copy",
                path=self.root,
                episode=index,
            )
        return self._episodes[index]

    def __getitem__(self, index: int) -> Episode:
        return self.episode(index)

    def episode(
        self, index: int, start: int = 0, stop: int | None = None, *, views: Sequence[str] | None = None
    ) -> Episode:
        """Read frames ``start .. stop`` of an episode, decoding only those and back to the key frame before.

        Args:
            index: episode number; negative counts from the end.
            start, stop: frame window, stop exclusive, None for the end.
            views: which cameras to decode, in this order; None for all.

        Raises:
            IndexError, ValueError: outside the episode; an unknown view (closest name).
            DatasetError: a missing or damaged file; names file, episode and frame.
        """
        meta = self.meta(index)
        stop = meta.length if stop is None else stop
        if not 0 <= start < stop <= meta.length:
            raise IndexError(
                f"window: expected 0 <= start < stop <= {meta.length} in episode {meta.index}, got {start}, "
                f"{stop}"
            )
        names = self._chosen(views)
        table = self.rows(meta).slice(start, stop - start)
        try:
            return self._assemble(meta, start, table, names)
        except (ValueError, KeyError, IndexError, pa.ArrowException) as cause:
            raise damaged(self._data_path(meta), meta.index, start, cause) from cause

    def _chosen(self, views: Sequence[str] | None) -> tuple[str, ...]:
        for view in views or ():
            if view not in self.views:
                raise ValueError(f"views: unknown view {view!r}; {closest(view, self.views)}")
        return self.views if views is None else tuple(views)

    def cameras(self, index: int, views: Sequence[str] | None = None) -> Cameras | None:
        """Cameras ``[T, V, ...]`` of a whole episode, None where they have no poses; no picture is decoded.

        Raises as :meth:`episode` does.
        """
        meta, names = self.meta(index), self._chosen(views)
        table = self.rows(meta)
        keys = [key for key in table.column_names if key.startswith(layout.CAMERA)]
        return self._cameras({key: column_array(table[key]) for key in keys}, names, meta.length, meta.index)

    def rows(self, meta: EpisodeMeta) -> pa.Table:
        """The parquet rows of one episode; DatasetError where they are damaged or too few or many."""
        path = self._data_path(meta)
        try:
            table = pq.read_table(
                path, filters=[("episode_index", "=", meta.index)], page_checksum_verification=True
            )
        except (OSError, pa.ArrowException) as cause:
            raise damaged(path, meta.index, 0, cause) from cause
        if table.num_rows != meta.length:
            first = min(table.num_rows, meta.length)
            raise damaged(path, meta.index, first, f"{table.num_rows} rows instead of {meta.length}")
        return table

    def _data_path(self, meta: EpisodeMeta) -> Path:
        return self.root / (self.info.get("data_path") or self._paths[0]).format(**meta.file)

    def video_path(self, meta: EpisodeMeta, key: str) -> Path:
        """The video file that holds a feature of an episode."""
        return meta.video_path(self.root, key, self.info.get("video_path") or self._paths[1])

    def _pictures(self, key: str, table: pa.Table, meta: EpisodeMeta, start: int, count: int) -> NDArray[Any]:
        if self.features[key]["dtype"] == "image":
            return np.stack([decode_image(self._cell(cell)) for cell in table[key].to_pylist()])
        if key not in meta.videos:
            raise damaged(self.root / "meta" / "episodes", meta.index, 0, f"no video file listed for {key}")
        offset = round(meta.videos[key][2] * self.fps)
        depth = self._depth_codec(key) if self._is_depth(key) else None
        return read_window(
            self.video_path(meta, key),
            fps=self.fps,
            first=offset + start,
            count=count,
            episode=meta.index,
            depth=depth,
        )

    def _cell(self, cell: dict[str, Any]) -> bytes:
        """The bytes of a picture in a row; some writers keep only the path of a file in the dataset."""
        if not cell["bytes"] and cell.get("path") and (self.root / cell["path"]).is_file():
            return (self.root / cell["path"]).read_bytes()
        return cell["bytes"]

    def _depth_codec(self, key: str) -> DepthCodec:
        codec = DepthCodec.from_info(self.features[key])
        if codec is None:
            raise DatasetError(
                f"{self.root / layout.INFO_PATH}: expected depth_min and depth_max for {key}, found none; restore this "
                "file from a copy",
                path=self.root,
            )
        return codec

    def _assemble(self, meta: EpisodeMeta, start: int, table: pa.Table, names: tuple[str, ...]) -> Episode:
        count = table.num_rows
        columns = {n: table[n] for n in table.column_names}
        empty = np.zeros((count, 0), np.float32)
        vectors = {
            k: column_array(columns[k])
            for k, f in self.features.items()
            if k in columns and f["dtype"] not in ("video", "image", "string", "language")
        }
        task_index = int(vectors["task_index"][0, 0])
        return Episode(
            images={v: self._pictures(self._view_keys[v], table, meta, start, count) for v in names},
            state=vectors.pop(layout.STATE, empty).astype(np.float32),
            action=vectors.pop(layout.ACTION, empty).astype(np.float32),
            cameras=self._cameras(vectors, names, count, meta.index),
            depth=self._depth(meta, start, table, names),
            segmentation=_id_pictures(layout.SEGMENTATION, columns, names),
            task=self.tasks[task_index] if task_index < len(self.tasks) else meta.tasks[0],
            success=meta.success,
            seed=meta.seed,
            fps=self.fps,
            timestamp=vectors["timestamp"][:, 0].astype(np.float32),
            provenance={
                v: vectors[layout.PROVENANCE + v][:, 0] for v in names if layout.PROVENANCE + v in vectors
            },
            extra={k: v for k, v in vectors.items() if not _is_known(k)},
            index=meta.index,
            start=start,
            bodies=self._bodies(vectors),
            body_ids=_id_pictures(layout.BODY_IDS, columns, names),
        )

    def picture_size(self, view: str) -> tuple[int, int]:
        """(height, width) of a view in pixels; datasets ported to v2.0 list the channels first."""
        feature = self.features[self._view_keys[view]]
        names = [str(n).removesuffix("s") for n in feature.get("names") or ()]
        shape = list(feature["shape"])
        if names[:1] == ["channel"] or (not names and shape[0] in (1, 3) and shape[-1] not in (1, 3)):
            shape = [*shape[1:], shape[0]]
        return int(shape[0]), int(shape[1])

    def depth_range(self, view: str) -> tuple[float, float] | None:
        """(near, far) in the unit of the stored depth of a view, None where it has no depth."""
        key = layout.DEPTH + view
        if key not in self.features:
            return None
        codec = self._depth_codec(key)
        return codec.near, codec.far

    def _bodies(self, vectors: dict[str, NDArray[Any]]) -> Bodies | None:
        return Bodies.from_vectors(self.bodies, vectors[layout.BODY_POSES]) if self.bodies else None

    def _cameras(
        self, vectors: dict[str, NDArray[Any]], names: tuple[str, ...], count: int, episode: int
    ) -> Cameras | None:
        keys = [f"{layout.CAMERA}{v}." for v in names]
        if not names:
            return None
        if any(k + "extrinsics" not in vectors for k in keys):
            sizes = {name: self.picture_size(name) for name in names}
            return (
                None
                if self._sidecar is None
                else sidecar_cameras(self.root, self._sidecar, names, sizes, count)
            )
        poses = np.stack([vectors[k + "extrinsics"].reshape(-1, 4, 4) for k in keys], axis=1)
        matrices = np.stack([vectors[k + "intrinsics"].reshape(-1, 3, 3) for k in keys], axis=1)
        height, width = self.picture_size(names[0])
        try:
            return Cameras(names, matrices, poses, width, height)
        except ValueError as cause:  # the file is sound, but what somebody wrote into it is no camera
            raise DatasetError(
                f"{self.root}: episode {episode}: {cause}; write the poses anew",
                path=self.root,
                episode=episode,
            ) from cause

    def _depth(
        self, meta: EpisodeMeta, start: int, table: pa.Table, names: tuple[str, ...]
    ) -> dict[str, Any] | None:
        keys = {v: layout.DEPTH + v for v in names if layout.DEPTH + v in self.features}
        if not keys:
            return None
        return {v: self._pictures(k, table, meta, start, table.num_rows) for v, k in keys.items()}

    def problems(self) -> list[str]:
        """Read everything and return one sentence per problem; an empty list is a sound dataset."""
        from dataengine.lerobot.check import find_problems

        return self._damaged + find_problems(self)

    def validate(self) -> None:
        """Raise one :class:`DatasetError` that lists every problem of :meth:`problems`, if there is any."""
        found = self.problems()
        if found:
            raise DatasetError(f"{self.root}: {len(found)} problems: " + " | ".join(found), path=self.root)


def _is_known(key: str) -> bool:
    prefixes = (layout.CAMERA, layout.PROVENANCE)
    return key in (*layout.INDEX_COLUMNS, layout.BODY_POSES, layout.SUCCESS) or key.startswith(prefixes)


def _id_pictures(
    prefix: str, columns: dict[str, pa.ChunkedArray], names: tuple[str, ...]
) -> dict[str, NDArray[np.int32]] | None:
    keys = {v: prefix + v for v in names if prefix + v in columns}
    if not keys:
        return None
    return {v: np.stack([decode_ids(c["bytes"]) for c in columns[k].to_pylist()]) for v, k in keys.items()}
