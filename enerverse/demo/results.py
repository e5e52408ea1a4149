"""What the demo measured, in the form in which the page and the terminal show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from enerverse.demo.imagining import Imagined, frame_psnr, mean_psnr
from enerverse.demo.takes import Take
from enerverse.demo.viewing import Viewed
from enerverse.metrics import Interval

COPY = "copying the last frame"


@dataclass(frozen=True, kw_only=True)
class Imaginations:
    """Several versions of the same future of the same takes: name -> imagined; `seen` frames were observed."""

    takes: list[Take]
    seen: int
    versions: Mapping[str, Imagined]

    @property
    def length(self) -> int:
        """Imagined frames per take."""
        return next(iter(self.versions.values())).frames.shape[1]

    @property
    def truths(self) -> list[np.ndarray]:
        """What really happened after the observed frames, per take uint8 [T, V, P, P, 3]."""
        return [take.pictures[self.seen : self.seen + self.length] for take in self.takes]

    def curves(self) -> dict[str, np.ndarray]:
        """PSNR per frame [T'] of each version and of copying, as far as every take has a true frame."""
        shortest = min(self.length, *map(len, self.truths))
        return {name: values[:shortest] for name, values in self._frame_psnr().items()}

    def means(self) -> dict[str, float]:
        """PSNR of each version and of copying over all true frames."""
        return {name: mean_psnr(values) for name, values in self._frame_psnr().items()}

    def _frame_psnr(self) -> dict[str, np.ndarray]:
        still = [take.pictures[self.seen - 1 : self.seen].repeat(self.length, 0) for take in self.takes]
        versions = {name: list(version.frames) for name, version in self.versions.items()}
        return {name: frame_psnr(frames, self.truths) for name, frames in {**versions, COPY: still}.items()}


@dataclass(frozen=True, kw_only=True)
class Acting:
    """Success of the policy in one task, speed, and the film of its episodes uint8 [T, H, W, 3]."""

    wins: int
    episodes: int
    success: Interval
    steps: float
    decision_ms: float
    film: np.ndarray


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """Everything on the page: per task imaginations and acting; the memory comparison if its task was asked for, and new
    views of an episode if they were; milliseconds per chunk of one take; seconds by part."""

    imaginations: Mapping[str, Imaginations]
    acting: Mapping[str, Acting]
    memory: Imaginations | None
    viewed: Viewed | None
    chunk_ms: float
    chunk: int
    fps: float
    device: str
    checkpoint: str
    seconds: Mapping[str, float]

    @property
    def decision_ms(self) -> float:
        """Mean milliseconds per decision over the tasks."""
        return float(np.mean([acting.decision_ms for acting in self.acting.values()]))

    def rows(self) -> list[list[object]]:
        """One row per task: PSNR in dB of each version and of copying, success with its interval, mean steps; numbers as
        text, so that a column has one format on the page and on the terminal."""
        return [self._row(task) for task in self.acting]

    def _row(self, task: str) -> list[object]:
        means = [f"{value:.1f}" for value in self.imaginations[task].means().values()]
        act = self.acting[task]
        interval = f"{100 * act.success.low:.0f} to {act.success.high:.0%}"
        return [task, *means, f"{act.wins} of {act.episodes}", interval, f"{act.steps:.1f}"]

    def columns(self) -> list[str]:
        """Names of the cells of `rows`."""
        return ["task", "instruction", "actions", "copying", "solved", "95 % interval", "steps"]

    def timing(self) -> list[list[object]]:
        """Speed and duration as (what, value) rows."""
        parts: list[list[object]] = [
            [f"seconds {name}", f"{value:.1f}"] for name, value in self.seconds.items()
        ]
        return [
            ["device", self.device],
            [f"ms per chunk of {self.chunk} frames, all views", f"{self.chunk_ms:.1f}"],
            ["ms per decision of the policy", f"{self.decision_ms:.1f}"],
            *parts,
            ["seconds in total", f"{sum(self.seconds.values()):.1f}"],
        ]
