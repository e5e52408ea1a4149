"""Files and viewers of moving Gaussian scenes.

    export(frames, "runs/scene", formats=("ply", "splat", "film", "page"), cameras=cameras, fps=10)

A scene is a sequence of ``Gaussians``, one a frame, of the same Gaussians in the same order, such as ``scene.at(t)`` for
every t, or a :class:`GaussianFilm`, which holds the same without repeating what does not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dataengine.cameras import Cameras
from dataengine.errors import closest
from dataengine.export.checks import remove_other_frames
from dataengine.export.film import GaussianFilm, as_film, read_film, write_film
from dataengine.export.page import write_page
from dataengine.export.ply import read_ply, read_ply_sequence, write_ply, write_ply_sequence
from dataengine.export.splat import read_splat, write_splat
from dataengine.export.viewers import log_rerun, show_viser
from dataengine.gaussians import Gaussians
from dataengine.storage import AnyPath

__all__ = [
    "FORMATS",
    "export",
    "GaussianFilm",
    "read_film",
    "write_film",
    "write_page",
    "read_ply",
    "write_ply",
    "read_ply_sequence",
    "write_ply_sequence",
    "read_splat",
    "write_splat",
    "show_viser",
    "log_rerun",
]

FORMATS = ("ply", "splat", "film", "page", "rerun")


def export(
    frames: GaussianFilm | Iterable[Gaussians],
    folder: AnyPath,
    formats: Sequence[str] = ("ply", "film", "page"),
    *,
    cameras: Cameras | None = None,
    fps: float | None = None,
    title: str = "4D scene",
) -> dict[str, Path]:
    """Write a scene in several formats and return, by format, the file or folder that holds it.

    ply: ``folder/ply/frame_0000.ply`` and on, with playlist.json; splat: ``folder/splat/frame_0000.splat`` and on;
    film: ``folder/scene.safetensors``; page: ``folder/scene.html``; rerun: ``folder/scene.rrd``.

    Args:
        frames: a film, or the Gaussians of each frame.
        folder: made where it does not exist.
        formats: some of :data:`FORMATS`.
        cameras: for the film, the page and Rerun, fixed or of T frames; by default those of the film.
        fps: frames per second; by default those of the film, or 10.
        title: of the page.

    Raises:
        ValueError: an unknown format (the closest is given), frames that do not belong together, NaN or infinite numbers.
        ImportError: rerun without its package. OSError: a full disk.
    """
    formats = (formats,) if isinstance(formats, str) else tuple(formats)
    for name in formats:
        if name not in FORMATS:
            raise ValueError(
                f"formats: expected some of {', '.join(FORMATS)}, got {name!r}; {closest(name, FORMATS)}"
            )
    film, folder = as_film(frames, fps, cameras), Path(folder)
    written: dict[str, Path] = {}
    for name in formats:
        match name:
            case "ply":
                written[name] = write_ply_sequence(folder / "ply", film, fps=film.fps)[-1].parent
            case "splat":
                paths = [
                    write_splat(folder / "splat" / f"frame_{t:04d}.splat", film.at(t))
                    for t in range(len(film))
                ]
                remove_other_frames(paths)
                written[name] = folder / "splat"
            case "film":
                written[name] = write_film(folder / "scene.safetensors", film)
            case "page":
                written[name] = write_page(folder / "scene.html", film, title=title)
            case "rerun":
                written[name] = log_rerun(film, path=folder / "scene.rrd")
    return written
