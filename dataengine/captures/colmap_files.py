"""COLMAP's three model files, ``cameras``, ``images`` and ``points3D``, as text or binary.

Source: colmap.github.io/format.html. Poses are world to camera, quaternions have the scalar first, pixels count from the
corner of the first one; binary numbers are little endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataengine.captures.geometry import FAR

MODELS = {  # name -> (number in binary files, count of parameters)
    "SIMPLE_PINHOLE": (0, 3),
    "PINHOLE": (1, 4),
    "SIMPLE_RADIAL": (2, 4),
    "RADIAL": (3, 5),
    "OPENCV": (4, 8),
    "OPENCV_FISHEYE": (5, 8),
    "FULL_OPENCV": (6, 12),
    "FOV": (7, 5),
    "SIMPLE_RADIAL_FISHEYE": (8, 4),
    "RADIAL_FISHEYE": (9, 5),
    "THIN_PRISM_FISHEYE": (10, 12),
    "RAD_TAN_THIN_PRISM_FISHEYE": (11, 16),
}
READABLE = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV")


@dataclass(frozen=True, kw_only=True)
class Lens:
    """One camera of a model: intrinsics ``[3, 3]`` in pixels, size (width, height), distortion k1, k2, p1, p2."""

    intrinsics: NDArray[np.float64]
    size: tuple[int, int]
    distortion: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Image:
    """One registered picture: its name, its lens and its world-to-camera matrix ``[4, 4]``."""

    name: str
    camera: int
    pose: NDArray[np.float64]


def make_lens(path: Path, model: str, size: tuple[int, int], parameters: list[float]) -> Lens:
    """A lens from a COLMAP model's parameters; ValueError for models beyond radial and tangential distortion, and for
    numbers that no lens has."""
    if model not in READABLE or len(parameters) != MODELS[model][1]:
        raise ValueError(
            f"{path}: expected a camera model among {', '.join(READABLE)}, got {model} with {len(parameters)} parameters; "
            "run colmap image_undistorter and read its output"
        )
    single = model in ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
    focal, rest = (parameters[:1] * 2, parameters[1:]) if single else (parameters[:2], parameters[2:])
    if not all(abs(number) < FAR for number in (*parameters, *size)) or min(focal) < 1 / FAR or min(size) < 1:
        raise ValueError(
            f"{path}: expected pictures of at least 1 pixel, focal lengths above 0 and finite numbers, got {model} of "
            f"{size[0]} x {size[1]} with {parameters}; reconstruct again"
        )
    intrinsics = np.array([[focal[0], 0, rest[0]], [0, focal[1], rest[1]], [0, 0, 1]])
    distortion = (*rest[2:], 0.0, 0.0, 0.0)[:4] if len(rest) > 2 else ()
    return Lens(intrinsics=intrinsics, size=size, distortion=distortion)


def make_image(path: Path, name: str, camera: int, pose: Sequence[float]) -> Image:
    """A registered picture from quaternion wxyz and translation; ValueError for numbers that no pose has."""
    sound = len(pose) == 7 and all(abs(number) < FAR for number in pose) and any(pose[:4])
    if not sound or not name.isprintable():
        raise ValueError(
            f"{path}: expected a quaternion that is not 0, a translation and a name, got {list(pose)} of {name!r}; "
            "reconstruct again or leave this picture out"
        )
    return Image(name=name, camera=camera, pose=pose_matrix(pose[:4], pose[4:]))


def pose_matrix(quaternion: Any, translation: Any) -> NDArray[np.float64]:
    """``[4, 4]`` from a quaternion wxyz of any length and a translation."""
    w, x, y, z = np.asarray(quaternion, np.float64) / max(np.linalg.norm(quaternion), 1e-300)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = translation
    return matrix


def quaternion(rotation: NDArray[Any]) -> NDArray[np.float64]:
    """The quaternion wxyz, w >= 0, of a rotation ``[3, 3]``: the largest eigenvector of Bar-Itzhack's matrix, which is
    exact for every angle."""
    r = np.asarray(rotation, np.float64)
    k = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0], r[2, 1] - r[1, 2]],
            [r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], r[1, 2] + r[2, 1], r[0, 2] - r[2, 0]],
            [r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1], r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], np.trace(r)],
        ]
    )
    x, y, z, w = np.linalg.eigh(k)[1][:, -1]
    return np.array([w, x, y, z]) * (-1 if w < 0 else 1)


def find_model(folder: Path) -> tuple[Path, str]:
    """Where the model lies in `folder`, itself, ``sparse/0`` or ``sparse``, and its suffix."""
    for place in (folder, folder / "sparse" / "0", folder / "sparse"):
        for suffix in (".bin", ".txt"):
            if (place / f"cameras{suffix}").is_file() and (place / f"images{suffix}").is_file():
                return place, suffix
    raise FileNotFoundError(
        f"{folder}: expected cameras and images as .bin or .txt here, in sparse/0 or in sparse, found none; check the path"
    )


def read_model(
    place: Path, suffix: str
) -> tuple[dict[int, Lens], list[Image], NDArray[np.float64], NDArray[np.uint8]]:
    """Lenses by number, images by name, points ``[N, 3]`` and their colours ``[N, 3]``; ValueError where cut off."""
    readers = _BINARY if suffix == ".bin" else _TEXT
    results = []
    for kind, reader in zip(("cameras", "images", "points3D"), readers, strict=True):
        path = place / f"{kind}{suffix}"
        if kind == "points3D" and not path.is_file():
            results.append((np.zeros((0, 3)), np.zeros((0, 3), np.uint8)))
            continue
        try:
            results.append(reader(path))
        except (struct.error, IndexError, OverflowError, ValueError) as error:
            if str(error).startswith(str(path)):
                raise
            raise ValueError(
                f"{path}: expected a whole COLMAP file, got one that cannot be read ({error}); copy it again"
            ) from None
    lenses, images, (points, colors) = results
    for image in images:
        if image.camera not in lenses:
            raise ValueError(
                f"{image.name}: expected a camera among {sorted(lenses)}, got {image.camera}; take cameras and "
                "images of one model"
            )
    return lenses, sorted(images, key=lambda image: image.name), points, colors


class _Bytes:
    """Numbers one after the other out of a binary file."""

    def __init__(self, path: Path):
        self.data, self.at = path.read_bytes(), 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def word(self) -> str:
        end = self.data.index(b"\0", self.at) if b"\0" in self.data[self.at :] else len(self.data)
        text, self.at = self.data[self.at : end].decode(), end + 1
        return text

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise IndexError(f"{self.at - len(self.data)} bytes are missing")


def _binary_cameras(path: Path) -> dict[int, Lens]:
    file = _Bytes(path)
    numbers = {number: name for name, (number, _) in MODELS.items()}
    lenses = {}
    for _ in range(file.take("Q")[0]):
        camera, model, width, height = file.take("iiQQ")
        name = numbers.get(model, f"number {model}")
        count = MODELS[name][1] if name in MODELS else 0
        lenses[camera] = make_lens(path, name, (width, height), list(file.take(f"{count}d")))
    return lenses


def _binary_images(path: Path) -> list[Image]:
    file = _Bytes(path)
    images = []
    for _ in range(file.take("Q")[0]):
        _, *pose, camera = file.take("i7di")
        name = file.word()
        file.skip(24 * file.take("Q")[0])
        images.append(make_image(path, name, camera, pose))
    return images


def _binary_points(path: Path) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    file = _Bytes(path)
    count = file.take("Q")[0]
    points = []
    for _ in range(count):
        _, x, y, z, r, g, b, _, track = file.take("Q3d3BdQ")
        file.skip(8 * track)
        points.append((x, y, z, r, g, b))
    return _cloud(path, points)


def _cloud(path: Path, rows: Sequence[Sequence[float]]) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Points and their colours from rows of six numbers each."""
    short = [n for n, row in enumerate(rows) if len(row) != 6]
    values = np.reshape(np.array([] if short else rows, np.float64), (-1, 6))
    colors = values[:, 3:]
    wrong = short or np.flatnonzero(~(np.abs(values) < FAR).all(1) | ((colors < 0) | (colors > 255)).any(1))
    if len(wrong):
        raise ValueError(
            f"{path}: expected three finite numbers and three bytes as point {wrong[0]}, got {list(rows[wrong[0]])}; copy "
            "the file again"
        )
    return values[:, :3], values[:, 3:].astype(np.uint8)


