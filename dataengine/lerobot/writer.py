"""Write episodes to disk as they happen; a crash costs at most the unfinished one.

Every finished episode owns its parquet, video and meta files (v3 allows any split). Files are written under
temporary names and renamed into place; the meta file comes last, so an episode is there entirely or not at
all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataengine.cameras import Cameras
from dataengine.errors import DatasetWriteError, in_words
from dataengine.lerobot import layout
from dataengine.lerobot.folder import DatasetFolder
from dataengine.lerobot.frames import EpisodeRows, check_frame
from dataengine.lerobot.layout import DatasetSpec
from dataengine.lerobot.metadata import EpisodeMeta
from dataengine.lerobot.stored import StoredEpisode
from dataengine.lerobot.video import DepthCodec, VideoCodec, VideoEncoder

T = TypeVar("T")


def refused(cause: OSError, path: Path, kept: str) -> DatasetWriteError:
    """The error for a write that the file system refuses."""
    return DatasetWriteError(f"{path}: cannot write ({in_words(cause)}); {kept}", errno=cause.errno)


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
        bodies: names of the rigid bodies whose poses frames carry, in the order of their ids.
        body_ids: whether frames say for every pixel of every view which body it shows.
        extra: further float32 vectors, name -> length.
        robot_type: free text kept in ``info.json``.
        video: compression of the colour images; see :class:`VideoCodec`.
        depth_range: (near, far) in metres for the depth codes; None: those of the dataset in ``root``, (0.02, 10) in
            a new one.

    Raises:
        ValueError: bad sizes or names; features that differ from the dataset in ``root`` (the feature is
            named).
        DatasetError: ``root`` holds something damaged, or another writer has it open.
        DatasetWriteError: the file system refuses a write; finished episodes are kept.

    Crash safety holds for a killed process and, because files are synced before they are renamed, for a lost
    machine on file systems that order renames. A frame costs one encoder step and one row in memory, whatever
    the episode's length.
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
        bodies: Sequence[str] = (),
        body_ids: bool = False,
        extra: Mapping[str, int] | None = None,
        robot_type: str = "unknown",
        video: VideoCodec | None = None,
        depth_range: tuple[float, float] | None = None,
    ):
        self.root = Path(root)
        spec = DatasetSpec(
            fps=fps,
            views=tuple(views),
            image_size=(int(image_size[0]), int(image_size[1])),
            state_dim=state_dim,
            action_dim=action_dim,
            depth=depth,
            segmentation=segmentation,
            cameras=bool(cameras),
            bodies=tuple(bodies),
            body_ids=body_ids,
            extra=dict(extra or {}),
            robot_type=robot_type,
            video=video or VideoCodec(),
            depth_codec=DepthCodec(near=depth_range[0], far=depth_range[1]) if depth_range else DepthCodec(),
        )
        self._rows: EpisodeRows | None = None
        self._encoders: dict[str, VideoEncoder] = {}
        try:
            self._folder = DatasetFolder(
                self.root, spec, cameras_decided=cameras is not None, depth_decided=depth_range is not None
            )
        except OSError as cause:
            raise refused(
                cause, self.root, "nothing was written; free space or choose another root"
            ) from cause

    @property
    def spec(self) -> DatasetSpec:
        """The features of every frame."""
        return self._folder.spec

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of another writer that writes the same frames in the same way."""
        spec = self.spec
        names = (
            "fps", "views", "image_size", "state_dim", "action_dim", "depth", "segmentation", "bodies", "body_ids",
            "extra", "robot_type", "video",
        )  # fmt: skip
        return {name: getattr(spec, name) for name in names} | {
            "cameras": spec.cameras if self._folder.cameras_decided else None,
            "depth_range": (spec.depth_codec.near, spec.depth_codec.far),
        }

    @property
    def finished(self) -> int:
        """Number of finished episodes in the dataset, including those of earlier writers."""
        return len(self._folder.episodes)

    @property
    def frames(self) -> int:
        """Frames of the unfinished episode."""
        return len(self._rows) if self._rows else 0

    @property
    def episodes(self) -> tuple[EpisodeMeta, ...]:
        """The finished episodes, in order."""
        return tuple(self._folder.episodes)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the finished episodes that have one."""
        return tuple(e.seed for e in self._folder.episodes if e.seed is not None)

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
        bodies: Mapping[str, Any] | None = None,
        body_ids: Mapping[str, Any] | None = None,
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
            depth: view -> metres ``[height, width]``; beyond the far end of ``depth_range`` counts as the far
                end.
            segmentation: view -> integer ids ``[height, width]`` from -1 to 65534; stored exactly.
            bodies: body -> its pose, 7 numbers: x y z in metres in the world, quaternion wxyz of length 1.
            body_ids: view -> integer ids ``[height, width]``: 0 background, 1 + i the writer's i-th body.
            extra: every vector named in the writer's ``extra``.
            provenance: ``observed``, ``rendered`` or ``generated``; one for all views or view -> word.
            timestamp: seconds since the first frame, within 1e-4 s of ``frame / fps`` as LeRobot's own loader
                wants it; None means exactly that.

        Raises:
            ValueError: one sentence about the argument at fault; nothing is written then.
            DatasetWriteError: the file system refuses; the unfinished episode is dropped, finished ones are
                kept.
        """
        self._check_open()
        if not self._folder.cameras_decided:
            self._folder.decide_cameras(cameras is not None)
        frame = check_frame(
            self.spec,
            index=self.frames,
            images=images,
            state=state,
            action=action,
            task=task,
            cameras=cameras,
            depth=depth,
            segmentation=segmentation,
            bodies=bodies,
            body_ids=body_ids,
            extra=extra or {},
            provenance=provenance,
            timestamp=timestamp,
        )
        if self._rows is None:
            self._start_episode()
        assert self._rows is not None
        for key, image in frame.pictures.items():
            self._guarded(self._encoders[key].path, lambda k=key, i=image: self._encoders[k].add(i))
        self._rows.append(frame)

    def _start_episode(self) -> None:
        self._guarded(
            self._folder.workspace, lambda: self._folder.workspace.mkdir(parents=True, exist_ok=True)
        )
        height, width = self.spec.image_size
        for key in self.spec.video_keys:
            codec = self.spec.depth_codec if key.startswith(layout.DEPTH) else self.spec.video
            path = self._folder.workspace / f"{key}.mp4"
            self._encoders[key] = self._guarded(
                path,
                lambda p=path, c=codec: VideoEncoder(
                    p, fps=self.spec.fps, height=height, width=width, codec=c
                ),
            )
        self._rows = EpisodeRows(self.spec)

    def _check_open(self) -> None:
        if not self._folder.lock.held:
            raise ValueError(
                f"EpisodeWriter: {self.root} was finalised; open a new EpisodeWriter on it to append"
            )

    def _guarded(self, path: Path, write: Callable[[], T]) -> T:
        """Run a write; when the disk refuses, drop the unfinished episode and say what is kept."""
        try:
            return write()
        except OSError as cause:
            self.discard_episode()
            raise refused(cause, path, self._kept) from cause
        except BaseException:  # an interrupt between two views would leave them out of step
            self.discard_episode()
            raise

    @property
    def _kept(self) -> str:
        return (
            f"the {self.finished} finished episodes in {self.root} are kept and readable, the unfinished one "
            "was dropped; "
            "free space and continue with a new EpisodeWriter on the same root"
        )

    def save_episode(self, *, success: bool | None = None, seed: int | None = None) -> int:
        """Publish the unfinished episode and return its index.

        Args:
            success: whether the task was solved; also sets ``next.success`` of the last frame. None: not
                known.
            seed: the environment's seed, kept so that a recording can be resumed. None: not known.

        Raises:
            ValueError: no frame was added.
            DatasetWriteError: the file system refuses; the episode is dropped, finished ones are kept.
        """
        self._check_open()
        if self._rows is None:
            raise ValueError(
                "save_episode: expected at least one add_frame before it, got none; add frames first"
            )
        rows = self._rows
        return self._guarded(self._folder.workspace, lambda: self._publish(rows, success, seed))

    def _publish(self, rows: EpisodeRows, success: bool | None, seed: int | None) -> int:
        for encoder in self._encoders.values():
            encoder.close()
        meta = self._folder.next_meta(len(rows), rows.tasks, success, seed)
        self._folder.publish(rows, meta, {key: e.path for key, e in self._encoders.items()})
        self._forget_episode()
        self._folder.write_info()
        return meta.index

    def adopt_episode(self, stored: StoredEpisode) -> int:
        """Append an episode of another dataset with the same features, as it is, without coding its pictures again;
        returns its new index. Its seed and success come along, it stays where it was.

        Raises:
            ValueError: an episode is unfinished here; other features or another rate there.
            DatasetError: something of it is missing or damaged there.
            DatasetWriteError: the file system refuses; finished episodes are kept.
        """
        self._check_open()
        if self._rows is not None:
            raise ValueError(
                "adopt_episode: expected no unfinished episode, got one; save or discard it first"
            )
        if not self._folder.cameras_decided:
            self._folder.decide_cameras(any(k.startswith(layout.CAMERA) for k in stored.info["features"]))
        meta = self._guarded(self._folder.workspace, lambda: self._folder.adopt(stored))
        self._forget_episode()
        self._folder.write_info()
        return meta.index

    def discard_episode(self) -> None:
        """Drop the unfinished episode; does nothing when there is none."""
        for encoder in self._encoders.values():
            encoder.abort()
        self._forget_episode()

    def _forget_episode(self) -> None:
        self._encoders, self._rows = {}, None
        self._folder.clear_workspace()

    def finalize(self) -> None:
        """Drop an unfinished episode, write ``stats.json`` and the totals, and release the folder. Safe to
        call twice.
        """
        if not self._folder.lock.held:
            return
        self.discard_episode()
        try:
            self._folder.write_info()
            self._folder.write_stats()
        except OSError as cause:
            raise refused(cause, self.root / "meta", self._kept) from cause
        finally:
            self._folder.lock.release()

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finalize()
