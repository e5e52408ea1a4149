"""What more workers bring: pictures recorded per second, and seconds for some fitted scenes, by one process and by two.

    python -m benchmarks.speed.parallel

Writes `speed/parallel.json`. In every round each candidate in turn records the same episodes, or fits the same scenes,
after a round that does not count; medians over the rounds, and the best round, are given.

- `alone`: `dataengine.record.record` in this process, which draws and encodes in two threads of its own. Fits: a loop.
- `one`, `two`: one and two Ray workers of one thread each, whose processes and environments are there already: the clock
  runs from the first reset until the last episode is collected into the dataset, or the last scene is saved.
- `two_cold`: `record_parallel` with two workers, with Ray and all processes started and ended within the clock.

`speedup` is `two` over `one`, the bar is 1.6; `over_alone` is `two` over `alone`. Two workers cannot be faster than the
cores that nobody else uses: `cores` says how many there are, `load` what wanted them before every round.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.results_io import write_result
from dataengine.episodes import EpisodeWriter
from dataengine.fit import Fit
from dataengine.lerobot import layout
from dataengine.parallel import record_parallel
from dataengine.parallel.cluster import connected
from dataengine.parallel.reconstruct import FitEpisode
from dataengine.parallel.record import Collection, PlayEpisode, fill
from dataengine.parallel.workers import Workers, hired
from dataengine.reconstruct import Reconstruction
from dataengine.record import record, writer_arguments
from enerverse.cli.record import Record, TaskEnv
from enerverse.cli.simulator import SeededExpert

BAR = 1.6
POLICY = partial(SeededExpert, noise=1.0, clean_share=0.25)
SEEDS = range(100_000)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """What is recorded and fitted, how often."""

    task: str = "Lift"
    image_size: int = 64
    episodes: int = 16
    """Recorded in each round."""
    cold_episodes: int = 64
    """Recorded where the start of the processes counts."""
    scenes: int = 4
    steps: int = 60
    """Of each fit."""
    rounds: int = 5
    case: str = "speed/parallel"


@dataclass
class Rounds:
    """Seconds of the candidates, round by round, and the load before each."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)

    def run(self, rounds: int, candidates: dict[str, Callable[[], object]]) -> None:
        """Every candidate once in each round, after one that does not count."""
        for turn in range(rounds + 1):
            self.load.append(os.getloadavg()[0])
            for name, call in candidates.items():
                began = time.perf_counter()
                call()
                if turn:
                    self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def result(self, unit: str, amount: float) -> dict[str, Any]:
        """`amount` of something per second, by candidate, and how they compare."""
        found: dict[str, Any] = {"load": self.load, "seconds": self.seconds}
        for kind, of in (("median", statistics.median), ("best", min)):
            rate = {name: amount / of(values) for name, values in self.seconds.items()}
            found[kind] = {f"{unit}_per_second": rate, "speedup": rate["two"] / rate["one"]}
            found[kind]["over_alone"] = rate["two"] / rate["alone"]
        return found


def recordings(settings: Parallel, folder: Path) -> dict[str, Any]:
    """Warm recording: each round adds the next episodes to the dataset of every candidate."""
    make = TaskEnv.of(Record(task=settings.task, out=folder, image_size=settings.image_size))
    env, rounds = make(), Rounds()
    arguments = writer_arguments(env)
    with contextlib.ExitStack() as stack:
        stack.callback(env.close)
        names = ("alone", "one", "two")
        writers = {name: stack.enter_context(EpisodeWriter(folder / name, **arguments)) for name in names}
        calls: dict[str, Callable[[], object]] = {
            "alone": partial(_more_alone, settings, env, writers["alone"])
        }
        for name, workers in (("one", 1), ("two", 2)):
            task = PlayEpisode(make, POLICY, folder / name / layout.PARTS, arguments, "success", None)
            crew = stack.enter_context(hired(task, workers=workers, address="auto"))
            calls[name] = partial(_more, settings, writers[name], crew)
        rounds.run(settings.rounds, calls)
        lengths = [[episode.length for episode in writer.episodes] for writer in writers.values()]
    assert lengths[0] == lengths[1] == lengths[2]
    frames = sum(lengths[0][settings.episodes :]) / settings.rounds
    return rounds.result("pictures", frames * len(arguments["views"]))


