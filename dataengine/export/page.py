"""One HTML file that plays a moving scene in a browser, from disk, with no server and no network.

The Gaussians lie in it as base64 of quantised numbers: what never moves once, rigid bodies as one pose a frame, and of
the rest the numbers that change. ``viewer.js`` decodes and draws them with WebGL 2; its header says in which conventions.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dataengine import rotations
from dataengine.cameras import Cameras
from dataengine.export.checks import check_finite
from dataengine.export.film import TRACKED, GaussianFilm, as_film
from dataengine.gaussians import Gaussians
from dataengine.storage import AnyPath, atomic_write

_BITS = {"means": 16, "scales": 16, "quats": 16, "colors": 8, "opacities": 8, "harmonics": 8}
_SMALLEST = -20.0  # logarithm of metres: what is smaller is drawn as a point anyway


def write_page(
    path: AnyPath,
    frames: GaussianFilm | Iterable[Gaussians],
    cameras: Cameras | None = None,
    fps: float | None = None,
    title: str = "4D scene",
    *,
    degree: int = 3,
) -> Path:
    """Write the page; ``page.html#camera=front&frame=3&background=black&bare`` opens it at a view without controls.

    Positions, sizes and rotations have 16 bits, each over the range of the scene (0.05 mm in 3 m); colours, opacities
    and harmonics have 8. The harmonics of a rigid body do not turn with it, as in ``dataengine.motion``.

    Args:
        path: of the HTML file.
        frames: a film, or the Gaussians of each frame.
        cameras: those to jump to, fixed or of T frames; by default those of the film.
        fps: frames per second; by default those of the film, or 10.
        title: plain text above the scene.
        degree: of the harmonics to keep at most; each coefficient is 3 bytes a Gaussian.

    Raises:
        ValueError: no frames, frames of different Gaussians, NaN or infinite numbers, a degree that is not 0 to 3.
        OSError: a full disk.
    """
    if degree not in (0, 1, 2, 3):
        raise ValueError(f"degree: expected 0, 1, 2 or 3, got {degree!r}")
    film = as_film(frames, fps, cameras)
    check_finite(film.canonical, "film")
    manifest, data = encode(film, min(degree, film.canonical.degree))
    folder = resources.files("dataengine.export")
    parts = {
        "title": html.escape(title),
        "manifest": json.dumps(manifest, separators=(",", ":")).replace("<", "\\u003c"),
        "data": base64.b64encode(data).decode(),
        "script": (folder / "viewer.js").read_text(encoding="utf-8"),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def encode(film: GaussianFilm, degree: int) -> tuple[dict[str, Any], bytes]:
    """What the viewer reads: a description, and the bytes at whose offsets the numbers lie (little-endian).

    Gaussians come in the order static, rigid, tracked. A number is low + raw / (2^bits - 1) (high - low). Of a channel
    `offset` leads to ``[N, width]`` at frame 0 and `track`, unless -1, to ``[T, L, width]`` of the last L Gaussians.
    """
    rank = torch.where(film.motion > 0, 1, torch.where(film.motion == TRACKED, 2, 0))
    order = rank.argsort(stable=True)
    still, rigid, loose = (int((rank == k).sum()) for k in range(3))
    canonical = film.canonical[order]
    data = bytearray()

    def put(array: NDArray[Any]) -> int:
        data.extend(bytes(-len(data) % 4))
        offset = len(data)
        data.extend(array.tobytes())
        return offset

    turns = rotations.from_matrix(film.poses[:, :, :3, :3])
    poses = torch.cat([turns, film.poses[:, :, :3, 3]], -1).numpy().astype("<f4")
    bodies = (film.motion[order][still : still + rigid] - 1).numpy().astype("<u2")
    pose_offset, body_offset = put(poses), put(bodies)
    base, tracks = _channels(canonical, degree), _tracks(film, degree)
    channels: dict[str, Any] = {}
    for name, values in base.items():
        low, high = _range(name, values, tracks.get(name))
        raw = _quantise(values, low, high, _BITS[name])
        channel = {"bits": _BITS[name], "width": values.shape[1], "low": low.tolist(), "high": high.tolist()}
        channels[name] = channel | {"offset": put(raw), "track": -1}
        if name in tracks:
            channels[name]["track"] = put(_quantise(tracks[name], low, high, _BITS[name]))
    centre, radius = _extent(film)
    manifest = {
        "version": 1, "count": len(canonical), "frames": len(film), "fps": film.fps, "degree": degree,
        "still": still, "rigid": rigid, "loose": loose, "bodies": film.poses.shape[1],
        "poseOffset": pose_offset, "bodyOffset": body_offset, "channels": channels,
        "centre": centre, "radius": radius, "up": _up(film.cameras), "cameras": _describe(film.cameras),
    }  # fmt: skip
    return manifest, bytes(data)


def _channels(gaussians: Gaussians, degree: int) -> dict[str, NDArray[np.float64]]:
    """What the viewer draws, float64 ``[N, width]`` by name; harmonics coefficient by coefficient, each r g b."""
    channels = {
        "means": gaussians.means,
        "scales": gaussians.scales.clamp_min(_SMALLEST),
        "quats": F.normalize(gaussians.quats.double(), dim=1),
        "colors": gaussians.colors,
        "opacities": gaussians.opacities.double().sigmoid()[:, None],
    }
    if degree:
        channels["harmonics"] = gaussians.harmonics[:, 1 : (degree + 1) ** 2].flatten(1)
    return {name: value.double().numpy() for name, value in channels.items()}


def _tracks(film: GaussianFilm, degree: int) -> dict[str, NDArray[np.float64]]:
    """Of what changes frame by frame, float64 ``[T, L, width]`` by name."""
    loose = film.motion == TRACKED
    names = {"colors" if name == "harmonics" else name for name in film.tracks}
    if "harmonics" in film.tracks and degree:
        names.add("harmonics")
    if not names or not loose.any():
        return {}
    start = film.canonical[loose]
    shots = [
        _channels(start.replace(**{name: track[t] for name, track in film.tracks.items()}), degree)
        for t in range(len(film))
    ]
    return {name: np.stack([shot[name] for shot in shots]) for name in names}


def _range(name: str, values: NDArray[Any], track: NDArray[Any] | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lowest and highest number of every column."""
    width = values.shape[1]
    if name == "quats":
        return np.full(width, -1.0), np.full(width, 1.0)
    rows = values if track is None else np.concatenate([values, track.reshape(-1, width)])
    if name == "opacities" or not rows.size:
        return np.zeros(width), np.ones(width)
    low, high = rows.min(0), rows.max(0)
    if name == "colors":
        return np.minimum(low, 0.0), np.maximum(high, 1.0)
    if name == "harmonics":  # the shader has one range for all
        return np.full(width, low.min()), np.full(width, high.max())
    return low, high


