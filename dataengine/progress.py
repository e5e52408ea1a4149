"""How far long work is: a bar on a terminal, elsewhere a line now and then; and how long it may take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines
PER_VIEW, PER_PIXEL = (
    0.014,
    2e-6,
)  # seconds of one view in an optimiser step, and of each of its pixels: one core of an EPYC


class Lines:
    """What `tqdm` is on a terminal, for a log: one line to standard error about every :data:`EVERY` seconds."""

    def __init__(self, *, total: int, initial: int = 0, desc: str, unit: str):
        self.total, self.done, self.first, self.desc, self.unit = total, initial, initial, desc, unit
        self.began = self.told = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.told >= EVERY:
            self.told = now
            left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
            ahead = f", {about(left)} left" if self.done < self.total else ""
            print(
                f"{self.desc}: {self.done} of {self.total} {self.unit}s{ahead}", file=sys.stderr, flush=True
            )

    def set_postfix(self, **_: Any) -> None:
        """Lines have none."""


def make_bar(
    *, total: int, initial: int = 0, desc: str, unit: str, quiet: bool = False, leave: bool = True
) -> Lines | tqdm[Any]:
    """What counts `total` pieces of work, of which `initial` are done, and shows it unless `quiet`."""
    if quiet or sys.stderr.isatty():
        return tqdm(total=total, initial=initial, desc=desc, unit=unit, disable=quiet, leave=leave)
    return Lines(total=total, initial=initial, desc=desc, unit=unit)


def counted(first: int, last: int, bar: Lines | tqdm[Any]) -> Iterator[int]:
    """The numbers from `first` to `last`, without the latter, each counted once it is done with."""
    with bar:
        for number in range(first, last):
            yield number
            bar.update()


def fit_seconds(steps: int, views: int, frames: int, pixels: int) -> float:
    """About how long it takes to start a scene, fit and measure it on one core, in seconds.

    Args:
        steps: of the optimiser, which looks at all views of one frame in each.
        views, frames: of the scene; starting and measuring cost about a step a frame.
        pixels: of one picture; as a Gaussian starts from about every other one, they stand for the Gaussians too.
    """
    return (steps + frames) * views * (PER_VIEW + PER_PIXEL * pixels)


def about(seconds: float) -> str:
    """A time in words, to one unit: `about 40 seconds`, `about 3 minutes`, `about 2 hours`."""
    for unit, size in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.0f} {unit}s"
    return "about a minute" if seconds > 45 else f"about {max(5, 5 * round(seconds / 5))} seconds"
