"""Record episodes in several processes into one dataset, the same as one process would have recorded."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from dataengine.errors import DatasetWriteError, in_words
from dataengine.lerobot import layout, metadata
from dataengine.lerobot.stored import StoredEpisode
from dataengine.lerobot.writer import EpisodeWriter
from dataengine.parallel.cluster import import_ray
from dataengine.parallel.workers import Workers, failed, hired
from dataengine.record import RecordReport, check_request, play_episode, record, too_few
from dataengine.recorder import Recorder

DROPPED = "dropped-"  # a file with this name and a seed notes that the seed was tried and gave nothing


def record_parallel(
    make_env: Callable[[], Any],
    make_policy: Callable[[Any], Any],
    writer: EpisodeWriter,
    episodes: int,
    seed: int = 0,
    *,
    workers: int = 2,
    address: str | None = None,
    retries: int = 2,
    keep: Literal["success", "all"] = "success",
    max_steps: int | None = None,
    max_tries: int | None = None,
    progress: bool = True,
) -> RecordReport:
    """What :func:`dataengine.record.record` does, by several processes; the files are the same, byte by byte.

    Every process plays whole episodes with one thread and writes them as parts below the folder of the dataset. This
    process collects them in the order of their seeds: files are linked, nothing is coded twice. Parts that were not
    collected when a recording stopped serve the next one of the same environment, policy and features. One worker
    without an address is :func:`record` in this process.

    Args:
        make_env, make_policy: make an environment, and the policy for it; both can be pickled. What is played must
            depend on the seed of the episode alone, not on the episodes before.
        writer: open writer with the environment's features; on a cluster, in a folder that all its machines share.
        episodes, seed, keep, max_steps, max_tries, progress: as for :func:`record`.
        workers, address, retries: as for :func:`dataengine.parallel.fan_out`.

    Raises:
        WorkError: an episode that raised, or whose process died each time; those in hand are finished before.
        ValueError, ImportError, ConnectionError, OSError: as :func:`dataengine.parallel.fan_out` says.
        DatasetError: as :func:`record` says.
    """
    began, seeds = time.perf_counter(), range(seed, seed + check_request(episodes, keep, max_tries))
    home = writer.root.resolve() / layout.PARTS
    task = PlayEpisode(make_env, make_policy, home, writer.arguments, keep, max_steps)
    collection = Collection(writer, seeds, episodes, find_parts(task.parts))
    collection.collect()
    if workers == 1 and address is None:
        with contextlib.closing(make_env()) as env:
            here = record(
                env, make_policy(env), writer, episodes, seed,
                keep=keep, max_steps=max_steps, max_tries=max_tries, progress=progress,
            )  # fmt: skip
        collection.count(here)
    elif collection.missing:
        with (
            _bar(collection, progress) as bar,
            hired(task, workers=workers, address=address, retries=retries) as crew,
        ):
            fill(collection, crew, bar.update)
    shutil.rmtree(home, ignore_errors=True)  # a process that was stopped just now may still write there
    if collection.missing:
        raise too_few(writer, episodes - collection.missing, episodes, seeds)
    return collection.report(time.perf_counter() - began)


def _bar(collection: Collection, progress: bool) -> tqdm:
    total = collection.episodes
    visible = progress and sys.stderr.isatty()
    return tqdm(
        total=total, initial=total - collection.missing, unit="episode", desc="record", disable=not visible
    )


def fill(collection: Collection, crew: Workers, show: Callable[[int], object] | None = None) -> None:
    """Have seeds played by workers on :class:`PlayEpisode` until the dataset has what it shall have, or no seed is left;
    `show` is told how many episodes have come each time."""
    upcoming = iter([seed for seed in collection.seeds_left if seed not in collection.parts])
    seed, busy, failures = next(upcoming, None), 0, []
    while (collection.missing and not failures and seed is not None) or busy:
        while seed is not None and not failures and crew.idle and collection.wants(seed, busy):
            crew.put(seed)
            seed, busy = next(upcoming, None), busy + 1
        if not collection.missing:
            return  # what is still played is not needed
        outcome, busy = crew.take(), busy - 1
        if outcome.failure is not None:
            failures.append((f"seed {outcome.item}", outcome))
        else:
            collection.parts[outcome.item] = outcome.value
            came = collection.collect()
            _ = show(came) if show else None
    if failures:
        raise failed(failures, collection.tried + len(failures))


@dataclass
class Collection:
    """A dataset into which parts are collected in the order of their seeds.

    Attributes:
        writer: of the dataset.
        seeds: which may be tried.
        episodes: how many of them the dataset shall hold.
        parts: seed -> the episode played with it, None where it was dropped; those not collected yet.
    """

    writer: EpisodeWriter
    seeds: range
    episodes: int
    parts: dict[int, StoredEpisode | None]
    tried: int = 0
    kept: int = 0
    frames: int = 0

    def __post_init__(self) -> None:
        done = [seed for seed in self.writer.seeds if seed in self.seeds]
        self.held, self._next = len(done), max(done, default=self.seeds.start - 1) + 1

    @property
    def missing(self) -> int:
        """How many episodes the dataset lacks."""
        return max(0, self.episodes - self.held - self.kept)

    @property
    def seeds_left(self) -> range:
        """Seeds after those that are collected or dropped."""
        return range(self._next, self.seeds.stop)

    def wants(self, seed: int, busy: int) -> bool:
        """Whether `seed` is worth playing while `busy` seeds before it are: not where the parts before it and those, kept
        as often as others were, will be enough."""
        before = [self.parts[s] for s in range(self._next, seed) if s in self.parts]
        kept, tried = sum(part is not None for part in before), self.tried + len(before)
        rate = (self.kept + kept + 1) / (tried + 1)
        return kept + busy * rate < self.missing

    def collect(self) -> int:
        """Take over parts as far as no seed before them is open; how many episodes came."""
        before = self.kept
        while self.missing and self._next in self.parts:
            part = self.parts.pop(self._next)
            if part is not None:
                self.writer.adopt_episode(part)
                part.remove()
                self.kept, self.frames = self.kept + 1, self.frames + part.meta.length
            self.tried, self._next = self.tried + 1, self._next + 1
        return self.kept - before

    def count(self, report: RecordReport) -> None:
        """Add what was recorded without parts."""
        self.tried, self.kept = self.tried + report.tried, self.kept + report.kept
        self.frames += report.frames

    def report(self, seconds: float) -> RecordReport:
        return RecordReport(self.kept, self.tried, self.frames, seconds, self.held)


def find_parts(folder: Path) -> dict[int, StoredEpisode | None]:
    """The parts below `folder`, by seed."""
    found: dict[int, StoredEpisode | None] = {}
    for root in folder.iterdir() if folder.is_dir() else ():
        if root.name.startswith(DROPPED):
            found[int(root.name.removeprefix(DROPPED))] = None
        else:
            metas = metadata.read_episode_table(root, damaged=[]).values()
            found |= {meta.seed: StoredEpisode(root, meta) for meta in metas if meta.seed is not None}
    return found


@dataclass(frozen=True)
class PlayEpisode:
    """A task: play the episode of a seed and keep it as a part. Each process makes its environment once.

    Attributes:
        make_env, make_policy, keep, max_steps: as for :func:`record_parallel`.
        home: folder of all parts of the dataset.
        features: arguments of the writer.
    """

    make_env: Callable[[], Any]
    make_policy: Callable[[Any], Any]
    home: Path
    features: Mapping[str, Any]
    keep: str
    max_steps: int | None

    @property
    def parts(self) -> Path:
        """Where the parts of this task lie, apart from those of another one on the same dataset."""
        what = (self.make_env, self.make_policy, dict(self.features), self.keep, self.max_steps)
        return self.home / hashlib.sha256(_pickled(what)).hexdigest()[:16]

    @cached_property
    def _stage(self) -> tuple[Any, Any, EpisodeWriter, Recorder]:
        """What one process plays with."""
        env = self.make_env()
        writer = EpisodeWriter(self.parts / uuid.uuid4().hex[:16], **self.features)
        policy = self.make_policy(env)
        return env, policy, writer, Recorder(env, policy, writer, threads=False).__enter__()

    def __call__(self, seed: int) -> StoredEpisode | None:
        env, policy, writer, recorder = self._stage
        try:
            length = play_episode(env, policy, recorder, seed, self.keep, self.max_steps)
        except DatasetWriteError as error:  # whose sentence tells of the parts, which nobody asked for
            reason = in_words(error.__cause__ or error)
            raise DatasetWriteError(f"{self.home}: cannot write ({reason})", errno=error.errno) from error
        except BaseException:
            writer.discard_episode()
            raise
        if length:
            return StoredEpisode(writer.root, writer.episodes[-1])
        (self.parts / f"{DROPPED}{seed}").touch()
        return None


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):  # a function without a name
        with contextlib.suppress(ImportError):
            return import_ray().cloudpickle.dumps(value)
        return b""  # without Ray nobody has left parts
