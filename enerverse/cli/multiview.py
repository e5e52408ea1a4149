"""`enerverse multiview`: a dataset with many views from one with few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from enerverse.cli.failures import same_command
from enerverse.cli.messages import announce, command, count, expect
from enerverse.cli.simulator import check_seed

if TYPE_CHECKING:
    from dataengine.episodes import EpisodeDataset
    from dataengine.generators import Generator
    from dataengine.multiview import Multiview as Settings
    from dataengine.multiview import Report

LITTLE = 0.8  # share of a new view's pixels below which it is named
POOR = 20.0  # dB of the observed views below which their scene is doubtful
WORLD = "world"


@dataclass(frozen=True, kw_only=True)
class Multiview:
    """Turn episodes with few cameras into a dataset with many, each picture marked observed, rendered or generated."""

    data: Annotated[Path, tyro.conf.arg(aliases=("--dataset",))]
    """Dataset folder: LeRobot v2 or v3, with camera poses in its columns or in meta/cameras.json."""
    out: Path
    """Folder of the new dataset; gone on with where it was begun."""
    views: int = 8
    """How many views the new dataset shall have, the observed ones among them."""
    observed: tuple[str, ...] = ()
    """Views to start from; when not given, all that have poses."""
    cameras: Path | None = None
    """File of new cameras, like meta/cameras.json; when not given, they are placed around the scene."""
    episodes: tuple[int, ...] = ()
    """Which episodes; when not given, all."""
    generator: str | None = None
    """What repairs renders: none, fill, restorer or world; when not given, restorer where its weights are shipped, else
    none."""
    checkpoint: Path | None = None
    """For the generator world: checkpoint or run folder; when not given, the shipped one."""
    rounds: int = 2
    """How often the generator repairs the scene."""
    steps: int = 400
    """Optimiser steps of the first fit of a scene."""
    window: int = 64
    """Frames of one scene at most; longer episodes become several scenes, one after another."""
    image_size: int | None = None
    """Side of square pictures to bring everything to; when not given, sizes stay."""
    repair: bool = False
    """Read poses and depth as their geometry says, where what is written cannot be."""
    workers: int = 1
    """Processes to spread the scenes over (extra `ray`)."""
    address: str | None = None
    """Ray cluster to work on, such as auto or HOST:6379; when not given, this machine."""
    seed: int = 0
    """Seed of the fits."""

    def run(self) -> None:
        """Make the views and say where they lie."""
        from dataengine.episodes import EpisodeDataset
        from dataengine.multiview import choose_episodes, multiview, read_as

        self._check()
        dataset, settings, generator = EpisodeDataset(self.data), self.settings(), self.make_generator()
        episodes = choose_episodes(dataset, self.episodes or None)
        reading, mended = read_as(dataset, settings, episodes[0])
        new = settings.new_cameras(reading.cameras(dataset, episodes[0])).names
        expected = self._expect(dataset, settings, (reading.names, new), episodes, generator is not None)
        self._announce(dataset, generator, (reading.names, new), [expected, *mended], len(episodes))
        with same_command(self.out):
            report = multiview(
                dataset,
                self.out,
                settings,
                generator,
                episodes=episodes,
                run=spread(self.workers, self.address),
            )
        print("\n".join(describe(report, self.out, 0 if generator is None else self.rounds)))
        print(f"next: {command('enerverse train autoencoder', data=self.out, out='runs/mine')}")
        print(f"scene in a browser: {self._scene()}")

    def _expect(
        self, dataset: EpisodeDataset, settings: Settings, views: tuple[tuple[str, ...], ...],
        episodes: Sequence[int], repaired: bool,
    ) -> str:  # fmt: skip
        """How long it may take, were nothing done yet."""
        from dataengine.progress import fit_seconds
        from dataengine.sources import windows

        seen, new = views
        wheel, (height, width) = settings.flywheel, dataset.picture_size(seen[0])
        pixels = height * width if self.image_size is None else self.image_size**2
        fits = [(wheel.start.fit.steps, len(seen))]
        fits += [(wheel.refit.steps, len(seen) + len(new))] * wheel.rounds * repaired
        cuts = [cut for index in episodes for cut in windows(dataset.lengths[index], self.window)]
        seconds = sum(fit_seconds(*plan, stop - start, pixels) for start, stop in cuts for plan in fits)
        return expect(seconds, self.workers)

    def _scene(self) -> str:
        return command(
            "enerverse reconstruct", data=self.data, observed=self.observed or None,
            episodes=self.episodes[:1] or None, out="runs/scene",
        )  # fmt: skip

    def _check(self) -> None:
        check_seed(self.seed)
        for name, least in (("workers", 1), ("rounds", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    def settings(self) -> Settings:
        """What the flags say. Raises ValueError or FileNotFoundError for a file of cameras that is none."""
        from dataengine.fit import Fit
        from dataengine.flywheel import Flywheel
        from dataengine.generators import default_generator
        from dataengine.multiview import Multiview as Settings
        from dataengine.reconstruct import Reconstruction

        quiet = self.workers > 1 or self.address is not None
        plain = (self.generator or default_generator()) == "none"  # else the generator fills what is missing
        start = Reconstruction(complete=plain, fit=Fit(steps=self.steps, seed=self.seed, quiet=quiet))
        wheel = Flywheel(rounds=self.rounds, start=start)
        wheel = replace(wheel, refit=replace(wheel.refit, seed=self.seed, quiet=quiet))
        return Settings(
            views=self.views, observed=self.observed, cameras=self._new_cameras(), flywheel=wheel,
            window=self.window, size=self.image_size, mend=self.repair,
        )  # fmt: skip

    def _new_cameras(self) -> Any:
        if self.cameras is None:
            return None
        from dataengine.episodes import EpisodeDataset
        from dataengine.lerobot.sidecar import read_cameras

        dataset = EpisodeDataset(self.data)
        return read_cameras(self.cameras, dataset.picture_size((*self.observed, *dataset.views)[0]))

    def make_generator(self) -> Generator | None:
        """The generator of that name. Raises ValueError naming the closest one, FileNotFoundError without its weights."""
        from dataengine.errors import closest
        from dataengine.generators import GENERATORS, default_generator, make_generator

        name = self.generator or default_generator()
        if name == WORLD:
            return load_repairer(self.checkpoint)
        if name not in GENERATORS:
            known = (*GENERATORS, WORLD)
            raise ValueError(
                f"generator: expected one of {', '.join(known)}, got {name!r}; {closest(name, known)}"
            )
        return make_generator(name)

    def _announce(
        self, dataset: EpisodeDataset, generator: Generator | None, views: tuple[tuple[str, ...], ...],
        more: list[str], episodes: int,
    ) -> None:  # fmt: skip
        seen, new = views
        tried = ", which is tried first on hidden pixels of one scene"
        repaired = "as they are" if generator is None else f"repaired by {generator.name}{tried}"
        announce(
            f"multiview: {count(episodes, 'episode')} of {dataset.root}, {count(len(new), 'new view')} beside "
            f"{', '.join(seen)}",
            f"scenes of at most {count(self.window, 'frame')}, {count(self.steps, 'step')} each; renders {repaired}",
            *more[:3],
            f"into {self.out}; Ctrl-C keeps finished episodes, the same command goes on",
        )


def spread(workers: int, address: str | None = None) -> Any:
    """What applies a function to pieces of work, here or in several processes."""
    if workers == 1 and address is None:
        return map
    from dataengine.parallel.ordered import map_in_order

    return partial(map_in_order, workers=workers, address=address)


def load_repairer(checkpoint: Path | None) -> Generator:
    """The world model as a generator."""
    from enerverse.loading import load_world
    from enerverse.pipelines.repair import WorldRepairer

    return WorldRepairer(load_world(checkpoint))


def mean_cover(figures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of each new view's pixels that observed views show too, empty where these have no depth to tell by."""
    known = [row["cover"] for row in figures if row["cover"] is not None]
    return {name: sum(row[name] for row in known) / len(known) for name in (known[0] if known else ())}


