"""The page of the demo: films, curves and tables in one HTML file."""

from __future__ import annotations

import numpy as np

from enerverse.demo.results import DemoResults, Imaginations
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
        _imagination(page, f"{task}: {part.takes[0].task}", part, results.fps)
    if results.memory is not None:
        _memory(page, results.memory, results.fps)
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
        f"Imagination: PSNR in dB over {frames} frames and all views of {takes} episodes with seeds outside the "
        "training data. Policy: episodes solved in MuJoCo with the 95 % Wilson interval, and mean control steps. "
        f"{results.checkpoint}."
    )


def _imagination(page: Report, title: str, part: Imaginations, fps: float) -> None:
    page.text(f"### {title}")
    for index in range(min(2, len(part.takes))):
        film = _film(part, index)
        page.video(film, fps, f"Episode {index + 1}, from frame {part.seen} on.", width=SHOWN)
    page.curve(
        {name: (_times(part), values) for name, values in part.curves().items()},
        "imagined frame", "PSNR in dB", "Mean over episodes and views.",
    )  # fmt: skip


def _memory(page: Report, part: Imaginations, fps: float) -> None:
    page.text(
        "## Memory\n\nCueDelayReach shows a colour for 8 frames, waits 64 frames, and then asks for the cube of that "
        "colour. Imagination starts at the go signal. Sparse memory still holds a frame with the cue; with only the "
        "last frames in memory the model cannot know which cube is meant."
    )
    for index in range(len(part.takes)):
        film = _film(part, index)
        page.video(film, fps, f"Episode {index + 1}, after the go signal.", width=SHOWN)
    page.curve(
        {name: (_times(part), values) for name, values in part.curves().items()},
        "imagined frame", "PSNR in dB", "Frames after the go signal, mean over episodes and views.",
    )  # fmt: skip


def _film(part: Imaginations, index: int) -> np.ndarray:
    columns = {"truth": part.truths[index]}
    columns |= {name: version.frames[index] for name, version in part.versions.items()}
    return comparison(columns, part.takes[index].views, side=SIDE)


def _times(part: Imaginations) -> np.ndarray:
    return np.arange(1, part.length + 1)
