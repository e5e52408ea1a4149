"""From few views to many: fit a scene to what the cameras of an episode saw, look at it from new cameras, write a dataset.

    multiview(EpisodeDataset("data/lift"), "data/lift8", Multiview(views=8), generator)

A long episode is fitted in windows one after another, so memory does not grow with its length. What is made is a dataset
like any other: actions, states, instructions and whatever else training reads are those of the source, frame by frame,
and `provenance.<view>` says of every picture whether a camera saw it, a scene was rendered or a generator had a part.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataengine.cameras import Cameras
from dataengine.episodes import EpisodeDataset, EpisodeWriter
from dataengine.flywheel import CHANGED, Flywheel, first_fit, flywheel, look
from dataengine.generators import Generator, Renders, fill_depth
from dataengine.initialize import evidence
from dataengine.lerobot.layout import PROVENANCE_LEGEND
from dataengine.made import MadeDataset, add_window, writer_arguments
from dataengine.placement import place_cameras
from dataengine.probe import probe
from dataengine.progress import make_bar
from dataengine.scene import Scene
from dataengine.sources import Reading, check, open_reading, windows
from dataengine.storage import AnyPath
from dataengine.views import Views

RENDERED, GENERATED = PROVENANCE_LEGEND.index("rendered"), PROVENANCE_LEGEND.index("generated")


@dataclass(frozen=True, kw_only=True)
class Multiview:
    """How to make many views from few.

    Attributes:
        views: how many views the dataset shall have, the observed ones among them; not asked where `cameras` are given.
        observed: the views to start from; none for all that have poses.
        cameras: the new cameras, fixed; None lets :func:`dataengine.placement.place_cameras` choose them by episode.
        flywheel: how the scene is fitted and how often a generator repairs it.
        window: frames of one scene at most; longer episodes are cut into windows of about one length.
        size: side of square pictures to bring everything to, None keeps the size.
        mend: read poses and depth as the geometry says, where what is written cannot be.
    """

    views: int = 8
    observed: tuple[str, ...] = ()
    cameras: Cameras | None = None
    flywheel: Flywheel = field(default_factory=Flywheel)
    window: int = 64
    size: int | None = None
    mend: bool = False

    def __post_init__(self) -> None:
        windows(1, self.window)
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {self.size}")
        if self.cameras is not None and self.cameras.frames is not None:
            raise ValueError(
                f"cameras: expected new cameras that stand still, got {self.cameras.frames} frames; give one pose each"
            )

    def new_cameras(self, seen: Cameras) -> Cameras:
        """The new cameras beside those of an episode. Raises ValueError where the views are too few or a name is taken."""
        if self.cameras is None:
            count = self.views - len(seen.names)
            if count < 1:
                raise ValueError(
                    f"views: expected more than the {len(seen.names)} that are observed ({', '.join(seen.names)}), got "
                    f"{self.views}; ask for more, or observe fewer"
                )
            return place_cameras(seen, count)
        taken = sorted(set(self.cameras.names) & set(seen.names))
        if taken:
            raise ValueError(f"cameras: expected names that no view has, got {taken}; rename them")
        return self.cameras.scaled_to(seen.width, seen.height)


@dataclass(frozen=True, eq=False, kw_only=True)
class Multiplied:
    """New views of some frames, and how well it went: `input_psnr` (dB, of the observed views), `cover` (by new view, the
    share of its pixels that the observed views say something about), `rounds` that were kept, `seconds`."""

    views: Views
    figures: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one call of :func:`multiview` did: episodes made now and before, frames, seconds, figures of all episodes, and
    what the trial of the generator on hidden pixels said (see `dataengine.probe`; None without a generator)."""

    made: int
    before: int
    frames: int
    seconds: float
    figures: tuple[dict[str, Any], ...]
    probe: dict[str, Any] | None = None


def multiply(
    views: Views,
    cameras: Cameras,
    generator: Generator | None,
    settings: Flywheel | None = None,
    *,
    last_word: bool = True,
) -> Multiplied:
    """What `cameras`, fixed or of as many frames, see of the scene that `views` show.

    Without a generator the pictures are renders of a scene fitted to `views`. With one the flywheel turns, and with
    `last_word` it repairs the renders once more in the end. Depth is that of the scene, in holes as around them, and there
    where `views` have some; ids of bodies, where the scene moves by them.
    """
    began, settings = time.perf_counter(), settings or Flywheel()
    if generator is None:
        settings = replace(settings, rounds=0)
    scene = first_fit(views, settings)
    cover = None if views.depth is None else confirmed(scene, cameras, views).tolist()
    turned = flywheel(views, generator, cameras, settings, scene=scene)
    kept = [record for record in turned.log if record["kept"]]
    figures = {
        "input_psnr": kept[-1]["input_psnr"],
        "cover": None if cover is None else dict(zip(cameras.names, cover, strict=True)),
        "rounds": len(kept) - 1,
    }
    repaired = any(record.get("changed", 0.0) > 0 for record in kept)
    made = finish(turned.scene, views, cameras, generator if last_word else None, repaired=repaired)
    return Multiplied(views=made, figures=figures | {"seconds": time.perf_counter() - began})


