"""Picture files of a capture: colour, depth, masks and ids, read and written by OpenCV; lens distortion taken out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dataengine.lerobot.pictures import decode_ids, encode_ids
from dataengine.storage import atomic_write

MILLIMETRES = 1e-3
SUFFIXES = (".png", ".jpg", ".jpeg", ".JPG", ".webp")


def find_picture(path: Path) -> Path:
    """`path`, with a suffix looked for where it has none; FileNotFoundError in one sentence."""
    tries = [path] if path.suffix else []
    tries += [path.with_name(path.name + suffix) for suffix in SUFFIXES]
    for candidate in tries:
        if os.path.isfile(
            candidate
        ):  # unlike Path.is_file, without an error for a name that no file can have
            return candidate
    raise FileNotFoundError(
        f"{path}: expected a picture that the capture names, found none; copy it there or correct the name"
    )


def read_image(path: Path) -> NDArray[np.float32]:
    """RGB in [0, 1], ``[H, W, 3]``; transparent pixels lie on white, as in the synthetic NeRF scenes."""
    raw = _read(path)
    top = {"uint8": 255.0, "uint16": 65535.0}.get(str(raw.dtype))
    if top is None:
        raise ValueError(f"{path}: expected a picture of 8 or 16 bits, got {raw.dtype}; convert it to png")
    if raw.ndim == 2:
        raw = np.repeat(raw[..., None], 3, -1)
    image = raw.astype(np.float32) / top
    if image.shape[-1] == 4:
        image = image[..., :3] * image[..., 3:] + (1 - image[..., 3:])
    return np.ascontiguousarray(image[..., ::-1])


def read_depth(path: Path, scale: float | None = None) -> NDArray[np.float32]:
    """Metres ``[H, W]``, 0 where not known. Integers count millimetres and floats (.npy, .tiff) metres unless `scale`,
    metres per stored unit, says otherwise."""
    if path.suffix == ".npy":
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected a depth map that the capture names, found none; copy it there"
            )
        raw = _load(path)
    else:
        raw = _read(path)
    if raw.ndim != 2 or raw.dtype == np.uint8 or raw.dtype.kind not in "iuf":
        raise ValueError(
            f"{path}: expected depth as one channel of 16-bit integers or floats, got {raw.dtype} {list(raw.shape)}; a "
            "picture for the eye holds no depth"
        )
    scale = scale or (MILLIMETRES if np.issubdtype(raw.dtype, np.integer) else 1.0)
    metres = raw.astype(np.float32) * np.float32(scale)
    return np.where(np.isfinite(metres) & (metres > 0), metres, np.float32(0))


def _load(path: Path) -> NDArray[Any]:
    """The array in a .npy file without axes of length 1."""
    try:
        return np.squeeze(np.lib.format.open_memmap(path, mode="r"))
    except (ValueError, EOFError, TypeError, SyntaxError) as error:
        raise ValueError(
            f"{path}: expected an array that numpy saved, got a file that cannot be read ({error}); write it again"
        ) from None


def read_mask(path: Path) -> NDArray[np.float32]:
    """What a pixel counts, in [0, 1], ``[H, W]``: black is left out."""
    raw = _read(path)
    raw = raw[..., 0] if raw.ndim == 3 else raw
    if raw.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected a mask of 8 or 16 bits, got {raw.dtype}; convert it to png")
    return raw.astype(np.float32) / (1.0 if raw.max() <= 1 else np.iinfo(raw.dtype).max)


def read_ids(path: Path) -> NDArray[np.int32]:
    """Ids ``[H, W]`` as :func:`write_ids` wrote them."""
    path = find_picture(path)
    if _read(path).ndim != 2:
        raise ValueError(f"{path}: expected ids as one channel, got a picture in colour; write 16-bit png")
    return decode_ids(path.read_bytes())


def _read(path: Path) -> NDArray[Any]:
    path = find_picture(path)
    raw = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if raw is None:
        raise ValueError(
            f"{path}: expected a picture, got a file that OpenCV cannot decode; copy it again or convert it"
        )
    return raw


def write_image(path: Path, image: NDArray[Any]) -> None:
    """RGB in [0, 1], ``[H, W, 3]``, as 8-bit png."""
    _write(path, np.rint(np.asarray(image)[..., ::-1] * 255).astype(np.uint8))


def write_depth(path: Path, depth: NDArray[Any]) -> None:
    """Metres ``[H, W]`` as 16-bit png in millimetres; beyond 65.5 m counts as not known."""
    codes = np.rint(np.asarray(depth, np.float64) / MILLIMETRES)
    _write(path, np.where(codes > 65535, 0, codes).astype(np.uint16))


def write_mask(path: Path, mask: NDArray[Any]) -> None:
    """What pixels count, ``[H, W]`` in [0, 1], as 8-bit png."""
    _write(path, np.rint(np.asarray(mask) * 255).astype(np.uint8))


def write_ids(path: Path, ids: NDArray[Any]) -> None:
    """Ids from -1 to 65534, ``[H, W]``, as 16-bit png."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(encode_ids(ids))


def _write(path: Path, pixels: NDArray[Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def undistortion(
    intrinsics: NDArray[Any], distortion: tuple[float, ...], size: tuple[int, int]
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """OpenCV's maps from a picture without distortion, of the same intrinsics, into the distorted one.

    Args:
        intrinsics: ``[3, 3]`` pixels, centres at +0.5.
        distortion: k1, k2, p1, p2 and perhaps k3.
        size: (width, height).

    Returns:
        None where all coefficients are 0.
    """
    if not any(distortion):
        return None
    matrix = np.array(intrinsics, np.float64)
    matrix[:2, 2] -= 0.5  # OpenCV counts from the centre of the first pixel
    return cv2.initUndistortRectifyMap(matrix, np.array(distortion), np.eye(3), matrix, size, cv2.CV_32FC1)


def remap(pixels: NDArray[Any], maps: tuple[NDArray[Any], NDArray[Any]], *, smooth: bool) -> NDArray[Any]:
    """A picture without distortion; outside the old one is 0."""
    mode = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST
    return cv2.remap(pixels, maps[0], maps[1], mode, borderMode=cv2.BORDER_CONSTANT)