def _lines(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield line.strip()


def _floats(path: Path, words: list[str]) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(
            f"{path}: expected numbers, got {' '.join(words)[:60]!r}; copy the file again"
        ) from None


def _text_cameras(path: Path) -> dict[int, Lens]:
    lenses = {}
    for line in filter(None, _lines(path)):
        number, model, width, height, *rest = line.split()
        size = (int(width), int(height))
        lenses[int(number)] = make_lens(path, model, size, _floats(path, rest))
    return lenses


def _text_images(path: Path) -> list[Image]:
    lines = list(_lines(path))
    images, n = [], 0
    while n < len(lines):
        if not lines[n]:
            n += 1
            continue
        words = lines[n].split(maxsplit=9)
        pose = _floats(path, words[1:8])
        images.append(make_image(path, words[9], int(words[8]), pose))
        n += 2  # the second line holds the image's keypoints, and may be empty
    return images


def _text_points(path: Path) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    return _cloud(path, [_floats(path, line.split()[1:7]) for line in filter(None, _lines(path))])


_BINARY: tuple[Any, ...] = (_binary_cameras, _binary_images, _binary_points)
_TEXT: tuple[Any, ...] = (_text_cameras, _text_images, _text_points)


def model_text(
    lenses: Mapping[int, tuple[NDArray[Any], tuple[int, int]]],
    images: Mapping[str, tuple[int, NDArray[Any]]],
    points: NDArray[Any],
    colors: NDArray[Any],
) -> dict[str, str]:
    """The three files as text: PINHOLE cameras, images without keypoints, points without tracks.

    Args:
        lenses: number -> intrinsics ``[3, 3]`` and size (width, height).
        images: name -> number of the lens and world-to-camera ``[4, 4]``.
        points, colors: ``[N, 3]`` metres and bytes.
    """
    cameras = ["# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]"]
    for number, (matrix, size) in lenses.items():
        values = (matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2])
        cameras.append(f"{number} PINHOLE {size[0]} {size[1]} {_words(values)}")
    pictures = [
        "# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME",
        "# POINTS2D[] as (X, Y, POINT3D_ID)",
    ]
    for n, (name, (number, pose)) in enumerate(images.items(), 1):
        pictures += [f"{n} {_words([*quaternion(pose[:3, :3]), *pose[:3, 3]])} {number} {name}", ""]
    rows = ["# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)"]
    for n, (point, color) in enumerate(zip(points, colors, strict=True), 1):
        rows.append(f"{n} {_words(point)} {' '.join(str(int(c)) for c in color)} 0")
    texts = {"cameras": cameras, "images": pictures, "points3D": rows}
    return {f"{name}.txt": "\n".join(lines) + "\n" for name, lines in texts.items()}


def _words(values: Any) -> str:
    return " ".join(repr(float(value)) for value in values)
