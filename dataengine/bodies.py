"""Poses of rigid bodies over the frames of an episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataengine.cameras import check_rigid
from dataengine.errors import closest

POSE = ("x", "y", "z", "qw", "qx", "qy", "qz")
"""The numbers of a pose: metres in the world, then the quaternion."""

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Bodies:
    """n rigid bodies over T frames. In pictures of ids, body i is id 1 + i and 0 is the background.

    Attributes:
        names: n distinct names.
        poses: ``[T, n, 4, 4]`` float64, body to world, rigid, metres.

    Raises:
        ValueError: no or repeated names, a shape, a non-finite number, a pose that is not rigid.
    """

    names: tuple[str, ...]
    poses: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(str(n) for n in self.names))
        object.__setattr__(self, "poses", np.array(self.poses, dtype=np.float64))
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"names: expected at least one name and no name twice, got {list(self.names)}")
        if self.poses.ndim != 4 or self.poses.shape[1:] != (len(self.names), 4, 4):
            raise ValueError(
                f"poses: expected [T, {len(self.names)}, 4, 4], got {list(self.poses.shape)}; give one matrix per "
                "frame and body"
            )
        check_rigid(self.poses, "poses")

    @classmethod
    def from_vectors(cls, names: Sequence[str], vectors: NDArray[Any]) -> Bodies:
        """Bodies from ``[T, n, 7]`` or ``[T, 7 * n]`` numbers: x y z in metres, then the quaternion wxyz."""
        values = np.asarray(vectors, dtype=np.float64)
        if values.shape[1:] not in ((len(names), 7), (7 * len(names),)):
            raise ValueError(
                f"vectors: expected [T, {len(names)}, 7], got {list(values.shape)}; give 7 numbers per frame and body"
            )
        values = values.reshape(len(values), len(names), 7)
        poses = np.zeros((*values.shape[:2], 4, 4))
        poses[..., :3, :3] = quaternion_to_rotation(values[..., 3:])
        poses[..., :3, 3] = values[..., :3]
        poses[..., 3, 3] = 1.0
        return cls(tuple(names), poses)

    def __len__(self) -> int:
        return len(self.poses)

    def at(self, frames: slice) -> Bodies:
        """The bodies over a slice of frames."""
        return replace(self, poses=self.poses[frames])

    def select(self, names: Sequence[str]) -> Bodies:
        """The named bodies, in the order given; an unknown name is a ``ValueError`` that names the closest."""
        for name in names:
            if name not in self.names:
                raise ValueError(
                    f"names: expected some of these bodies, got {name!r}; {closest(name, self.names)}"
                )
        return replace(self, names=tuple(names), poses=self.poses[:, [self.names.index(n) for n in names]])

    def motion(self, source: int, target: int) -> Array:
        """Rigid motions ``[n + 1, 4, 4]`` by id that take points of frame ``source`` to frame ``target``; of id 0, the
        background, the identity.
        """
        rotation, position = self.poses[source, :, :3, :3], self.poses[source, :, :3, 3]
        inverse = np.tile(np.eye(4), (len(self.names), 1, 1))
        inverse[:, :3, :3] = np.swapaxes(rotation, -1, -2)
        inverse[:, :3, 3] = -np.einsum("nji,nj->ni", rotation, position)
        return np.concatenate([np.eye(4)[None], self.poses[target] @ inverse])

    def move(self, points: NDArray[Any], ids: NDArray[Any], source: int, target: int) -> Array:
        """World points ``[..., 3]`` of the bodies ``ids [...]`` at frame ``source``, where they are at ``target``."""
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() <= len(self.names):
            raise ValueError(f"ids: expected 0 to {len(self.names)}, got {ids.min()} to {ids.max()}")
        motion = self.motion(source, target)[ids]
        return np.einsum("...ij,...j->...i", motion[..., :3, :3], points) + motion[..., :3, 3]


def quaternion_to_rotation(quaternion: NDArray[Any]) -> Array:
    """Quaternions wxyz ``[..., 4]`` of any length but 0 to rotation matrices ``[..., 3, 3]``."""
    values = np.asarray(quaternion, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        w, x, y, z = np.moveaxis(values / np.linalg.norm(values, axis=-1, keepdims=True), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
