"""Check one frame before anything of it is written, and collect the rows of one episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dataengine.bodies import POSE
from dataengine.cameras import Cameras, check_intrinsics, check_rigid
from dataengine.errors import closest
from dataengine.lerobot import layout, metadata
from dataengine.lerobot.layout import DatasetSpec, shape_of
from dataengine.lerobot.metadata import EpisodeMeta
from dataengine.lerobot.pictures import NO_ID, encode_ids
from dataengine.lerobot.stats import PictureStats, vector_stats


@dataclass(frozen=True)
class Frame:
    """A checked frame: pictures for video files, values for the parquet row, instruction, time in seconds."""

    pictures: dict[str, NDArray[Any]]
    row: dict[str, Any]
    task: str
    timestamp: float


def check_frame(
    spec: DatasetSpec,
    *,
    index: int,
    images: Mapping[str, Any],
    state: Any,
    action: Any,
    task: str,
    cameras: Mapping[str, Mapping[str, Any]] | Cameras | None,
    depth: Mapping[str, Any] | None,
    segmentation: Mapping[str, Any] | None,
    bodies: Mapping[str, Any] | None,
    body_ids: Mapping[str, Any] | None,
    extra: Mapping[str, Any],
    provenance: str | Mapping[str, str],
    timestamp: float | None,
) -> Frame:
    """Validate every argument of ``EpisodeWriter.add_frame``; raises ``ValueError`` with one sentence."""
    if not isinstance(task, str) or not task.strip():
        raise ValueError(
            f"task: expected the instruction as text, got {task!r}; pass a sentence such as 'lift the cube'"
        )
    pictures = {layout.IMAGES + v: _image(v, i, spec) for v, i in _per_view("images", images, spec).items()}
    row: dict[str, Any] = {
        layout.STATE: _vector("state", state, spec.state_dim),
        layout.ACTION: _vector("action", action, spec.action_dim),
    }
    for view, value in _optional("depth", depth, spec.depth, spec).items():
        pictures[layout.DEPTH + view] = _depth(view, value, spec)
    for view, value in _optional("segmentation", segmentation, spec.segmentation, spec).items():
        row[layout.SEGMENTATION + view] = _ids("segmentation", view, value, spec, -1, NO_ID - 1)
    row.update(_body_column(bodies, spec))
    for view, value in _optional("body_ids", body_ids, spec.body_ids, spec).items():
        row[layout.BODY_IDS + view] = _ids("body_ids", view, value, spec, 0, len(spec.bodies))
    row.update(_camera_columns(cameras, spec))
    row.update(_extra_columns(extra, spec))
    row.update(_provenance_columns(provenance, spec))
    return Frame(pictures, row, task, _timestamp(timestamp, index, spec.fps))


def _per_view(argument: str, values: Mapping[str, Any], spec: DatasetSpec) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{argument}: expected view name -> array, got {type(values).__name__}; pass a dict")
    for name in values:
        if name not in spec.views:
            raise ValueError(f"{argument}: unknown view {name!r}; {closest(name, spec.views)}")
    missing = [v for v in spec.views if v not in values]
    if missing:
        raise ValueError(
            f"{argument}: expected the views {list(spec.views)}, missing {missing}; pass all views of the "
            "writer"
        )
    return {view: values[view] for view in spec.views}


def _optional(
    argument: str, values: Mapping[str, Any] | None, wanted: bool, spec: DatasetSpec
) -> Mapping[str, Any]:
    if values is None and not wanted:
        return {}
    if values is None:
        raise ValueError(
            f"{argument}: expected one array per view, got None; pass them or open the writer with "
            f"{argument}=False"
        )
    if not wanted:
        raise ValueError(
            f"{argument}: expected None, because the writer was opened with {argument}=False; open it with "
            f"{argument}=True"
        )
    return _per_view(argument, values, spec)


def _image(view: str, value: Any, spec: DatasetSpec) -> NDArray[np.uint8]:
    image = np.asarray(value)
    expected = (*spec.image_size, 3)
    if image.dtype != np.uint8 or image.shape != expected:
        raise ValueError(
            f"images[{view!r}]: expected uint8 {list(expected)} (height, width, channel), got "
            f"{shape_of(image)}; "
            "convert or resize it"
        )
    return image


def _depth(view: str, value: Any, spec: DatasetSpec) -> NDArray[Any]:
    depth = np.asarray(value)
    if not np.issubdtype(depth.dtype, np.floating) or depth.shape != spec.image_size:
        raise ValueError(
            f"depth[{view!r}]: expected float {list(spec.image_size)} in metres, got {shape_of(depth)}; "
            "convert or resize it"
        )
    lowest = depth.min()
    if not lowest >= spec.depth_codec.near:  # also catches NaN
        raise ValueError(
            f"depth[{view!r}]: expected metres of at least {spec.depth_codec.near} (depth_range), got "
            f"{lowest:.4g}; "
            "open the writer with a smaller near end or fill missing depth"
        )
    return depth


def _ids(argument: str, view: str, value: Any, spec: DatasetSpec, low: int, high: int) -> dict[str, Any]:
    ids = np.asarray(value)
    if not np.issubdtype(ids.dtype, np.integer) or ids.shape != spec.image_size:
        raise ValueError(
            f"{argument}[{view!r}]: expected integers {list(spec.image_size)}, got {shape_of(ids)}; "
            "convert or resize it"
        )
    if ids.min() < low or ids.max() > high:
        nothing = f"{low} (nothing)" if low < 0 else f"{low} (background)"
        raise ValueError(
            f"{argument}[{view!r}]: expected ids from {nothing} to {high}, got {ids.min()} to "
            f"{ids.max()}; renumber them"
        )
    return {"bytes": encode_ids(ids), "path": None}


def _vector(argument: str, value: Any, size: int) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        vector = np.asarray(value, dtype=np.float32)
    if vector.shape != (size,):
        raise ValueError(
            f"{argument}: expected {size} numbers, got {shape_of(value)}; pass a vector of that length"
        )
    if not np.isfinite(vector).all():
        bad = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise ValueError(
            f"{argument}: expected finite float32 numbers, got {vector[bad]} at position {bad}; fix the "
            "source"
        )
    return vector.copy()


def _camera_columns(
    cameras: Mapping[str, Mapping[str, Any]] | Cameras | None, spec: DatasetSpec
) -> dict[str, Any]:
    if isinstance(cameras, Cameras):
        cameras = _as_mapping(cameras)
    columns = {}
    for view, camera in _optional("cameras", cameras, spec.cameras, spec).items():
        pose = _matrix(f"cameras[{view!r}]", camera, "camera_to_world", 4)
        matrix = _matrix(f"cameras[{view!r}]", camera, "intrinsics", 3)
        _check_camera(view, pose.tobytes(), matrix.tobytes())
        columns[f"{layout.CAMERA}{view}.extrinsics"] = pose.ravel()
        columns[f"{layout.CAMERA}{view}.intrinsics"] = matrix.ravel()
    return columns


@lru_cache(maxsize=1024)  # most cameras stand still, and checking costs as much as encoding a small picture
def _check_camera(view: str, pose: bytes, matrix: bytes) -> None:
    """Raise ``ValueError`` unless the float32 numbers are a rigid pose and a pinhole matrix."""
    check_rigid(np.frombuffer(pose, np.float32).reshape(4, 4), f"cameras[{view!r}]['camera_to_world']")
    check_intrinsics(np.frombuffer(matrix, np.float32).reshape(3, 3), f"cameras[{view!r}]['intrinsics']")


def _as_mapping(cameras: Cameras) -> dict[str, dict[str, Any]]:
    if cameras.frames is not None:
        raise ValueError(
            f"cameras: expected the cameras of one frame, got {cameras.frames} frames; pass cameras.at(t)"
        )
    pairs = zip(cameras.names, cameras.intrinsics, cameras.camera_to_world, strict=True)
    return {name: {"intrinsics": k, "camera_to_world": pose} for name, k, pose in pairs}


def _matrix(argument: str, camera: Mapping[str, Any], key: str, side: int) -> NDArray[np.float32]:
    if not isinstance(camera, Mapping) or key not in camera:
        raise ValueError(
            f"{argument}: expected the keys 'intrinsics' and 'camera_to_world', missing {key!r}; add it"
        )
    matrix = np.asarray(camera[key], dtype=np.float32)
    if matrix.shape != (side, side):
        raise ValueError(
            f"{argument}[{key!r}]: expected [{side}, {side}], got {list(matrix.shape)}; pass one matrix per "
            "view"
        )
    return matrix.copy()


def _body_column(bodies: Mapping[str, Any] | None, spec: DatasetSpec) -> dict[str, Any]:
    if not spec.bodies and bodies is None:
        return {}
    if not isinstance(bodies, Mapping) or tuple(bodies) != spec.bodies:
        got = list(bodies) if isinstance(bodies, Mapping) else type(bodies).__name__
        raise ValueError(
            f"bodies: expected {list(spec.bodies)} -> 7 numbers, got {got}; pass all bodies of the writer in their order"
        )
    poses = [_vector(f"bodies[{name!r}]", pose, len(POSE)) for name, pose in bodies.items()]
    for name, pose in zip(spec.bodies, poses, strict=True):
        length = float(np.linalg.norm(pose[3:]))
        if abs(length - 1.0) > 1e-3:
            raise ValueError(
                f"bodies[{name!r}]: expected x y z and a quaternion wxyz of length 1, got length {length:.4g}; "
                "normalise it"
            )
    return {layout.BODY_POSES: np.concatenate(poses)}


def _extra_columns(extra: Mapping[str, Any], spec: DatasetSpec) -> dict[str, Any]:
    for name in extra:
        if name not in spec.extra:
            raise ValueError(f"extra: unknown name {name!r}; {closest(name, spec.extra)}")
    for name in spec.extra:
        if name not in extra:
            raise ValueError(f"extra: expected {list(spec.extra)} in every frame, missing {name!r}; pass it")
    return {name: _vector(f"extra[{name!r}]", extra[name], size) for name, size in spec.extra.items()}


def _provenance_columns(provenance: str | Mapping[str, str], spec: DatasetSpec) -> dict[str, int]:
    words = (
        dict.fromkeys(spec.views, provenance)
        if isinstance(provenance, str)
        else _per_view("provenance", provenance, spec)
    )
    for word in words.values():
        if word not in layout.PROVENANCE_LEGEND:
            known = list(layout.PROVENANCE_LEGEND)
            raise ValueError(
                f"provenance: expected one of {known}, got {word!r}; {closest(str(word), known)}"
            )
    return {layout.PROVENANCE + view: layout.PROVENANCE_LEGEND.index(word) for view, word in words.items()}


def _timestamp(value: float | None, index: int, fps: float) -> float:
    """Seconds of a frame; the tolerance is LeRobot's, and narrower where frames lie closer, so that times rise."""
    grid, tolerance = index / fps, min(1e-4, 0.25 / fps)
    if value is None:
        return grid
    if not abs(value - grid) <= tolerance:  # also catches NaN
        raise ValueError(
            f"timestamp: expected within {tolerance:.4g} s of frame {index} / {fps:g} fps = {grid:.4g} s, got "
            f"{value}; resample to a steady rate or leave it out"
        )
    return float(value)


