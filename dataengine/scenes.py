"""4D scenes of recordings and captures as files: read, check, fit, write what was asked for.

    for part in read_parts("data/lift", episodes=[0]).parts:
        make_scene(part, "runs/scene", formats=("page", "ply"))

A part is one scene: a capture, or an episode of a dataset, or as many of its frames as a scene may have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataengine.captures import read_colmap, read_transforms, repair, write_colmap, write_transforms
from dataengine.digests import digest_views
from dataengine.episodes import Episode, EpisodeDataset, EpisodeWriter
from dataengine.errors import closest
from dataengine.export import GaussianFilm, export, write_ply
from dataengine.export.viewers import import_rerun
from dataengine.fit import bound
from dataengine.jsontext import difference, through_json
from dataengine.made import add_window
from dataengine.multiview import choose_episodes, finish
from dataengine.placement import place_cameras
from dataengine.reconstruct import Reconstruction, measure, reconstruct
from dataengine.scene import Scene
from dataengine.sources import MOMENTS, check, open_reading, source_kind, windows
from dataengine.storage import AnyPath, read_json, write_json
from dataengine.views import Views

GAUSSIANS = ("page", "ply", "film", "splat", "rerun")
FORMATS = (*GAUSSIANS, "transforms", "colmap", "lerobot")
RECORD = "scene.json"
POINTS, SOLID = 20_000, 0.5  # of a COLMAP model: at most so many Gaussians, of at least this opacity


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """One scene to be: its name, which is that of its folder ("" for a capture), its task in words, how many frames it
    has, and its views."""

    name: str
    title: str
    frames: int
    load: Callable[[], Views]


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """What lies at `root`: of which kind, its parts, the views of each, of `size` (width, height), and a sentence for
    everything that was mended."""

    root: Path
    kind: str
    parts: list[Part]
    views: tuple[str, ...]
    size: tuple[int, int]
    mended: list[str]


@dataclass(frozen=True, eq=False, kw_only=True)
class Made:
    """A scene, where its files lie by format, and how well it shows what was seen (see `reconstruct.measure`)."""

    scene: Scene
    files: dict[str, Path]
    figures: dict[str, float]


def read_parts(
    root: AnyPath,
    *,
    observed: Sequence[str] = (),
    episodes: Sequence[int] | None = None,
    window: int = 128,
    size: int | None = None,
    common: bool = False,
    mend: bool = False,
) -> Parts:
    """Find out what lies at `root`, and refuse what no scene can be made from.

    Args:
        root: folder of a LeRobot dataset, nerfstudio's ``transforms.json`` or its folder, folder of a COLMAP model.
        observed: views to take; none for all (of a dataset, all that have poses and were seen by a camera).
        episodes: of a dataset; None for all.
        window: frames of one scene at most.
        size: side of square pictures to bring everything to.
        common: cut cameras of a capture that have different moments to those they share.
        mend: read poses and depth as the geometry says, where what is written cannot be.

    Raises:
        FileNotFoundError: nothing of these lies there. DatasetError, ValueError: damage; fewer than two views, poses or
            depth in other conventions, views that do not overlap; the file and what to do are named.
    """
    root = Path(root)
    kind = source_kind(root)
    if kind == "dataset":
        return _of_dataset(root, observed, episodes, window, size, mend)
    if kind == "transforms":
        views = read_transforms(root, frames="common" if common else "equal", check=False)
    else:
        views, _, _ = read_colmap(root, frames="common" if common else "equal", check=False)
    views = views.select(observed) if observed else views
    given, mended = "opengl" if kind == "transforms" else "world_to_camera", []
    if mend:
        views, mended = repair(views, check=False, given=given)
    check(views, str(root), axes=given)
    views = views if size is None else views.scaled_to(size, size)
    cuts = windows(len(views), window)
    parts = [
        Part(
            name=_name("", n, len(cuts)), title=root.resolve().name, frames=w[1] - w[0],
            load=lambda w=w: views.at(slice(*w)),
        )
        for n, w in enumerate(cuts)
    ]  # fmt: skip
    size_of = (views.cameras.width, views.cameras.height)
    return Parts(root=root, kind=kind, parts=parts, views=views.names, size=size_of, mended=mended)


def _of_dataset(
    root: Path, observed: Sequence[str], episodes: Sequence[int] | None, window: int, size: int | None, mend: bool
) -> Parts:  # fmt: skip
    dataset = EpisodeDataset(root)
    chosen = choose_episodes(dataset, episodes)
    square = None if size is None else (size, size)
    reading, mended = open_reading(dataset, observed, size=square, mend=mend, episode=chosen[0])

    def load(index: int, start: int, stop: int) -> Views:
        views = reading.views(dataset.episode(index, start, stop, views=reading.names))
        check(views.at(slice(0, MOMENTS)), f"{root}: episode {index}")
        return views

    parts = []
    for index in chosen:
        meta = dataset.meta(index)
        cuts = windows(meta.length, window)
        parts += [
            Part(
                name=_name(f"episode_{index:03d}", n, len(cuts)), title=meta.tasks[0], frames=w[1] - w[0],
                load=lambda i=index, w=w: load(i, *w),
            )
            for n, w in enumerate(cuts)
        ]  # fmt: skip
    height, width = dataset.picture_size(reading.names[0])
    return Parts(
        root=root,
        kind="dataset",
        parts=parts,
        views=reading.names,
        size=square or (width, height),
        mended=mended,
    )


def _name(episode: str, number: int, count: int) -> str:
    part = f"part_{number:02d}" if count > 1 else ""
    return "/".join(word for word in (episode, part) if word)


def check_formats(formats: Sequence[str], kind: str) -> None:
    """ValueError for an unknown format (the closest is named), none, or ``lerobot`` of what is a dataset already;
    MissingPackage for ``rerun`` without its package."""
    for name in formats:
        if name not in FORMATS:
            raise ValueError(
                f"formats: expected some of {', '.join(FORMATS)}, got {name!r}; {closest(name, FORMATS)}"
            )
    if not formats:
        raise ValueError(f"formats: expected at least one of {', '.join(FORMATS)}, got none")
    if "lerobot" in formats and kind == "dataset":
        raise ValueError(
            "formats: expected lerobot for a capture alone, got it for a dataset; multiview writes one with more views"
        )
    if "rerun" in formats:
        import_rerun()


def make_scene(
    part: Part,
    out: AnyPath,
    settings: Reconstruction | None = None,
    formats: Sequence[str] = ("page",),
    *,
    source: str = "",
    new_views: int = 0,
) -> Made:
    """Fit the scene of a part and write its files into ``out/<name of the part>``.

    The fit goes on where it was stopped, and once it is finished, other formats are written without fitting again.

    page: one HTML file that plays the scene in a browser; ply: one file a frame; film: the Gaussians once
    (``canonical.ply``, in `files` as canonical) and how they move (``scene.safetensors``); splat: one file a frame;
    rerun: a recording (``scene.rrd``) for its viewer; transforms, colmap: the views that were seen, the latter with the
    scene's Gaussians as points; lerobot: a dataset of those views and `new_views` renders.

    Raises:
        ValueError: another scene in that folder; views that nothing can be made from. OSError: a full disk.
    """
    settings, folder = settings or Reconstruction(), Path(out) / part.name
    views = part.load()
    wanted = _bound(views, settings, source)
    _check_record(folder, wanted)
    scene = reconstruct(views, settings, folder=folder)
    figures = measure(scene, views)
    _write_record(folder, wanted | {"figures": figures})
    frames = [scene.at(t).detach() for t in range(scene.frames)]
    film = GaussianFilm.from_frames(frames, fps=views.fps, cameras=views.cameras)
    files = export(film, folder, [name for name in formats if name in GAUSSIANS], title=part.title)
    if "film" in formats:
        body = bool(film.canonical.body.any())
        files["canonical"] = write_ply(folder / "canonical.ply", film.canonical, body=body)
    if "transforms" in formats:
        files["transforms"] = write_transforms(folder / "transforms", views)
    if "colmap" in formats:
        files["colmap"] = write_colmap(folder / "colmap", views, *_cloud(scene))
    if "lerobot" in formats:
        files["lerobot"] = _write_dataset(folder / "lerobot", scene, views, new_views, part.title)
    return Made(scene=scene, files=files, figures=figures)


def _bound(views: Views, settings: Reconstruction, source: str) -> dict[str, Any]:
    plan = asdict(settings) | {"fit": bound(settings.fit)}
    seen = {
        "views": list(views.names),
        "frames": len(views),
        "size": [views.cameras.width, views.cameras.height],
        "content": digest_views(views),
    }
    return through_json({"source": source, **seen, "settings": plan})


def _check_record(folder: Path, wanted: dict[str, Any]) -> None:
    path = folder / RECORD
    if not path.is_file():
        _write_record(folder, wanted)
        return
    there = read_json(path)
    if not isinstance(there, dict):
        raise ValueError(f"{path}: expected what a scene was made from, got other JSON; remove its folder")
    for key, value in wanted.items():
        if there.get(key) == value:
            continue
        if key == "content":
            raise ValueError(
                f"{path}: expected a scene of these pictures, depth and poses, got one of others; choose another folder"
            )
        found, asked = difference(there.get(key), value)
        raise ValueError(
            f"{key}: expected {found} as in {folder}, got {asked}; choose another folder or the same settings"
        )


def _write_record(folder: Path, values: dict[str, Any]) -> None:
    write_json(folder / RECORD, values)


def _cloud(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Points and colours of the opaque Gaussians at the first frame."""
    first = scene.at(0).detach()
    first = first[first.opacities.sigmoid() >= SOLID]
    first = first[:: max(1, -(-len(first) // POINTS))]
    return first.means.double().numpy(), first.colors.clamp(0, 1).numpy()


def _write_dataset(root: Path, scene: Scene, views: Views, count: int, task: str) -> Path:
    """One episode of what was seen and rendered. A capture has no robot: state and action are one zero each."""
    made = finish(scene, views, place_cameras(views.cameras, count), None, repaired=False) if count else None
    both = views if made is None else views.join(made)
    if (root / "meta" / "info.json").is_file() and len(there := EpisodeDataset(root)):
        if there.views != both.names:
            raise ValueError(
                f"{root}: expected a dataset of the views {list(both.names)}, got {list(there.views)}; choose another "
                "folder"
            )
        return root
    zeros = np.zeros((len(views), 1), np.float32)
    episode = Episode(
        images={}, state=zeros, action=zeros, cameras=None, depth=None, segmentation=None, task=task, success=None,
        seed=None, fps=views.fps, timestamp=(np.arange(len(views)) / views.fps).astype(np.float32), provenance={},
        extra={}, index=0,
    )  # fmt: skip
    size = (views.cameras.height, views.cameras.width)
    far = None if both.depth is None else (0.02, max(10.0, float(both.depth.max())))
    with EpisodeWriter(
        root, fps=views.fps, views=both.names, image_size=size, state_dim=1, action_dim=1,
        depth=both.depth is not None, cameras=True, depth_range=far,
    ) as writer:  # fmt: skip
        with torch.no_grad():
            add_window(writer, episode, both)
        writer.save_episode()
    return root
