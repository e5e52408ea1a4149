"""The LeRobot v3.0 layout: file names, feature descriptions, Arrow columns and the small metadata files.

Source: the published format of LeRobot datasets, codebase version v3.0 (info.json, tasks.parquet, episodes
parquet). Extensions, all of which other readers may ignore: camera poses per frame, depth and segmentation,
poses of rigid bodies, provenance per view and frame, success and seed per episode.

Bodies: ``observation.body_poses`` is one float32 vector of 7 numbers per body (x y z in metres, quaternion wxyz); its
``names`` are ``<body>.x``, ``<body>.y``, ... and thus say which bodies there are, in which order.
``observation.body_ids.<view>`` is a 16-bit PNG like ``observation.segmentation.<view>``, beside which it may stand: 0 is
the background, 1 + i the i-th body.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataengine.bodies import POSE
from dataengine.errors import closest
from dataengine.lerobot.video import DepthCodec, VideoCodec

VERSION = "v3.0"
CHUNK_SIZE = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
INFO_PATH, STATS_PATH, TASKS_PATH, CAMERAS_PATH = (
    "meta/info.json",
    "meta/stats.json",
    "meta/tasks.parquet",
    "meta/cameras.json",
)

PARTS = ".parts"  # episodes of several recorders that wait to be collected; no reader looks there

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
DEPTH, SEGMENTATION, CAMERA, PROVENANCE = (
    "observation.depth.",
    "observation.segmentation.",
    "observation.camera.",
    "provenance.",
)
BODY_POSES, BODY_IDS = "observation.body_poses", "observation.body_ids."
ID_PICTURES = (SEGMENTATION, BODY_IDS)
SUCCESS = "next.success"
INDEX_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")

PROVENANCE_LEGEND = ("observed", "rendered", "generated")
"""Where an image comes from: a (real or simulated) camera, a reconstruction, a generative model."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What every frame of a dataset holds.

    Attributes:
        fps: frames per second.
        views: camera names, at least one.
        image_size: (height, width) in pixels, the same for all views.
        state_dim, action_dim: lengths of the state and action vectors.
        depth, segmentation: whether every view also has depth in metres and integer ids.
        cameras: whether every frame also has the pose and intrinsics of every view.
        bodies: names of the rigid bodies whose poses every frame has.
        body_ids: whether every view also has the id of the body that each pixel shows.
        extra: further float32 vectors, name -> length, such as ``{"action.clean": 7}``.
        robot_type: free text for ``info.json``.
        video, depth_codec: how images and depth are stored.

    Raises:
        ValueError: a size below 1, no or repeated views, repeated bodies, ids without bodies, a name that the layout
            cannot hold.
    """

    fps: float
    views: tuple[str, ...]
    image_size: tuple[int, int]
    state_dim: int
    action_dim: int
    depth: bool = False
    segmentation: bool = False
    cameras: bool = False
    bodies: tuple[str, ...] = ()
    body_ids: bool = False
    extra: dict[str, int] = field(default_factory=dict)
    robot_type: str = "unknown"
    video: VideoCodec = field(default_factory=VideoCodec)
    depth_codec: DepthCodec = field(default_factory=DepthCodec)

    def __post_init__(self) -> None:
        if not 0 < self.fps < 1e4:
            raise ValueError(f"fps: expected frames per second above 0, got {self.fps}")
        if not self.views or len(set(self.views)) != len(self.views):
            raise ValueError(f"views: expected at least one name and no name twice, got {list(self.views)}")
        if len(set(self.bodies)) != len(self.bodies):
            raise ValueError(f"bodies: expected no name twice, got {list(self.bodies)}")
        if self.body_ids and not self.bodies:
            raise ValueError("body_ids: expected the names of the bodies beside it, got none; pass bodies")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(
                f"image_size: expected (height, width) of at least 1 pixel, got {self.image_size}"
            )
        for name, size in {"state_dim": self.state_dim, "action_dim": self.action_dim, **self.extra}.items():
            if size < 1:
                raise ValueError(f"{name}: expected a length of at least 1, got {size}")
        self.video.check_size(*self.image_size)
        self._check_names()

    def _check_names(self) -> None:
        for name in (*self.views, *self.bodies, *self.extra):
            if not name or "/" in name:
                raise ValueError(
                    f"views, bodies, extra: expected names without '/', got {name!r}; LeRobot uses '/' in its columns"
                )
        fixed = self._fixed_features()
        for name in self.extra:
            if name in fixed:
                raise ValueError(f"extra: expected a name that is not taken, got {name!r}; choose another")

    @property
    def video_keys(self) -> tuple[str, ...]:
        """Features stored as video files: every view, then its depth."""
        keys = [IMAGES + v for v in self.views]
        return tuple(keys + [DEPTH + v for v in self.views]) if self.depth else tuple(keys)

    @property
    def whole_fps(self) -> float:
        """``fps`` as LeRobot writes it: an integer where it is one."""
        return int(self.fps) if self.fps == int(self.fps) else self.fps

    def features(self) -> dict[str, dict[str, Any]]:
        """The ``features`` object of ``info.json``."""
        extra = {name: _vector(size) for name, size in self.extra.items()}
        index = {
            name: {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
            for name in INDEX_COLUMNS
        }
        return {**self._fixed_features(), **extra, **index}

    def _fixed_features(self) -> dict[str, dict[str, Any]]:
        out: dict[str, dict[str, Any]] = {STATE: _vector(self.state_dim), ACTION: _vector(self.action_dim)}
        for view in self.views:
            out[IMAGES + view] = self._video_feature(3, self.video.to_info(), depth=False)
            if self.depth:
                out[DEPTH + view] = self._video_feature(1, self.depth_codec.to_info(), depth=True)
            for prefix, wanted in ((SEGMENTATION, self.segmentation), (BODY_IDS, self.body_ids)):
                if wanted:
                    out[prefix + view] = self._id_feature()
            if self.cameras:
                out[f"{CAMERA}{view}.extrinsics"] = _vector(16)
                out[f"{CAMERA}{view}.intrinsics"] = _vector(9)
            out[PROVENANCE + view] = {"dtype": "int64", "shape": [1], "names": None}
        if self.bodies:
            names = [f"{body}.{part}" for body in self.bodies for part in POSE]
            out[BODY_POSES] = {**_vector(len(names)), "names": names}
        out[SUCCESS] = {"dtype": "bool", "shape": [1], "names": None}
        return out

    def _id_feature(self) -> dict[str, Any]:
        return {"dtype": "image", "shape": [*self.image_size, 1], "names": ["height", "width", "channels"]}

    def _video_feature(self, channels: int, codec: dict[str, Any], *, depth: bool) -> dict[str, Any]:
        height, width = self.image_size
        info = {
            "video.height": height,
            "video.width": width,
            "video.channels": channels,
            "video.fps": self.whole_fps,
            **codec,
            "video.is_depth_map": depth,
            "is_depth_map": depth,
            "has_audio": False,
        }
        return {
            "dtype": "video",
            "shape": [height, width, channels],
            "names": ["height", "width", "channels"],
            "info": info,
        }


def _vector(size: int) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [size], "names": None}


def body_names(features: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Names of the bodies whose poses the features of a dataset hold; empty where there are none."""
    names = features.get(BODY_POSES, {}).get("names") or ()
    return tuple(name.removesuffix(f".{POSE[0]}") for name in names[:: len(POSE)])


