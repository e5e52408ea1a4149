"""`enerverse demo`: imagine and act in every task, and write one page about it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enerverse.cli.messages import announce, command, count, table
from enerverse.cli.simulator import check_task, demonstrate
from enerverse.loading import check_device, load_policy, load_world

if TYPE_CHECKING:
    from enerverse.demo.results import Acting, DemoResults, Imaginations
    from enerverse.demo.takes import Take
    from enerverse.demo.viewing import Viewed
    from enerverse.pipelines import EnerVersePipeline, EnerVersePolicy

DEMO_SEED = 90_000  # far from every seed of the training data
OBSERVED = {"CueDelayReach": 73}  # the go signal comes with frame 72
MEMORY_TASK = "CueDelayReach"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Imagine and act in every task with a trained checkpoint and write a report page (a few minutes)."""

    checkpoint: Path | None = None
    """Checkpoint or run folder; when not given, the shipped one."""
    out: Path = Path("runs/demo")
    """Folder of the report."""
    episodes: int = 10
    """Episodes that the policy plays per task."""
    tasks: tuple[str, ...] = ("Lift", "Push", "PickPlace", "OpenDrawer", "CueDelayReach")
    """Tasks to show."""
    takes: int = 2
    """Episodes to imagine per task."""
    frames: int = 32
    """Frames to imagine per episode."""
    observed: int = 4
    """Frames that the model sees before (CueDelayReach: up to the go signal)."""
    skip_scene: bool = False
    """Leave out new views of an episode of the first task from two cameras and the page that plays its 4D scene."""
    device: str | None = None
    """cpu or cuda; when not given, the GPU if there is one."""

    def run(self) -> None:
        """Measure, print the table, write the page."""
        self._check()
        pipe, policy = load_world(self.checkpoint, self.device), load_policy(self.checkpoint, self.device)
        pipe.set_progress_bar_config(disable=True)
        announce(
            f"demo: {', '.join(self.tasks)}",
            f"imagine {count(self.frames, 'frame')} of {count(self.takes, 'new episode')} per task, from the instruction "
            "and from the actions",
            f"let the policy play {count(self.episodes, 'episode')} per task in MuJoCo"
            + (", look at one from where no camera stood" if not self.skip_scene else ""),
            f"into {self.out / 'report.html'}; with the defaults about three minutes on two quiet cores",
        )
        results = measure(self, pipe, policy)
        from enerverse.demo.page import build

        path = build(results).write(self.out / "report.html")
        print(table(results.rows(), results.columns()))
        print(table(results.timing(), ["time", ""]))
        print(f"report: {path}")
        if results.viewed is not None:
            print(f"scene: {results.viewed.page}")
        further = command("enerverse imagine", checkpoint=self.checkpoint, device=self.device)
        print(f"next: open it in a browser; {further} --data DATASET")

    def _check(self) -> None:
        for task in self.tasks:
            check_task(task)
        for name in ("episodes", "takes", "frames", "observed"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.tasks:
            raise ValueError("tasks: expected at least one, got none")


@dataclass
class Clock:
    """Seconds by part of the work, said aloud as it goes."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, detail: str) -> Iterator[None]:
        """Count the block towards `name`."""
        if sys.stderr.isatty():
            print(f"  {name} {detail} ...", file=sys.stderr, flush=True)
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


def measure(settings: Demo, pipe: EnerVersePipeline, policy: EnerVersePolicy) -> DemoResults:
    """Record, imagine and play every task."""
    from enerverse.demo.results import DemoResults
    from enerverse.environment import device_name

    config: Any = pipe.config
    clock, imaginations, acting, memory = Clock(), {}, {}, None
    for task in settings.tasks:
        with clock.part("recording", task):
            takes = record_takes(settings, pipe, task)
        with clock.part("imagining", task):
            imaginations[task] = imagine_task(settings, pipe, task, takes)
        if task == MEMORY_TASK:
            with clock.part("imagining", "with other memories"):
                memory = compare_memories(settings, pipe, takes)
        with clock.part("acting", task):
            acting[task] = act(settings, policy, task)
    viewed = None
    if not settings.skip_scene:
        with clock.part("making views", settings.tasks[0]):
            viewed = make_views(settings, pipe)
    chunk_times = [told.chunk_ms for part in imaginations.values() for told in part.versions.values()]
    return DemoResults(
        imaginations=imaginations, acting=acting, memory=memory, viewed=viewed, seconds=clock.seconds,
        chunk_ms=sum(chunk_times) / len(chunk_times), chunk=pipe.unet.config.chunk, fps=config.fps,
        device=device_name(check_device(settings.device)),
        checkpoint=f"Checkpoint: {settings.checkpoint or 'shipped (tiny)'}",
    )  # fmt: skip


def record_takes(settings: Demo, pipe: EnerVersePipeline, task: str) -> list[Take]:
    """New demonstrations, in memory."""
    from enerverse.demo.takes import from_rollout

    config: Any = pipe.config
    views = tuple(config.views)
    played = demonstrate(task, views, config.image_size, settings.takes, DEMO_SEED)
    return [from_rollout(one.observations, one.infos, one.actions, views, config.fps) for one in played]


def imagine_task(settings: Demo, pipe: EnerVersePipeline, task: str, takes: list[Take]) -> Imaginations:
    """The same futures from the instruction alone and from the true actions."""
    from enerverse.demo.imagining import imagine
    from enerverse.demo.results import Imaginations

    seen = OBSERVED.get(task, settings.observed)
    check_observed(task, takes, seen)
    versions = {
        "instruction": imagine(pipe, takes, seen, settings.frames),
        "actions": imagine(pipe, takes, seen, settings.frames, told="actions"),
    }
    return Imaginations(takes=takes, seen=seen, versions=versions)


def check_observed(task: str, takes: list[Take], seen: int) -> None:
    """ValueError where a take ends before a frame is left to imagine."""
    shortest = min(map(len, takes))
    if seen >= shortest:
        raise ValueError(
            f"observed: expected at most {shortest - 1}, one frame less than the shortest episode of {task}, got {seen}"
        )


def compare_memories(settings: Demo, pipe: EnerVersePipeline, takes: list[Take]) -> Imaginations:
    """CueDelayReach from the go signal on, with memory of the cue and without."""
    from enerverse.demo.imagining import imagine
    from enerverse.demo.results import Imaginations

    seen = OBSERVED[MEMORY_TASK]
    versions = {
        name: imagine(pipe, takes, seen, 3 * pipe.unet.config.chunk, memory=policy)
        for name, policy in (("sparse memory", "sparse_uniform"), ("last frames only", "dense"))
    }
    return Imaginations(takes=takes, seen=seen, versions=versions)


def act(settings: Demo, policy: EnerVersePolicy, task: str) -> Acting:
    """Let the policy play on its own seeds."""
    from enerverse.cli.playing import play
    from enerverse.demo.results import Acting

    played = play(policy, task, range(DEMO_SEED + 1000, DEMO_SEED + 1000 + settings.episodes))
    return Acting(
        wins=sum(outcome.success for outcome in played.outcomes), episodes=len(played.outcomes),
        success=played.success, steps=played.steps, decision_ms=played.decision_ms, film=played.film(),
    )  # fmt: skip


def make_views(settings: Demo, pipe: EnerVersePipeline) -> Viewed:
    """New views of an episode of the first task: two cameras of a ring are fitted, six look for the generator, and those
    between are only compared with."""
    from tempfile import TemporaryDirectory

    from dataengine.episodes import EpisodeDataset
    from dataengine.views import Views
    from enerverse.cli.record import Record, record_task
    from enerverse.demo.viewing import view

    config: Any = pipe.config
    with TemporaryDirectory() as folder:
        record_task(
            Record(
                task=settings.tasks[0], out=Path(folder) / "data", episodes=1, seed=DEMO_SEED, cameras=(), ring=8,
                holdout_ring=4, bodies=True, depth=True, image_size=config.image_size,
            )
        )  # fmt: skip
        views = Views.from_episode(EpisodeDataset(Path(folder) / "data")[0])
    rings = [name for name in views.names if name.startswith("ring")]
    seen, between = (rings[2], rings[5]), [name for name in views.names if name not in rings]
    anchors = [name for name in rings if name not in seen]
    return view(
        views.select(seen), views.select(anchors), views.select(between[1:3]), settings.out / "scene.html"
    )
