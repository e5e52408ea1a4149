"""PLY files of Gaussians, in the layout of 3D Gaussian Splatting, one file or one a frame.

Layout of the reference implementation of Kerbl et al. 2023 (arXiv 2308.04079), which SuperSplat, gsplat's viewer and
many others read: position, normals (unused), f_dc_0..2, f_rest_* (channel by channel), opacity as a logit, scale_* as
logarithms, rot_0..3 wxyz.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataengine.export.checks import check_finite, remove_other_frames
from dataengine.gaussians import Gaussians
from dataengine.storage import AnyPath, atomic_write, read_json, write_json

log = logging.getLogger(__name__)

PLAYLIST, PLAYLIST_FORMAT = "playlist.json", "gaussians ply sequence"
_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4", "double": "f8",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4", "float32": "f4",
    "float64": "f8",
}  # fmt: skip
_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_PLACE = ("x", "y", "z")
_SHAPE = ("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")
_BASE = ("f_dc_0", "f_dc_1", "f_dc_2")
_COLORS = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))
_LONGEST_HEADER = 1 << 20  # bytes


def write_ply(path: AnyPath, gaussians: Gaussians, *, body: bool = False) -> Path:
    """Write one binary little-endian file of float32 numbers; ``read_ply`` gives the same float32 back.

    Args:
        path: of the file; folders above it are made.
        gaussians: N of any degree.
        body: add the property `body`. Most viewers pass over it, but some expect exactly the usual ones.

    Raises:
        ValueError: NaN or infinite numbers. OSError: a full disk.
    """
    gaussians = check_finite(gaussians, "gaussians")
    n, rest = len(gaussians), 3 * (gaussians.harmonics.shape[1] - 1)
    columns = {
        _PLACE: gaussians.means,
        ("nx", "ny", "nz"): torch.zeros(n, 3),
        _BASE: gaussians.harmonics[:, 0],
        tuple(f"f_rest_{i}" for i in range(rest)): gaussians.harmonics[:, 1:].mT.reshape(n, rest),
        ("opacity",): gaussians.opacities[:, None],
        _SHAPE[1:4]: gaussians.scales,
        _SHAPE[4:]: gaussians.quats,
    }
    if body:
        columns["body",] = gaussians.body[:, None]
    names = [name for group in columns for name in group]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {n}"]
    header += [*(f"property float {name}" for name in names), "end_header\n"]
    table = torch.cat([column.float() for column in columns.values()], 1).numpy().astype("<f4", copy=False)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write("\n".join(header).encode())
        file.write(table.tobytes())
    return Path(path)


def read_ply(path: AnyPath, *, size: float | None = None) -> Gaussians:
    """Read Gaussians, or a plain coloured point cloud, from a PLY file of any origin, as float32.

    Text and both byte orders are read; normals, other properties and other elements are passed over; without f_rest_*
    the degree is 0; without the property `body` everything is static. A cloud of x y z red green blue becomes round
    Gaussians, which is logged as a warning.

    Args:
        path: of the file.
        size: standard deviation of a point in metres; by default half the distance to its neighbours.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no PLY file, a part of one, missing properties (named), NaN or infinite numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a PLY file, found none; check the path")
    content = path.read_bytes()
    vertices = _read_vertices(path, content)
    return _gaussians(path, vertices) if _is_splat(path, vertices) else _points(path, vertices, size)


def write_ply_sequence(folder: AnyPath, frames: Iterable[Gaussians], *, fps: float = 10.0) -> list[Path]:
    """Write frame_0000.ply and so on and, last, playlist.json with `fps` and their names; return the files.

    Frames of an earlier, longer sequence in the same folder are removed, whether it was finished or not, as viewers play
    every file they find.
    Raises ValueError as ``write_ply`` and where there are no frames, OSError on a full disk.
    """
    folder = Path(folder)
    check_fps(fps)
    paths = [
        write_ply(folder / f"frame_{t:04d}.ply", frame, body=bool(frame.body.any()))
        for t, frame in enumerate(frames)
    ]
    if not paths:
        raise ValueError("frames: expected at least one frame of Gaussians, got none")
    names = [path.name for path in paths]
    playlist = {"format": PLAYLIST_FORMAT, "version": 1, "fps": fps, "frames": names}
    write_json(folder / PLAYLIST, playlist)
    remove_other_frames(paths)
    return [*paths, folder / PLAYLIST]


def read_ply_sequence(folder: AnyPath) -> tuple[list[Gaussians], float]:
    """The frames of a folder and their rate in frames per second.

    Without a playlist: every .ply file in the order of the numbers in their names, at 10 frames per second. Raises
    FileNotFoundError where there is none, ValueError for a playlist or a file that cannot be read.
    """
    folder = Path(folder)
    if (folder / PLAYLIST).is_file():
        names, fps = _listed(folder), float(read_json(folder / PLAYLIST)["fps"])
    else:
        names, fps = sorted((path.name for path in folder.glob("*.ply")), key=_natural), 10.0
    if not names:
        raise FileNotFoundError(f"{folder}: expected {PLAYLIST} or .ply files, found none; check the path")
    return [read_ply(folder / name) for name in names], fps