def _quantise(values: NDArray[Any], low: NDArray[Any], high: NDArray[Any], bits: int) -> NDArray[Any]:
    most = 2**bits - 1
    span = np.where(high > low, high - low, 1.0)
    return np.rint((values - low) / span * most).clip(0, most).astype("<u2" if bits == 16 else "u1")


def _extent(film: GaussianFilm) -> tuple[list[float], float]:
    """Centre and radius in metres of the box that holds nine tenths of the Gaussians along each axis."""
    means = film.canonical.means.double().numpy()
    if not len(means):
        return [0.0, 0.0, 0.0], 1.0
    low, high = np.quantile(means, (0.05, 0.95), axis=0)
    return (0.5 * (low + high)).tolist(), max(0.5 * float(np.linalg.norm(high - low)), 1e-3)


def _up(cameras: Cameras | None) -> list[float]:
    """The axis of the world that points up: the one the cameras agree on, or z."""
    up = np.array([0.0, 0.0, 1.0])
    if cameras is not None and len(cameras.names):
        tops = -cameras.camera_to_world[..., :3, 1].reshape(-1, 3).mean(0)
        axis = int(np.abs(tops).argmax())
        if abs(tops[axis]) > 0.3:
            up = np.zeros(3)
            up[axis] = np.sign(tops[axis])
    return up.tolist()


def _describe(cameras: Cameras | None) -> dict[str, Any] | None:
    """Poses row by row ``[T or 1, 12]`` and lenses fx fy cx cy ``[T or 1, 4]`` of every view."""
    if cameras is None or not cameras.names:
        return None
    poses = cameras.camera_to_world[..., :3, :].reshape(-1, len(cameras.names), 12)
    lenses = cameras.intrinsics.reshape(-1, len(cameras.names), 9)[..., [0, 4, 2, 5]]
    views = [
        {"name": name, "poses": poses[:, v].round(6).tolist(), "lenses": lenses[:, v].round(4).tolist()}
        for v, name in enumerate(cameras.names)
    ]
    return {"width": cameras.width, "height": cameras.height, "frames": cameras.frames or 1, "views": views}