@torch.no_grad()
def confirmed(scene: Scene, cameras: Cameras, views: Views) -> torch.Tensor:
    """Share ``[V]`` of the pixels of `cameras` whose surface in `scene` some of `views` shows too, by their depth, at the
    first, the middle and the last frame."""
    shares = []
    for frame in sorted({0, len(views) // 2, len(views) - 1}):
        shown = scene.render(cameras, frame)
        points = torch.from_numpy(cameras.at(frame).unproject(shown.depth.numpy())).float()
        there = evidence(points.view(-1, 3), views).there.view(shown.alpha.shape)
        shares.append((there & (shown.alpha > 0.5)).float().mean((1, 2)))
    return torch.stack(shares).mean(0)


def finish(
    scene: Scene, views: Views, cameras: Cameras, generator: Generator | None, *, repaired: bool
) -> Views:
    """The pictures to keep; `repaired` says that the scene was fitted to repaired pictures too."""
    renders = look(scene, cameras, len(views))
    images = renders.images
    origin = torch.full(images.shape[:2], RENDERED)
    if generator is not None:
        images = generator.repair(renders, views, None).images
        changed = (images - renders.images).abs().amax((2, 3, 4)) > CHANGED
        origin[changed | repaired] = GENERATED
    return Views(
        cameras=cameras, images=images, depth=None if views.depth is None else fill_depth(renders),
        body_ids=_body_ids(scene, views, cameras), bodies=views.bodies, provenance=origin, fps=views.fps,
    )  # fmt: skip


def _body_ids(scene: Scene, views: Views, cameras: Cameras) -> torch.Tensor | None:
    if views.body_ids is None or views.bodies is None or scene.motion.name != "rigid":
        return None
    count = len(views.bodies.names)
    return torch.stack([scene.body_ids(cameras, t, count) for t in range(scene.frames)])


@dataclass(frozen=True, eq=False, kw_only=True)
class Window:
    """Frames `start` to `stop` of an episode on disk, and the cameras to see them from: one piece of work."""

    root: Path
    episode: int
    start: int
    stop: int
    cameras: Cameras


def multiply_window(
    window: Window,
    *,
    reading: Reading,
    generator: Generator | None,
    settings: Flywheel,
    last_word: bool = True,
) -> Multiplied:
    """:func:`multiply` for frames on disk, which are checked first. Raises ValueError that names the episode."""
    return multiply(_load(window, reading), window.cameras, generator, settings, last_word=last_word)


def _load(window: Window, reading: Reading) -> Views:
    dataset = EpisodeDataset(window.root)
    views = reading.views(dataset.episode(window.episode, window.start, window.stop, views=reading.names))
    if window.start == 0:
        check(views, f"{window.root}: episode {window.episode}")
    return views


def multiview(
    dataset: EpisodeDataset,
    out: AnyPath,
    settings: Multiview | None = None,
    generator: Generator | None = None,
    *,
    episodes: Sequence[int] | None = None,
    progress: bool = True,
    run: Callable[[Callable[[Window], Multiplied], Iterable[Window]], Iterable[Multiplied]] = map,
) -> Report:
    """Write the dataset with more views into `out`; called again with the same arguments, it goes on after the last
    episode that is finished there.

    Where a generator repairs, it is first tried on the first window with pixels hidden (:func:`dataengine.probe.probe`):
    every scene is then turned as often as served the hidden pixels best, at most `settings.flywheel.rounds` times.

    Args:
        dataset: of at least two views with poses.
        out: another folder. `meta/multiview.json` in it keeps the settings and the figures of every episode.
        settings: see :class:`Multiview`.
        generator: what repairs renders, None for renders as they are; it is known by its `name` and its weights.
        episodes: which ones, in this order; None for all.
        progress: show a bar on a terminal, elsewhere a line every half minute.
        run: applies a function to windows and gives the results in order: `map`, or something that spreads them over
            processes.

    Raises:
        ValueError: views that nothing can be made from, settings or a source other than those in `out`.
        DatasetError: damage in the source. DatasetWriteError, OSError: a full disk. Finished episodes stay in every case.
    """
    settings, out, began = settings or Multiview(), Path(out), time.perf_counter()
    if out.resolve() == dataset.root.resolve():
        raise ValueError(
            f"out: expected another folder than the dataset's, got {out}; name one that is not there yet"
        )
    chosen = choose_episodes(dataset, episodes)
    reading, _ = read_as(dataset, settings, chosen[0])
    settings.new_cameras(reading.cameras(dataset, chosen[0]))
    made = MadeDataset(out, dataset, reading, settings, generator)
    arguments = writer_arguments(dataset, reading, settings, chosen[0])
    with EpisodeWriter(out, **arguments) as writer:
        before = made.check_finished(chosen)
        made.write()
        todo = chosen[before:]
        wheel, last_word = _tried(made, dataset, reading, settings, generator, chosen[0])
        work = partial(
            multiply_window, reading=reading, generator=generator, settings=wheel, last_word=last_word
        )
        jobs, ahead = itertools.tee(_windows(dataset, reading, settings, todo))
        total = sum(dataset.lengths[index] for index in todo)
        with make_bar(total=total, unit="frame", desc="multiview", quiet=not progress) as bar:
            for job, result in zip(jobs, run(work, ahead), strict=True):
                _keep(job, result, dataset, reading, writer, made)
                bar.update(job.stop - job.start)
    return Report(
        made=len(todo), before=before, frames=total, seconds=time.perf_counter() - began,
        figures=tuple(made.figures), probe=made.probe,
    )  # fmt: skip


def _tried(
    made: MadeDataset, dataset: EpisodeDataset, reading: Reading, settings: Multiview, generator: Generator | None,
    episode: int,
) -> tuple[Flywheel, bool]:  # fmt: skip
    """The wheel with as many rounds as a trial on the first window found best, and whether the generator speaks last."""
    wheel = settings.flywheel
    if generator is None:
        return wheel, True
    if made.probe is None:
        window = next(_windows(dataset, reading, settings, [episode]))
        made.probe = probe(_load(window, reading), window.cameras, generator, wheel).as_dict()
        made.write()
    return replace(wheel, rounds=made.probe["rounds"]), made.probe["last_word"]


def choose_episodes(dataset: EpisodeDataset, episodes: Sequence[int] | None) -> tuple[int, ...]:
    """The episodes asked for, all by default; ValueError for one that is not there."""
    chosen = tuple(range(len(dataset)) if episodes is None else episodes)
    absent = [index for index in chosen if not 0 <= index < len(dataset)]
    if absent or not chosen:
        got = absent[0] if absent else "none"
        raise ValueError(f"episodes: expected some of 0 to {len(dataset) - 1} in {dataset.root}, got {got}")
    return chosen


def read_as(dataset: EpisodeDataset, settings: Multiview, episode: int) -> tuple[Reading, list[str]]:
    """How the views of `dataset` are read under `settings`; see :func:`dataengine.sources.open_reading`."""
    size = None if settings.size is None else (settings.size, settings.size)
    return open_reading(dataset, settings.observed, size=size, mend=settings.mend, episode=episode)


def _windows(
    dataset: EpisodeDataset, reading: Reading, settings: Multiview, episodes: Iterable[int]
) -> Iterator[Window]:
    for index in episodes:
        cameras = settings.new_cameras(reading.cameras(dataset, index))
        for start, stop in windows(dataset.meta(index).length, settings.window):
            yield Window(root=dataset.root, episode=index, start=start, stop=stop, cameras=cameras)


def _keep(
    job: Window, result: Multiplied, dataset: EpisodeDataset, reading: Reading, writer: EpisodeWriter,
    made: MadeDataset,
) -> None:  # fmt: skip
    """Write a window; after the last one of an episode, publish it."""
    episode = dataset.episode(job.episode, job.start, job.stop, views=reading.names)
    add_window(writer, episode, reading.views(episode).join(result.views))
    made.add(job.episode, result.figures, job.stop - job.start, first=job.start == 0)
    if job.stop == dataset.meta(job.episode).length:
        made.write()
        writer.save_episode(success=episode.success, seed=episode.seed)


__all__ = [
    "Multiplied",
    "Multiview",
    "Renders",
    "Report",
    "Window",
    "choose_episodes",
    "finish",
    "multiply",
    "multiply_window",
    "multiview",
    "read_as",
]
