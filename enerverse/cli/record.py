"""`enerverse record`: demonstrations of a simulator task as an episode dataset."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enerverse.cli.failures import same_command
from enerverse.cli.messages import announce, command, count
from enerverse.cli.simulator import SeededExpert, check_seed, check_task, make_env

if TYPE_CHECKING:
    import gymnasium

    from dataengine.episodes import EpisodeDataset
    from dataengine.record import RecordReport
    from sims.cameras import CameraPlacement

SETTINGS = Path("meta", "record.json")
BOUND = (
    "task", "noise", "clean_share", "cameras", "ring", "holdout_ring", "image_size", "segmentation", "bodies", "depth",
    "randomize",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Record:
    """Record demonstrations of a task into a LeRobot v3 dataset (with cameras); run again to go on."""

    task: str
    """One of the simulator's tasks; `enerverse info` lists them."""
    out: Path
    """Dataset folder; made where missing, gone on with where not."""
    episodes: int = 50
    """How many successful episodes the dataset shall hold."""
    seed: int = 0
    """First seed; every episode takes the next one."""
    noise: float = 1.0
    """Strength of the disturbance on the expert (the clean action is kept as the label)."""
    clean_share: float = 0.25
    """Share of episodes without disturbance."""
    cameras: tuple[str, ...] = ("front", "left", "top")
    """Views to record."""
    ring: int = 0
    """How many more cameras stand around the table, `ring_00` and so on."""
    holdout_ring: int = 0
    """How many cameras stand between those, `holdout_00` and so on: to test what was made from the others."""
    image_size: int = 64
    """Side of the square pictures, in pixels."""
    segmentation: bool = False
    """Record what each pixel belongs to."""
    bodies: bool = False
    """Record the pose of every robot link and object, and which of them each pixel shows."""
    depth: bool = False
    """Record depth in metres."""
    randomize: bool = False
    """Draw colours, light and cameras anew in every episode."""
    workers: int = 1
    """How many processes record at once; what is recorded does not depend on it."""
    address: str | None = None
    """Of a Ray cluster whose machines share the dataset folder, such as head:6379; when not given, they run here."""

    def run(self) -> None:
        """Record and say where it lies."""
        check_record(self)
        announce(
            f"record: {count(self.episodes, 'demonstration')} of {self.task}, seeds from {self.seed} on",
            *([f"by {workers_in_words(self)}"] if self.workers > 1 or self.address else []),
            f"views: {views_in_words(self)}, {self.image_size} x {self.image_size} pixels",
            f"into {self.out}; Ctrl-C keeps finished episodes, the same command goes on",
        )
        report = record_task(self)
        if not report.tried:
            print(f"{self.out}: already holds {count(report.held, 'episode')} with seeds from {self.seed} on")
        else:
            print(
                f"kept {report.kept} of {count(report.tried, 'episode')}, {count(report.frames, 'frame')} "
                f"in {report.seconds:.0f} s: {self.out}"
            )
        print(f"next: {command('enerverse train autoencoder', data=self.out, out='runs/mine')}")


def record_task(settings: Record) -> RecordReport:
    """Do what `settings` say. Raises ValueError where the dataset was recorded with other settings."""
    from dataengine.episodes import EpisodeWriter
    from dataengine.parallel import record_parallel
    from dataengine.record import writer_arguments

    check_record(settings)
    make = TaskEnv.of(settings)
    with contextlib.closing(make()) as env:
        arguments = writer_arguments(env)
    with (
        same_command(settings.out),
        EpisodeWriter(settings.out, robot_type="panda", **arguments) as writer,
    ):
        _write_settings(settings)
        policy = partial(SeededExpert, noise=settings.noise, clean_share=settings.clean_share)
        return record_parallel(
            make, policy, writer, settings.episodes, settings.seed,
            workers=settings.workers, address=settings.address,
        )  # fmt: skip