@dataclass
class EpisodeRows:
    """The rows of one unfinished episode and the running statistics of its pictures."""

    spec: DatasetSpec
    frames: list[dict[str, Any]] = field(default_factory=list)
    frame_tasks: list[str] = field(default_factory=list)
    timestamps: list[float] = field(default_factory=list)
    pictures: dict[str, PictureStats] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The instructions of the episode, each once, in order of appearance."""
        return tuple(dict.fromkeys(self.frame_tasks))

    def append(self, frame: Frame) -> None:
        for key, picture in frame.pictures.items():
            self.pictures.setdefault(key, PictureStats()).add(picture)
        self.frames.append(frame.row)
        self.frame_tasks.append(frame.task)
        self.timestamps.append(frame.timestamp)

    def data_table(self, meta: EpisodeMeta, tasks: list[str]) -> pa.Table:
        """The rows as an Arrow table with LeRobot's index columns."""
        count = np.arange(len(self))
        index = {
            "timestamp": np.array(self.timestamps, np.float32),
            "frame_index": count,
            "episode_index": np.full(len(self), meta.index),
            "index": meta.from_index + count,
            "task_index": np.array([tasks.index(t) for t in self.frame_tasks]),
            layout.SUCCESS: (count == len(self) - 1) & bool(meta.success),
        }
        schema = layout.arrow_schema(self.spec.features())
        return pa.table([self._column(f, index) for f in schema], schema=schema)

    def _column(self, column: pa.Field, index: dict[str, NDArray[Any]]) -> pa.Array:
        if column.name in index:
            return pa.array(index[column.name], column.type)
        values = [row[column.name] for row in self.frames]
        if not pa.types.is_fixed_size_list(column.type):
            return pa.array([v.item() if isinstance(v, np.ndarray) else v for v in values], column.type)
        flat = np.concatenate(values).astype(np.float32)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), column.type.list_size)

    def meta_table(self, meta: EpisodeMeta, data: pa.Table) -> pa.Table:
        """The one row of ``meta/episodes``: where the episode lies, and its statistics."""
        stats = {k: s.result() for k, s in self.pictures.items()}
        # poses, ids and provenance are nothing to normalise; leaving them out keeps the file small
        skipped = (*layout.ID_PICTURES, layout.CAMERA, layout.BODY_POSES, layout.PROVENANCE)
        stats.update({k: vector_stats(data[k]) for k in data.column_names if not k.startswith(skipped)})
        columns = {f"stats/{key}/{name}": v for key, values in stats.items() for name, v in values.items()}
        return metadata.row_table(meta.to_row() | columns)