def check_fps(fps: Any) -> None:
    """Raise ValueError unless `fps` is a finite number above 0."""
    if not (isinstance(fps, (int, float)) and math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps: expected frames per second above 0, got {fps!r}")


def _listed(folder: Path) -> list[str]:
    """The checked file names of a playlist."""
    path = folder / PLAYLIST
    playlist = read_json(path)
    if not isinstance(playlist, dict) or playlist.get("format") != PLAYLIST_FORMAT:
        raise ValueError(f"{path}: expected a playlist of format {PLAYLIST_FORMAT!r}, got another; remove it")
    listed = playlist.get("frames")
    names: list[Any] = listed if isinstance(listed, list) else [None]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.ply", name, re.IGNORECASE):
            raise ValueError(
                f"{path}: expected frames, a list of .ply files in this folder, got {name!r}; write it again"
            )
    try:
        check_fps(playlist.get("fps"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; write it again") from None
    return names


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


@dataclass(kw_only=True)
class _Element:
    """One element of a header: its rows and the numpy types of their scalars; a list has the type ''."""

    name: str
    count: int
    types: dict[str, str] = field(default_factory=dict)


def _read_vertices(path: Path, content: bytes) -> dict[str, NDArray[Any]]:
    """The columns ``[N]`` of the element vertex, by name."""
    order, elements, start = _read_header(path, content)
    names = [element.name for element in elements]
    if "vertex" not in names:
        found = ", ".join(names) or "none"
        raise ValueError(f"{path}: expected an element vertex, got {found}; export Gaussians or points")
    before, vertex = elements[: names.index("vertex")], elements[names.index("vertex")]
    if "packed_position" in vertex.types:
        raise ValueError(f"{path}: expected plain properties, got a compressed PLY; export it uncompressed")
    if "" in vertex.types.values():
        listed = next(name for name, kind in vertex.types.items() if not kind)
        raise ValueError(f"{path}: expected numbers in the element vertex, got the list {listed}; remove it")
    if not vertex.types:
        return {}
    if order == "ascii":
        return _read_text(path, content[start:], sum(e.count for e in before), vertex)
    return _read_binary(path, content, start, _ORDERS[order], before, vertex)


def _read_header(path: Path, content: bytes) -> tuple[str, list[_Element], int]:
    """Format, elements and where the data begins."""
    if content[:4] not in (b"ply\n", b"ply\r"):
        raise ValueError(f"{path}: expected a file that begins with 'ply', got {content[:8]!r}; is it a PLY?")
    end = re.search(rb"\nend_header[ \t]*(\r\n|\n|\r)", content[:_LONGEST_HEADER])
    if end is None:
        raise ValueError(
            f"{path}: expected a header that ends with end_header, got none; the file is cut off"
        )
    order, elements = "", []
    for line in content[: end.start()].decode("latin-1").splitlines()[1:]:
        words = line.split()
        match words:
            case ["format", name, *_] if name in _ORDERS:
                order = name
            case ["element", name, count] if count.isdigit():
                elements.append(_Element(name=name, count=int(count)))
            case ["property", "list", _, _, name] if elements:
                elements[-1].types[name] = ""
            case ["property", kind, name] if elements and kind in _TYPES:
                elements[-1].types[name] = _TYPES[kind]
            case [] | ["comment" | "obj_info", *_]:
                pass
            case _:
                raise ValueError(
                    f"{path}: expected format, element, property or comment, got the header line {line!r}"
                )
    if not order:
        raise ValueError(f"{path}: expected one of the formats {', '.join(_ORDERS)} in the header, got none")
    return order, elements, end.end()


def _read_text(path: Path, text: bytes, skipped: int, vertex: _Element) -> dict[str, NDArray[Any]]:
    lines = [line for line in text.splitlines() if line.strip()][skipped : skipped + vertex.count]
    width = len(vertex.types)
    if len(lines) < vertex.count:
        raise _cut_off(path, vertex.count, len(lines))
    try:
        table = np.array(b" ".join(lines).split(), dtype=np.float64).reshape(vertex.count, width)
    except ValueError:
        raise ValueError(
            f"{path}: expected {vertex.count} lines of {width} numbers, got something else among them; write it again"
        ) from None
    return {name: table[:, i].astype(kind) for i, (name, kind) in enumerate(vertex.types.items())}


def _read_binary(
    path: Path, content: bytes, start: int, order: str, before: list[_Element], vertex: _Element
) -> dict[str, NDArray[Any]]:
    for element in before:
        if "" in element.types.values():
            raise ValueError(
                f"{path}: expected vertex before elements with lists, got {element.name} first; write vertex first"
            )
        start += element.count * np.dtype(",".join(element.types.values())).itemsize if element.types else 0
    row = np.dtype([(name, order + kind) for name, kind in vertex.types.items()])
    whole = max(0, len(content) - start) // row.itemsize
    if whole < vertex.count:
        raise _cut_off(path, vertex.count, whole)
    table = np.frombuffer(content, row, vertex.count, min(start, len(content)))
    return {name: table[name] for name in vertex.types}


def _cut_off(path: Path, expected: int, found: int) -> ValueError:
    return ValueError(
        f"{path}: expected {expected} vertices as the header says, got {found}; the file is cut off, copy it again"
    )


def _is_splat(path: Path, vertices: dict[str, NDArray[Any]]) -> bool:
    """Whether these are Gaussians; False for coloured points; ValueError where they are neither."""
    missing = [name for name in (*_PLACE, *_BASE, *_SHAPE) if name not in vertices]
    if not missing:
        return True
    plain = all(name in vertices for name in _PLACE) and not any(name in vertices for name in _BASE)
    if plain and _color_names(vertices):
        return False
    raise ValueError(
        f"{path}: expected the properties of Gaussians, or x y z red green blue of points; missing {', '.join(missing)}"
    )


def _color_names(vertices: dict[str, NDArray[Any]]) -> tuple[str, ...] | None:
    return next((names for names in _COLORS if all(name in vertices for name in names)), None)


def _stack(path: Path, vertices: dict[str, NDArray[Any]], names: Iterable[str]) -> torch.Tensor:
    """Columns side by side, float32 ``[N, len(names)]``; ValueError where one is not finite."""
    names = list(names)
    if not names:
        return torch.zeros(len(next(iter(vertices.values()))), 0)
    table = np.stack([vertices[name].astype(np.float32) for name in names], 1)
    bad = np.isnan(table) if names == ["opacity"] else ~np.isfinite(table)
    if bad.any():
        named = ", ".join(name for i, name in enumerate(names) if bad[:, i].any())
        raise ValueError(
            f"{path}: expected finite numbers, got NaN or infinity in {named} of {bad.any(1).sum()} vertices; drop those"
        )
    return torch.from_numpy(table)


def _gaussians(path: Path, vertices: dict[str, NDArray[Any]]) -> Gaussians:
    rest = [name for name in vertices if name.startswith("f_rest_")]
    if len(rest) not in (0, 9, 24, 45) or set(rest) != {f"f_rest_{i}" for i in range(len(rest))}:
        raise ValueError(
            f"{path}: expected 0, 9, 24 or 45 properties f_rest_0, f_rest_1 and so on, got {len(rest)}; a degree has "
            "3 (d + 1)^2 - 3"
        )
    base = _stack(path, vertices, _BASE)
    higher = _stack(path, vertices, (f"f_rest_{i}" for i in range(len(rest))))
    higher = higher.view(len(base), 3, len(rest) // 3).mT
    body = _stack(path, vertices, ["body"])[:, 0] if "body" in vertices else torch.zeros(len(base))
    return Gaussians(
        means=_stack(path, vertices, _PLACE),
        quats=_stack(path, vertices, _SHAPE[4:]),
        scales=_stack(path, vertices, _SHAPE[1:4]),
        opacities=_stack(path, vertices, _SHAPE[:1])[:, 0],
        harmonics=torch.cat([base[:, None], higher], 1),
        body=body.long(),
    )


def _points(path: Path, vertices: dict[str, NDArray[Any]], size: float | None) -> Gaussians:
    names = _color_names(vertices)
    assert names is not None
    points, colors = _stack(path, vertices, _PLACE), _stack(path, vertices, names)
    kind = vertices[names[0]].dtype
    if kind.kind in "iu":
        colors = colors / np.iinfo(kind).max
    elif len(colors) and colors.max() > 1:  # floats of 0 to 255
        colors = colors / 255
    sizes = _spacing(points) if size is None else torch.full((len(points),), float(size))
    told = f"{float(sizes.median()):.3g} m" if len(sizes) else "no size"
    log.warning("%s: %d plain points became round Gaussians of %s", path, len(points), told)
    return Gaussians.from_points(points, colors.clamp(0, 1), sizes)


def _spacing(points: torch.Tensor) -> torch.Tensor:
    """Half the mean distance to the three nearest others, ``[N]``, within a factor of 5 of its median."""
    if len(points) < 2:
        return torch.full((len(points),), 0.01)
    from scipy.spatial import KDTree

    k = min(4, len(points))
    distances = torch.from_numpy(KDTree(points.numpy()).query(points.numpy(), k=k)[0][:, 1:]).float()
    half = 0.5 * distances.mean(1)
    middle = float(half[half > 0].median()) if (half > 0).any() else 0.01
    return half.clamp(middle / 5, middle * 5)