@dataclass(frozen=True)
class TaskEnv:
    """Makes the environment that settings ask for; equal for settings that may fill one dataset."""

    settings: Record

    @classmethod
    def of(cls, settings: Record) -> TaskEnv:
        """For these settings without those that do not bind a dataset."""
        return cls(replace(settings, out=Path(), episodes=1, seed=0, workers=1, address=None))

    def __call__(self) -> gymnasium.Env:
        """A new environment."""
        settings, free = self.settings, free_cameras(self.settings)
        wanted = {"segmentation": settings.segmentation, "bodies": settings.bodies, "depth": settings.depth}
        return make_env(
            settings.task, cameras=(*settings.cameras, *free), free_cameras=free, image_size=settings.image_size,
            modalities=("rgb", *(name for name, on in wanted.items() if on)), randomize=settings.randomize,
        )  # fmt: skip


def free_cameras(settings: Record) -> dict[str, CameraPlacement]:
    """The cameras on the ring and those held out, by name."""
    from sims.cameras import holdout_ring, ring

    found = ring(settings.ring) if settings.ring else {}
    beside = settings.ring or settings.holdout_ring
    return found | (holdout_ring(settings.holdout_ring, beside=beside) if settings.holdout_ring else {})


def views_in_words(settings: Record) -> str:
    """Names of the built-in views and numbers of the others."""
    rings = {"on a ring": settings.ring, "held out": settings.holdout_ring}
    return ", ".join([*settings.cameras, *(f"{number} {where}" for where, number in rings.items() if number)])


def workers_in_words(settings: Record) -> str:
    """How many processes there are, and where."""
    return f"{settings.workers} process{'es' * (settings.workers > 1)}" + (
        f" of the cluster at {settings.address}" if settings.address else ""
    )


def check_record(settings: Record) -> None:
    """ValueError for settings that cannot be, or that are not those of the dataset in `out`."""
    check_task(settings.task)
    check_seed(settings.seed)
    if settings.episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {settings.episodes}")
    if settings.workers < 1:
        raise ValueError(f"workers: expected at least 1, got {settings.workers}")
    for name in ("ring", "holdout_ring"):
        if getattr(settings, name) < 0:
            raise ValueError(f"{name}: expected 0 or more cameras, got {getattr(settings, name)}")
    if not settings.noise >= 0:
        raise ValueError(f"noise: expected 0 or more, got {settings.noise}")
    if not 0 <= settings.clean_share <= 1:
        raise ValueError(f"clean_share: expected a share from 0 to 1, got {settings.clean_share}")
    there, here = read_settings(settings.out), bound_settings(settings)
    for key, value in there.items():
        if key in here and value != here[key]:
            raise ValueError(
                f"{key}: expected {value} as in the dataset in {settings.out}, got {here[key]}; choose another --out"
            )


def bound_settings(settings: Record) -> dict[str, Any]:
    """What all episodes of a dataset have in common, as JSON holds it."""
    values = {name: getattr(settings, name) for name in BOUND}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def read_settings(folder: Path) -> dict[str, Any]:
    """With what the episodes in `folder` were recorded; of a dataset without `meta/record.json` the task alone; empty
    where there is no episode. Raises DatasetError for a damaged dataset."""
    from dataengine.episodes import EpisodeDataset
    from enerverse.files import read_json

    if not any((folder / "meta" / "episodes").glob("*/*.parquet")):
        return {}
    path = folder / SETTINGS
    return read_json(path) if path.is_file() else find_task(EpisodeDataset(folder))


def find_task(dataset: EpisodeDataset) -> dict[str, Any]:
    """`{"task": name}` as the simulator's facts of the first episode tell it; empty where they are not recorded."""
    from sims.env import PRIVILEGED_SIZE
    from sims.tasks import TASKS

    facts = dataset.episode(0, stop=1, views=()).extra.get("privileged")
    if facts is None or facts.shape[1] != PRIVILEGED_SIZE:
        return {}
    return {"task": list(TASKS)[int(facts[0, -len(TASKS) :].argmax())]}


def recorded_task(folder: Path) -> str:
    """The simulator's task in a dataset, "TASK" where it is none of them."""
    return str(read_settings(folder).get("task", "TASK"))


def _write_settings(settings: Record) -> None:
    from enerverse.files import atomic_write

    with atomic_write(settings.out / SETTINGS) as temporary:
        temporary.write_text(json.dumps(bound_settings(settings), indent=2) + "\n", encoding="utf-8")
