"""Datasets as the data engine reads them: which views, in which conventions, checked before any work is done."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataengine.cameras import Cameras
from dataengine.captures.check import find_conventions, find_problems, repair
from dataengine.captures.geometry import WORDS, to_opencv
from dataengine.episodes import Episode, EpisodeDataset
from dataengine.lerobot import layout
from dataengine.views import Views

MOMENTS = 16  # frames that the door looks at
NEAR = 1e-4  # relative: less than half a code of depth


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read the views of a dataset.

    Attributes:
        names: which views.
        size: (width, height) to bring pictures to, None for those on disk.
        axes: how poses are written, one of :data:`dataengine.captures.geometry.AXES`.
        depth_scale: metres per unit of depth.
        nearest: stored depth that stands for "not known": the near end of its codes, which holds what is nearer too.
    """

    names: tuple[str, ...]
    size: tuple[int, int] | None = None
    axes: str = "opencv"
    depth_scale: float = 1.0
    nearest: float = 0.0

    def views(self, episode: Episode) -> Views:
        """What the episode, or a window of it, shows."""
        views = Views.from_episode(episode, self.names)
        if views.depth is not None:
            known = views.depth > self.nearest * (1 + NEAR)
            views = replace(views, depth=torch.where(known, views.depth, 0.0))
        if (self.axes, self.depth_scale) != ("opencv", 1.0):
            views, _ = repair(views, axes=self.axes, depth_scale=self.depth_scale, check=False)
        return views if self.size is None else views.scaled_to(*self.size)

    def cameras(self, dataset: EpisodeDataset, episode: int) -> Cameras:
        """The cameras of a whole episode, without decoding pictures; ValueError where it has no poses."""
        cameras = dataset.cameras(episode, self.names)
        if cameras is None:
            raise ValueError(
                f"{dataset.root}: expected camera poses in episode {episode}, found none; leave it out"
            )
        cameras = replace(cameras, camera_to_world=to_opencv(cameras.camera_to_world, self.axes))
        return cameras if self.size is None else cameras.scaled_to(*self.size)


def open_reading(
    dataset: EpisodeDataset,
    names: Sequence[str] = (),
    *,
    size: tuple[int, int] | None = None,
    mend: bool = False,
    episode: int = 0,
) -> tuple[Reading, list[str]]:
    """How to read `names` of a dataset, by default every view that has poses and was seen by a camera, and a sentence for
    each convention that had to be changed (only with `mend`).

    Raises:
        ValueError: no episodes, an unknown view, no poses, fewer than two views, views of different sizes, and whatever
            :func:`dataengine.captures.check_views` refuses.
    """
    if not len(dataset):
        raise ValueError(f"{dataset.root}: expected at least one episode, got none; record some first")
    chosen = tuple(names) or _posed_views(dataset, episode)
    ends = [ends for name in chosen if (ends := dataset.depth_range(name)) is not None]
    reading = Reading(names=chosen, size=size, nearest=max((near for near, _ in ends), default=0.0))
    if len(chosen) < 2:
        raise ValueError(
            f"{dataset.root}: expected at least 2 views with camera poses, got {len(chosen)} "
            f"({', '.join(chosen) or 'none'} of {', '.join(dataset.views) or 'none'}); record with poses or add "
            "meta/cameras.json"
        )
    first = dataset.episode(episode, 0, min(MOMENTS, dataset.meta(episode).length), views=chosen)
    _check_sizes(dataset, chosen)
    views, said = reading.views(first), []
    if mend:
        axes, scale = find_conventions(views)
        reading = replace(reading, axes=axes, depth_scale=scale)
        said = [f"poses are read as {WORDS[axes]}, not as {WORDS['opencv']}"] * (axes != "opencv")
        said += [f"depth is multiplied by {scale:.4g}"] * (scale != 1.0)
        views = reading.views(first)
    check(views, f"{dataset.root}: episode {episode}")
    return reading, said


def check(views: Views, label: str, *, least: int = 2, axes: str = "opencv") -> None:
    """Raise one ValueError that begins with `label` for views that nothing can be made from."""
    found = find_problems(views, least=least, axes=axes)
    if found:
        raise ValueError(f"{label}: {' | '.join(problem.sentence for problem in found)}")


def windows(length: int, longest: int) -> list[tuple[int, int]]:
    """`length` frames cut into as few windows of at most `longest` as can be, all of about one length."""
    if length < 1 or longest < 1:
        raise ValueError(f"window: expected at least 1 frame, got {min(length, longest)}")
    count = -(-length // longest)
    bounds = [i * length // count for i in range(count + 1)]
    return list(itertools.pairwise(bounds))


def _posed_views(dataset: EpisodeDataset, episode: int) -> tuple[str, ...]:
    """Views with poses whose first picture is no render; those of unknown provenance were seen."""
    row = dataset.rows(dataset.meta(episode)).slice(0, 1)
    made = {
        view
        for view in dataset.views
        if (key := layout.PROVENANCE + view) in row.column_names and row[key][0].as_py() != 0
    }
    return tuple(v for v in dataset.views if v not in made and dataset.cameras(episode, (v,)) is not None)


def _check_sizes(dataset: EpisodeDataset, names: Sequence[str]) -> None:
    sizes = {name: "{1} x {0}".format(*dataset.picture_size(name)) for name in names}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{dataset.root}: expected views of one size, got {sizes}; name views of one size (--observed)"
        )


def source_kind(path: Path) -> str:
    """``dataset``, ``transforms`` or ``colmap``: what lies at `path`.

    Raises FileNotFoundError where nothing of these does.
    """
    from dataengine.captures.colmap_files import find_model

    if (path / layout.INFO_PATH).is_file():
        return "dataset"
    if path.suffix == ".json" or (path / "transforms.json").is_file():
        return "transforms"
    try:
        find_model(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: expected a LeRobot dataset, a transforms.json or a COLMAP model, found none; check the path"
        ) from None
    return "colmap"
