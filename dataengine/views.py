"""What several cameras saw of one episode: the input of the data engine, and what it adds to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dataengine.bodies import Bodies
from dataengine.cameras import Cameras
from dataengine.lerobot.layout import PROVENANCE_LEGEND
from dataengine.lerobot.reader import Episode


@dataclass(frozen=True, eq=False, kw_only=True)
class Views:
    """T frames of V synchronised cameras.

    Attributes:
        cameras: V cameras, fixed or of T frames, whose pictures all have one size.
        images: float32 ``[T, V, H, W, 3]`` in [0, 1].
        depth: float32 ``[T, V, H, W]`` metres along the axis, 0 where not known, or None.
        body_ids: int64 ``[T, V, H, W]``, 0 for what never moves, 1 + i for body i, or None.
        bodies: names and poses of the bodies over the T frames, or None.
        confidence: float32 ``[T, V, H, W]`` in [0, 1], what a pixel counts in a fit, or None for 1.
        provenance: int64 ``[T, V]``, indices into :data:`dataengine.episodes.PROVENANCE_LEGEND`.
        fps: frames per second.

    Raises:
        ValueError: shapes that do not fit each other, no frame or no view, images that are no floats in [0, 1] (NaN is
            left to :func:`dataengine.captures.find_problems`, as it can be repaired), a rate that is not above 0.
    """

    cameras: Cameras
    images: Tensor
    depth: Tensor | None = None
    body_ids: Tensor | None = None
    bodies: Bodies | None = None
    confidence: Tensor | None = None
    provenance: Tensor | None = None
    fps: float = 10.0

    def __post_init__(self) -> None:
        t, v, size = len(self.images), len(self.cameras.names), (self.cameras.height, self.cameras.width)
        wanted = (t, v, *size, 3)
        if tuple(self.images.shape) != wanted:
            raise ValueError(
                f"images: expected [T, V, H, W, 3] = {list(wanted)} for these cameras, got {list(self.images.shape)}"
            )
        if not t or not v:
            raise ValueError(
                f"images: expected at least one frame and one view, got {t} of {v}; name frames that are there"
            )
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps: expected frames per second above 0, got {self.fps!r}")
        if not self.images.is_floating_point() or self.images.amin() < 0 or self.images.amax() > 1:
            raise ValueError(
                f"images: expected floats in [0, 1], got {self.images.dtype} from {float(self.images.amin()):.3g} to "
                f"{float(self.images.amax()):.3g}; divide bytes by 255"
            )
        for name in ("depth", "body_ids", "confidence"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != wanted[:-1]:
                raise ValueError(f"{name}: expected {list(wanted[:-1])}, got {list(value.shape)}")
        self._check_bodies()
        if self.cameras.frames not in (None, t):
            raise ValueError(
                f"cameras: expected fixed ones or {t} frames, got {self.cameras.frames} frames; cut the longer one"
            )
        if self.provenance is None:
            object.__setattr__(self, "provenance", torch.zeros(t, v, dtype=torch.long))
        elif tuple(self.provenance.shape) != (t, v):
            raise ValueError(f"provenance: expected [{t}, {v}], got {list(self.provenance.shape)}")

    def _check_bodies(self) -> None:
        if self.bodies is not None and len(self.bodies.poses) != len(self):
            raise ValueError(
                f"bodies: expected poses of {len(self)} frames, got {len(self.bodies.poses)}; cut the longer one"
            )
        if self.body_ids is None:
            return
        low, high = int(self.body_ids.amin()), int(self.body_ids.amax())
        most = high if self.bodies is None else len(self.bodies.names)
        if low < 0 or high > most:
            raise ValueError(
                f"body_ids: expected 0 for what never moves and 1 to {most} for bodies, got {low} to {high}"
            )

    @classmethod
    def from_episode(cls, episode: Episode, names: Sequence[str] | None = None) -> Views:
        """The views `names` of an episode, or all; ValueError where it has no camera poses."""
        names = tuple(names or episode.views)
        if episode.cameras is None:
            raise ValueError(
                f"episode {episode.index}: expected camera poses, found none; record with poses or add cameras.json"
            )

        def gather(found: dict[str, NDArray[Any]] | None, dtype: torch.dtype) -> Tensor | None:
            if found is None or any(name not in found for name in names):
                return None
            return torch.from_numpy(np.stack([found[name] for name in names], 1)).to(dtype)

        images = gather(episode.images, torch.float32)
        assert images is not None
        return cls(
            cameras=episode.cameras.select(names),
            images=images / 255,
            depth=gather(episode.depth, torch.float32),
            body_ids=gather(episode.body_ids, torch.long),
            bodies=episode.bodies,
            provenance=gather(episode.provenance, torch.long),
            fps=episode.fps,
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> tuple[str, ...]:
        return self.cameras.names

    def select(self, names: Sequence[str]) -> Views:
        """The named views, in the order given."""
        index = [self.cameras.names.index(name) for name in self.cameras.select(names).names]
        return replace(self, cameras=self.cameras.select(names), **self._cut((slice(None), index)))

    def at(self, frames: slice) -> Views:
        """A window of frames."""
        bodies = None if self.bodies is None else replace(self.bodies, poses=self.bodies.poses[frames])
        return replace(self, cameras=self.cameras.at(frames), bodies=bodies, **self._cut((frames,)))

    def scaled_to(self, width: int, height: int) -> Views:
        """The same views in pictures of `width` x `height`: means over areas, and of depth, ids and confidence the nearest
        values, so that edges stay edges. Intrinsics follow, so another aspect is exact too."""
        if (width, height) == (self.cameras.width, self.cameras.height):
            return self
        size, shape = (height, width), self.images.shape[:2]
        pixels = self.images.flatten(0, 1).movedim(-1, 1)
        images = F.interpolate(pixels, size, mode="area").movedim(1, -1).view(*shape, *size, 3)
        maps = {name: getattr(self, name) for name in ("depth", "body_ids", "confidence")}
        scaled = {
            name: F.interpolate(value.double(), size, mode="nearest-exact").to(value.dtype)
            for name, value in maps.items()
            if value is not None
        }
        return replace(
            self, cameras=self.cameras.scaled_to(width, height), images=images.clamp(0, 1), **scaled
        )

    def _cut(self, index: tuple[Any, ...]) -> dict[str, Tensor]:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value[index] for name, value in tensors.items() if isinstance(value, Tensor)}

    def join(self, other: Views) -> Views:
        """The views of both, which show the same frames; depth and the like only where both have them."""
        if len(self) != len(other):
            raise ValueError(
                f"views: expected {len(self)} frames like the others, got {len(other)}; cut the longer one"
            )
        both = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        if (self.confidence is None) != (other.confidence is None):  # None counts in full
            first, second = (
                torch.ones_like(x.images[..., 0]) if x.confidence is None else x.confidence
                for x in (self, other)
            )
            both["confidence"] = (first, second)
        joined = {
            name: torch.cat(pair, 1)
            for name, pair in both.items()
            if all(isinstance(x, Tensor) for x in pair)
        }
        absent = {name: None for name in ("depth", "body_ids", "confidence") if name not in joined}
        return replace(self, cameras=join_cameras(self.cameras, other.cameras), **joined, **absent)

    @property
    def observed(self) -> Tensor:
        """Which pictures are real ones, bool ``[T, V]``."""
        assert self.provenance is not None
        return self.provenance == PROVENANCE_LEGEND.index("observed")


def join_cameras(first: Cameras, second: Cameras) -> Cameras:
    """Cameras of one size side by side; fixed ones stand still beside moving ones."""
    if (first.width, first.height) != (second.width, second.height):
        raise ValueError(
            f"cameras: expected pictures of {first.width} x {first.height} pixels, got {second.width} x {second.height}; "
            "use scaled_to"
        )
    frames = first.frames or second.frames
    parts = [_over(camera, frames) for camera in (first, second)]
    return replace(
        first,
        names=(*first.names, *second.names),
        intrinsics=np.concatenate([part[0] for part in parts], -3),
        camera_to_world=np.concatenate([part[1] for part in parts], -3),
    )


def _over(cameras: Cameras, frames: int | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Intrinsics and poses for every frame, where any camera moves at all."""
    arrays = (cameras.intrinsics, cameras.camera_to_world)
    if frames is None:
        return arrays
    return tuple(np.broadcast_to(a, (frames, *a.shape[-3:])) for a in arrays)  # type: ignore[return-value]