def _more_alone(settings: Parallel, env: Any, writer: EpisodeWriter) -> None:
    record(env, POLICY(env), writer, writer.finished + settings.episodes, progress=False)


def _more(settings: Parallel, writer: EpisodeWriter, crew: Workers) -> None:
    fill(Collection(writer, SEEDS, writer.finished + settings.episodes, {}), crew)


def cold_recordings(settings: Parallel, folder: Path) -> dict[str, Any]:
    """Recording with everything started anew, and by `record` in this process; pictures per second."""
    make = TaskEnv.of(Record(task=settings.task, out=folder, image_size=settings.image_size))
    with contextlib.closing(make()) as env:
        arguments, rates = writer_arguments(env), {}
        for name in ("alone", "two_cold"):
            with EpisodeWriter(folder / f"cold_{name}", **arguments) as writer:
                began = time.perf_counter()
                if name == "alone":
                    report = record(env, POLICY(env), writer, settings.cold_episodes, progress=False)
                else:
                    report = record_parallel(make, POLICY, writer, settings.cold_episodes, progress=False)
                seconds = time.perf_counter() - began
            rates[name] = report.frames * len(arguments["views"]) / seconds
    return {"pictures_per_second": rates, "episodes": settings.cold_episodes, "load": os.getloadavg()[0]}


def fits(settings: Parallel, folder: Path) -> dict[str, Any]:
    """Warm fitting: each round fits all scenes anew."""
    source, rounds = folder / "seen", Rounds()
    wanted = Record(
        task=settings.task, out=source, image_size=settings.image_size, cameras=(), ring=4, depth=True, bodies=True
    )  # fmt: skip
    env = TaskEnv.of(wanted)()
    with contextlib.closing(env), EpisodeWriter(source, **writer_arguments(env)) as writer:
        record(env, POLICY(env), writer, settings.scenes, max_steps=12, keep="all", progress=False)
    plan = Reconstruction(fit=Fit(steps=settings.steps, quiet=True))
    with contextlib.ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        for name, workers in (("alone", 0), ("one", 1), ("two", 2)):
            task = FitEpisode(source, folder / f"scenes_{name}", None, plan)
            crew = stack.enter_context(hired(task, workers=workers, address="auto")) if workers else None
            calls[name] = partial(_fit_all, settings, task, crew)
        rounds.run(settings.rounds, calls)
    return rounds.result("scenes", settings.scenes)


def _fit_all(settings: Parallel, task: FitEpisode, crew: Workers | None) -> None:
    shutil.rmtree(task.folder, ignore_errors=True)
    for index in range(settings.scenes):
        _ = crew.put(index) if crew else task(index)
    failures = [crew.take().failure for _ in range(settings.scenes)] if crew else []
    assert not any(failures), failures


def main(settings: Parallel) -> None:
    """Measure and write the result file."""
    began = time.perf_counter()
    torch.set_num_threads(1)
    values: dict[str, Any] = {"task": settings.task, "bar": BAR, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with connected(3, None):  # both crews at once: one that waits costs nothing
            values["recording"] = recordings(settings, folder)
            values["fitting"] = fits(settings, folder)
        values["cold"] = cold_recordings(settings, folder)
    values["reached"] = values["recording"]["median"]["speedup"] >= BAR
    print(json.dumps(values, indent=2))
    print(write_result(settings.case, values, seconds=time.perf_counter() - began))


if __name__ == "__main__":
    main(tyro.cli(Parallel))
