"""The page of the demo: films, curves and tables in one HTML file."""

from __future__ import annotations

import numpy as np

from enerverse.cli.messages import count
from enerverse.demo.results import DemoResults, Imaginations
from enerverse.demo.viewing import Viewed
from enerverse.films import comparison
from enerverse.report import Bar, Report

SIDE, SHOWN = 192, 392  # pixels of a picture; CSS pixels of a film, so that two stand side by side

INTRODUCTION = """
A world model watched the first frames of episodes that it never saw in training and imagined how they go on, in all
views at once; a policy that reads the same model's features acted in MuJoCo. Everything below was computed by the
run that wrote this file.

- **instruction**: the model knows the observed frames and the instruction, and has to guess how the arm moves.
- **actions**: it is also told the actions that were really taken, so it acts as a simulator.
- **copying** the last observed frame: the baseline that any model has to beat; most of a picture does not move.
"""


MEMORY = """
## Memory

CueDelayReach shows a colour for 8 frames, waits 64 frames, and then asks for the cube of that colour. Imagination
starts at the go signal, from the instruction alone. Sparse memory still holds a frame with the cue; with only the last
frames in memory the model cannot know which cube is meant.
"""


VIEWS = """
## From where no camera stood

Two cameras saw an episode. A 4D scene was fitted to them, a small network repaired what it showed from six other places,
and the scene was fitted again, twice. The films compare it with what cameras at yet other places would have seen, which
nothing was fitted to. The scene itself plays in `{page}`, beside this file.
"""


def build(results: DemoResults, title: str = "EnerVerse demo") -> Report:
    """The report of the demo; `write` it where it shall lie."""
    page = Report(title)
    page.text(INTRODUCTION)
    page.text("## Results").table(results.rows(), results.columns(), _about(results))
    page.text("## Success in MuJoCo").bars(
        [Bar(task, act.success.estimate, act.success.low, act.success.high)
         for task, act in results.acting.items()],
        "share of episodes solved, with 95 % Wilson interval", reference=("every episode", 1.0),
    )  # fmt: skip
    page.text("## Imagination")
    for task, part in results.imaginations.items():
        _imagination(page, task, part, results.fps)
    if results.memory is not None:
        _memory(page, results.memory, results.fps)
    if results.viewed is not None:
        _views(page, results.viewed)
    page.text("## The policy at work")
    for task, act in results.acting.items():
        page.text(f"### {task}").video(
            act.film, results.fps, f"{act.wins} of {act.episodes} solved; first view", width=act.film.shape[2]
        )
    page.text("## Time").table(results.timing(), ["what", "value"])
    return page


def _about(results: DemoResults) -> str:
    takes = sum(len(part.takes) for part in results.imaginations.values())
    frames = next(iter(results.imaginations.values())).length
    return (
        f"Imagination: PSNR in dB over the true frames, at most {frames}, and all views of {count(takes, 'episode')} with "
        "seeds outside the training data. Policy: episodes solved in MuJoCo with the 95 % Wilson interval, and mean "
        "control steps. "
        f"{results.checkpoint}."
    )


def _imagination(page: Report, task: str, part: Imaginations, fps: float) -> None:
    page.text(f"### {task}")
    _films(page, part, fps)
    _curves(page, part)


def _memory(page: Report, part: Imaginations, fps: float) -> None:
    page.text(MEMORY)
    _films(page, part, fps)
    _curves(page, part)


def _films(page: Report, part: Imaginations, fps: float) -> None:
    """Truth beside every version, one film per take, as long as the truth."""
    for index, (take, truth) in enumerate(zip(part.takes, part.truths, strict=True)):
        versions = {name: told.frames[index][: len(truth)] for name, told in part.versions.items()}
        film = comparison({"truth": truth, **versions}, take.views, side=SIDE)
        page.video(film, fps, f"{take.task}, from frame {part.seen} on", width=SHOWN)


def _curves(page: Report, part: Imaginations) -> None:
    curves = {name: (np.arange(1, len(values) + 1), values) for name, values in part.curves().items()}
    page.curve(
        curves, "imagined frame", "PSNR in dB", "Over all views and episodes, until the first one ends."
    )


def _views(page: Report, part: Viewed) -> None:
    page.text(VIEWS.format(page=part.page.name))
    seen = comparison({"observed": part.seen}, part.seen_views, side=SIDE)
    page.video(seen, part.fps, "what the two cameras saw", width=SHOWN // 2)
    decibels = ", ".join(f"{name} {value:.1f} dB" for name, value in part.psnr.items())
    page.video(
        comparison(part.films, part.views, side=SIDE), part.fps, f"PSNR: {decibels}", width=3 * SHOWN // 2
    )