def arrow_schema(features: dict[str, dict[str, Any]]) -> pa.Schema:
    """Arrow columns of a data file: vectors are fixed-size lists, images (bytes, path), videos absent."""
    columns = {k: _arrow_type(f) for k, f in features.items() if f["dtype"] != "video"}
    return pa.schema(list(columns.items()))


def _arrow_type(feature: dict[str, Any]) -> pa.DataType:
    if feature["dtype"] == "image":
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    scalar = {"bool": pa.bool_(), "int64": pa.int64(), "float32": pa.float32()}[feature["dtype"]]
    # a vector of length 1 is a plain column in LeRobot's files
    return scalar if feature["shape"] == [1] else pa.list_(scalar, feature["shape"][0])


CAMERA_CONVENTION = {
    "convention": "OpenCV: x right, y down, z forward",
    "extrinsics": "observation.camera.<view>.extrinsics: float32[16], camera_to_world, row major, metres",
    "intrinsics": "observation.camera.<view>.intrinsics: float32[9], row major, pixels of the stored image",
    "pixel_centre": 0.5,
    "depth": "observation.depth.<view>: metres along the optical axis",
}


def check_same_features(stored: dict[str, Any], wanted: dict[str, Any], root: Path) -> None:
    """Raise ``ValueError`` naming the first feature in which an existing dataset and a writer differ."""
    for key in (*wanted, *stored):
        if key not in stored or key not in wanted:
            side = "the dataset lacks it" if key in wanted else "the writer was not asked for it"
            other = closest(key, stored if key in wanted else wanted)
            raise ValueError(
                f"{key}: expected the features of the dataset in {root}, but {side} ({other}); use a new root"
            )
        for part in ("dtype", "shape", "names") if key == BODY_POSES else ("dtype", "shape"):
            if _plain(stored[key][part]) != _plain(wanted[key][part]):
                raise ValueError(
                    f"{key}: expected {part} {stored[key][part]} as in the dataset in {root}, got "
                    f"{wanted[key][part]}; "
                    "use a new root or the same sizes"
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def shape_of(array: Any) -> str:
    """``uint8 [64, 64, 3]``: dtype and shape for error sentences."""
    array = np.asarray(array)
    return f"{array.dtype} {list(array.shape)}"
