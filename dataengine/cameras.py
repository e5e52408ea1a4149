"""Calibrated pinhole cameras of one moment or of a whole episode.

Convention, everywhere in the project: OpenCV axes (x right, y down, z forward), ``camera_to_world`` rigid
and in metres, intrinsics in pixels with pixel centres at +0.5 (the centre of the top-left pixel is
(0.5, 0.5)), so that resizing an image scales the intrinsics and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataengine.errors import closest

RIGID_TOLERANCE = 1e-4  # float32 storage of a rotation keeps its products within about 1e-6

Array = NDArray[np.float64]


def check_rigid(matrix: NDArray[Any], argument: str) -> None:
    """Raise ``ValueError`` unless every ``[..., 4, 4]`` matrix is finite and rigid (rotation det +1)."""
    matrix = np.asarray(matrix, dtype=np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(
            f"{argument}: expected finite numbers, got NaN or infinity; check where the pose comes from"
        )
    if not np.allclose(matrix[..., 3, :], (0.0, 0.0, 0.0, 1.0), atol=RIGID_TOLERANCE):
        row = matrix[..., 3, :].reshape(-1, 4)[0].tolist()
        raise ValueError(f"{argument}: expected a last row of 0 0 0 1, got {row}; is the matrix transposed?")
    rotation = matrix[..., :3, :3]
    error = np.abs(rotation @ np.swapaxes(rotation, -1, -2) - np.eye(3)).max(initial=0.0)
    if error > RIGID_TOLERANCE:
        raise ValueError(
            f"{argument}: expected an orthonormal rotation, got R R^T off by {error:.2g}; remove scale and "
            "shear"
        )
    if (np.linalg.det(rotation) < 0).any():
        raise ValueError(
            f"{argument}: expected a right-handed rotation (det +1), got a left-handed one (det -1); flip "
            "one axis back"
        )


def check_intrinsics(matrix: NDArray[Any], argument: str) -> None:
    """Raise ``ValueError`` unless every ``[..., 3, 3]`` matrix is a finite pinhole matrix without skew."""
    matrix = np.asarray(matrix, dtype=np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{argument}: expected finite numbers, got NaN or infinity; check the calibration")
    zeros = matrix[..., (0, 1, 2, 2), (1, 0, 0, 1)]
    if np.abs(zeros).max(initial=0.0) > 0 or not np.allclose(matrix[..., 2, 2], 1.0):
        first = matrix.reshape(-1, 3, 3)[0].tolist()
        raise ValueError(f"{argument}: expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels, got {first}")
    if (matrix[..., (0, 1), (0, 1)] <= 0).any():
        raise ValueError(
            f"{argument}: expected positive focal lengths in pixels, got {matrix[..., 0, 0].min():.4g}"
        )


@dataclass(frozen=True, eq=False)
class Cameras:
    """V cameras, fixed (``[V, ...]``) or over T frames (``[T, V, ...]``).

    Attributes:
        names: V distinct view names.
        intrinsics: ``[V, 3, 3]`` or ``[T, V, 3, 3]``, pixels, centres at +0.5.
        camera_to_world: ``[V, 4, 4]`` or ``[T, V, 4, 4]``, OpenCV axes, metres.
        width, height: image size in pixels, the same for all views.

    Raises:
        ValueError: a shape, a non-finite number, a non-rigid or left-handed pose, a malformed intrinsic
            matrix.
    """

    names: tuple[str, ...]
    intrinsics: Array
    camera_to_world: Array
    width: int
    height: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(str(n) for n in self.names))
        object.__setattr__(self, "intrinsics", np.array(self.intrinsics, dtype=np.float64))
        object.__setattr__(self, "camera_to_world", np.array(self.camera_to_world, dtype=np.float64))
        self._check_shapes()
        check_intrinsics(self.intrinsics, "intrinsics")
        check_rigid(self.camera_to_world, "camera_to_world")

    def _check_shapes(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names: expected distinct view names, got {list(self.names)}")
        for name in self.names:  # they become names of files and folders
            if name in ("", ".", "..") or set(name) & set("/\\\0"):
                raise ValueError(
                    f"names: expected view names without / and \\, got {name!r}; rename the view"
                )
        for argument, array, side in (
            ("intrinsics", self.intrinsics, 3),
            ("camera_to_world", self.camera_to_world, 4),
        ):
            tail = (len(self.names), side, side)
            if array.ndim not in (3, 4) or array.shape[-3:] != tail:
                raise ValueError(
                    f"{argument}: expected shape {list(tail)} or [T, {tail[0]}, {side}, {side}], got "
                    f"{list(array.shape)}"
                )
        if self.intrinsics.ndim == self.camera_to_world.ndim == 4 and len(self.intrinsics) != len(
            self.camera_to_world
        ):
            raise ValueError(
                f"intrinsics: expected {len(self.camera_to_world)} frames like camera_to_world, got "
                f"{len(self.intrinsics)}"
            )
        if self.width < 1 or self.height < 1:
            raise ValueError(f"width, height: expected at least 1 pixel, got {self.width} x {self.height}")

    @property
    def frames(self) -> int | None:
        """Number of frames T, or None for cameras that stand still."""
        moving = [a for a in (self.intrinsics, self.camera_to_world) if a.ndim == 4]
        return len(moving[0]) if moving else None

    @property
    def world_to_camera(self) -> Array:
        """Inverse of ``camera_to_world``, same shape (exact for rigid transforms)."""
        rotation = np.swapaxes(self.camera_to_world[..., :3, :3], -1, -2)
        inverse = np.zeros_like(self.camera_to_world)
        inverse[..., :3, :3] = rotation
        inverse[..., :3, 3] = -np.einsum("...ij,...j->...i", rotation, self.camera_to_world[..., :3, 3])
        inverse[..., 3, 3] = 1.0
        return inverse

    def select(self, names: Sequence[str]) -> Cameras:
        """The named views, in the order given; an unknown name is a ``ValueError`` that names the closest."""
        index = [self._position(name) for name in names]
        return replace(
            self,
            names=tuple(names),
            intrinsics=self.intrinsics[..., index, :, :],
            camera_to_world=self.camera_to_world[..., index, :, :],
        )

    def _position(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(
                f"names: expected views of these cameras, got {name!r}; {closest(name, self.names)}"
            )
        return self.names.index(name)

    def at(self, frame: int | slice) -> Cameras:
        """The cameras of one frame (``[V, ...]``) or of a slice of frames; fixed cameras stay as they are."""
        parts = {k: a[frame] if a.ndim == 4 else a for k, a in self._arrays().items()}
        return replace(self, **parts)

    def _arrays(self) -> dict[str, Array]:
        return {"intrinsics": self.intrinsics, "camera_to_world": self.camera_to_world}

    def scaled_to(self, width: int, height: int) -> Cameras:
        """The same cameras for images resized to ``width x height``; exact, as pixel centres lie at +0.5."""
        scale = np.array([[width / self.width], [height / self.height], [1.0]])
        return replace(self, intrinsics=self.intrinsics * scale, width=width, height=height)

    def project(self, points: NDArray[Any]) -> tuple[Array, Array]:
        """World points to pixels.

        Args:
            points: ``[N, 3]`` metres in the world, seen by every camera.

        Returns:
            pixels ``[(T,) V, N, 2]`` and depth along the optical axis ``[(T,) V, N]`` in metres. Points with
            depth <= 0 lie behind the camera and their pixels mean nothing.
        """
        points = np.asarray(points, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 3:
            raise ValueError(f"points: expected [N, 3] metres in the world, got {list(points.shape)}")
        view = self.world_to_camera
        local = np.einsum("...ij,nj->...ni", view[..., :3, :3], points) + view[..., None, :3, 3]
        depth = local[..., 2]
        with np.errstate(divide="ignore", invalid="ignore"):
            rays = local / depth[..., None]
        pixels = np.einsum("...ij,...nj->...ni", self.intrinsics[..., :2, :], rays)
        return pixels, depth

    def unproject(self, depth: NDArray[Any]) -> Array:
        """Depth maps ``[(T,) V, height, width]``, metres along the axis, to world points ``[..., 3]``.

        The point of pixel (row, column) lies on the ray through its centre (column + 0.5, row + 0.5).
        """
        depth = np.asarray(depth, dtype=np.float64)
        tail = (len(self.names), self.height, self.width)
        if depth.shape[-3:] != tail:
            raise ValueError(
                f"depth: expected [..., {tail[0]}, {tail[1]}, {tail[2]}] metres, got {list(depth.shape)}"
            )
        column, row = np.arange(self.width) + 0.5, np.arange(self.height) + 0.5
        focal = self.intrinsics[..., (0, 1), (0, 1)][..., None, None, :]
        centre = self.intrinsics[..., :2, 2][..., None, None, :]
        grid = np.stack(np.meshgrid(column, row), axis=-1)
        rays = (grid - centre) / focal
        local = np.concatenate([rays, np.ones_like(rays[..., :1])], axis=-1) * depth[..., None]
        pose = self.camera_to_world
        return np.einsum("...ij,...hwj->...hwi", pose[..., :3, :3], local) + pose[..., None, None, :3, 3]

    def to_json(self) -> str:
        """One JSON object with the five fields; numbers are exact (float64 repr)."""
        return json.dumps({f.name: _plain(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Cameras:
        """Inverse of :meth:`to_json`; an unknown or missing key is a ``ValueError`` that names it."""
        values = json.loads(text)
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"cameras json: unknown key {key!r}; {closest(key, known)}")
        missing = [k for k in known if k not in values]
        if missing:
            raise ValueError(f"cameras json: expected the keys {known}, missing {missing}")
        return cls(**values)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