def describe_trial(probe: Mapping[str, Any]) -> str:
    """What the generator was worth on pixels of the first scene that were hidden from the fit."""
    hidden = probe["hidden_psnr"]
    shown = " -> ".join(f"{value:.1f}" for value in hidden)
    undone = ", as more made observed views worse" if max(hidden) > hidden[probe["rounds"]] else ""
    rounds, psnr = count(probe["rounds"], "round"), probe["repaired_psnr"]
    last = f"its last repair gives {psnr:.1f} dB" if probe["last_word"] else "its last repair is left out"
    return f"pixels hidden for a trial are shown with {shown} dB round by round, so {rounds} each{undone}; {last}"


def describe(report: Report, out: Path, rounds: int = 0) -> list[str]:
    """What was made, how good it is, how many of `rounds` were kept, and which views show much that nobody has seen."""
    if not report.made:
        lines = [f"{out}: already holds {count(report.before, 'episode')}"]
    else:
        done = (
            f"made {count(report.made, 'episode')}, {count(report.frames, 'frame')} in {report.seconds:.0f} s"
        )
        lines = [f"{done}: {out}"]
    figures = report.figures
    psnr = sum(row["input_psnr"] for row in figures) / len(figures)
    cover = mean_cover(figures)
    seen = (
        f"show {sum(cover.values()) / len(cover):.0%} of the new views' pixels" if cover else "have no depth"
    )
    lines.append(f"the scene gives the observed views back with {psnr:.1f} dB; they {seen}")
    if report.probe is not None:
        lines.append(describe_trial(report.probe))
    rounds = rounds if report.probe is None else report.probe["rounds"]
    if rounds:
        kept = sum(row["rounds"] for row in figures) / len(figures)
        lines.append(
            f"of {count(rounds, 'round')} of repair {kept:.1f} were kept: one that makes observed views worse is undone"
        )
    if psnr < POOR:
        lines.append(
            f"below {POOR:.0f} dB the new views are doubtful: check poses and times, or take more --steps"
        )
    little = [f"{name} ({share:.0%})" for name, share in cover.items() if share < LITTLE]
    if little:
        lines.append(
            f"seen less than {LITTLE:.0%}: {', '.join(little)}; observe more views, or name nearer cameras with --cameras"
        )
    return lines
