"""`enerverse reconstruct`: the 4D scene of an episode or a capture, as a page for the browser and in other formats."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from enerverse.cli.messages import announce, command, count, expect
from enerverse.cli.simulator import check_seed

if TYPE_CHECKING:
    from dataengine.reconstruct import Reconstruction
    from dataengine.scenes import Part, Parts


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Fit a 4D scene to what several cameras saw and write it as a page that plays in a browser, or in other formats."""

    data: Annotated[Path, tyro.conf.arg(aliases=("--dataset",))]
    """Dataset folder, nerfstudio's transforms.json, or COLMAP folder."""
    out: Path = Path("runs/scene")
    """Folder of the scenes; gone on with where it was begun."""
    episodes: tuple[int, ...] = (0,)
    """Which episodes of a dataset."""
    formats: tuple[str, ...] = ("page",)
    """Some of page, ply, film, splat, rerun (extra `viewer`), transforms, colmap and, for a capture, lerobot."""
    observed: tuple[str, ...] = ()
    """Views to fit to; when not given, all that have poses."""
    motion: str = "auto"
    """How things move: auto, static, rigid, polynomial, tracked or another model."""
    steps: int = 400
    """Optimiser steps."""
    window: int = 128
    """Frames of one scene at most; longer recordings become several scenes."""
    image_size: int | None = None
    """Side of square pictures to bring everything to; when not given, sizes stay."""
    new_views: int = 6
    """How many rendered views the format lerobot gets beside those that were seen."""
    common_frames: bool = False
    """Cut cameras of a capture that have different frames to those they share."""
    repair: bool = False
    """Read poses and depth as their geometry says, where what is written cannot be."""
    workers: int = 1
    """Processes to spread the scenes over (extra `ray`)."""
    address: str | None = None
    """Ray cluster to work on, such as auto or HOST:6379; when not given, this machine."""
    seed: int = 0
    """Seed of the fit."""

    def run(self) -> None:
        """Fit, write, print how well the scene shows what was seen."""
        from dataengine.scenes import check_formats, read_parts
        from enerverse.cli.multiview import spread

        check_seed(self.seed)
        settings = self.settings()
        found = read_parts(
            self.data, observed=self.observed, episodes=self.episodes, window=self.window, size=self.image_size,
            common=self.common_frames, mend=self.repair,
        )  # fmt: skip
        check_formats(self.formats, found.kind)
        self._announce(found)
        work = partial(
            describe_scene, folder=self.out, settings=settings, formats=self.formats,
            source=self.data.resolve().name, new_views=self.new_views,
        )  # fmt: skip
        for lines in spread(self.workers, self.address)(work, found.parts):
            print("\n".join(lines), flush=True)
        print(f"next: {self._next(found)}")

    def settings(self) -> Reconstruction:
        """What the flags say. Raises ValueError for an unknown motion."""
        from dataengine.fit import Fit
        from dataengine.reconstruct import Reconstruction

        for name, least in (("steps", 1), ("new_views", 0), ("workers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        quiet = self.workers > 1 or self.address is not None
        return Reconstruction(motion=self.motion, fit=Fit(steps=self.steps, seed=self.seed, quiet=quiet))

    def _announce(self, found: Parts) -> None:
        what = {"dataset": "dataset", "transforms": "nerfstudio capture", "colmap": "COLMAP model"}[
            found.kind
        ]
        announce(
            f"reconstruct: {count(len(found.parts), 'scene')} of the {what} {found.root}, "
            f"{count(self.steps, 'step')} each; {self._expect(found)}",
            *found.mended[:3],
            f"into {self.out} as {', '.join(self.formats)}; stopped, the same command goes on",
        )

    def _expect(self, found: Parts) -> str:
        from dataengine.progress import fit_seconds

        pixels, views = found.size[0] * found.size[1], len(found.views)
        return expect(
            sum(fit_seconds(self.steps, views, part.frames, pixels) for part in found.parts), self.workers
        )

    def _next(self, found: Parts) -> str:
        page = "open the page in a browser" if "page" in self.formats else ""
        if found.kind != "dataset":
            return page or command("enerverse reconstruct", data=self.data, out=self.out, formats="page")
        more = command("enerverse multiview", data=self.data, out=f"{self.data}_views", views=8)
        return f"{page}; {more}" if page else more


def describe_scene(part: Part, **options: Any) -> list[str]:
    """Make the scene of a part; what to say of it, the files among it."""
    from dataengine.scenes import make_scene

    made = make_scene(part, options.pop("folder"), options.pop("settings"), options.pop("formats"), **options)
    return [
        f"{part.name or part.title}: {count(len(made.scene), 'Gaussian')}, {count(made.scene.frames, 'frame')}; the views "
        f"come back with {made.figures['psnr']:.1f} dB",
        *(f"{name}: {path}" for name, path in made.files.items()),
    ]
