"""A task called once per item by several processes; a process that dies costs a second try, never the work of others."""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import cv2
from tqdm import tqdm

from dataengine.errors import WorkError, is_full
from dataengine.parallel.cluster import connected

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome:
    """What became of an item: the task's value, or where `failure` says why there is none.

    Attributes:
        item, value: as given and as returned.
        failure: the reason in words, None where there is a value.
        full: whether the reason is a full disk.
        trace: where in the task it happened, for the log.
    """

    item: Any
    value: Any = None
    failure: str | None = None
    full: bool = False
    trace: str = ""


class Workers(Protocol):
    """Processes that take items and give outcomes, in no certain order."""

    def put(self, item: Any) -> None:
        """Have a task called on an item as soon as a process is free."""

    def take(self) -> Outcome:
        """The next outcome; waits for one. An item must be there."""
        ...

    @property
    def idle(self) -> int:
        """How many further items could begin at once."""
        ...


def fan_out(
    task: Callable[[Item], Value],
    items: Sequence[Item],
    *,
    workers: int = 2,
    address: str | None = None,
    retries: int = 2,
    name: Callable[[Item], str] = str,
    progress: bool = True,
) -> list[Value]:
    """``[task(item) for item in items]``, several at a time.

    One worker without an address is this process, without Ray. Otherwise every worker is a process with one thread: on
    this machine, or where a cluster is at `address`. There all paths must lead to the same files as here, and the same
    packages must be installed. Results must be small; what is large belongs on disk, where a task that finds it finished
    can return at once: then running again does only what is missing.

    Args:
        task: a function, or an object with ``__call__``, that can be pickled; each process gets a copy, which it keeps
            for all its items.
        items: whatever can be pickled.
        workers: how many items are worked on at a time.
        address: of a Ray cluster, ``HOST:6379`` or ``auto`` for one on this machine; None for none.
        retries: how often an item is given to another process when the one that had it died.
        name: what to call an item in an error.
        progress: show a bar on a terminal.

    Returns:
        The values in the order of the items.

    Raises:
        ValueError: fewer than one worker, fewer than no retries.
        ImportError: ray is not installed.
        ConnectionError: no cluster answers at `address`.
        WorkError: items for which the task raised, or whose process died each time; the others are finished first.
        OSError: the disk is full; items in hand are finished, no further one is begun.
    """
    results: dict[int, Value] = {}
    failures: list[tuple[str, Outcome]] = []
    with (
        hired(Numbered(task), workers=workers, address=address, retries=retries) as crew,
        tqdm(total=len(items), unit="item", disable=None if progress else True, leave=False) as bar,
    ):
        waiting, busy, full = deque(enumerate(items)), 0, False
        while busy or (waiting and not full):
            while waiting and crew.idle and not full:
                crew.put(waiting.popleft())
                busy += 1
            outcome = crew.take()
            index, busy, full = outcome.item[0], busy - 1, full or outcome.full
            if outcome.failure is None:
                results[index] = outcome.value
            else:
                failures.append((name(items[index]), outcome))
            bar.update()
    if failures:
        raise failed(failures, len(items))
    return [results[index] for index in range(len(items))]


@dataclass(frozen=True)
class Numbered:
    """A task for numbered items."""

    task: Callable[[Any], Any]

    def __call__(self, item: tuple[int, Any]) -> Any:
        return self.task(item[1])


def failed(failures: Sequence[tuple[str, Outcome]], count: int) -> Exception:
    """The error for items, by name, that failed out of `count`."""
    kept = "what is finished is kept"
    for name, outcome in failures:
        if outcome.full:
            error = OSError(f"{name}: {outcome.failure}; {kept}; free some space and run again for the rest")
            error.errno = errno.ENOSPC
            return error
    sentences = [f"{name}: {outcome.failure}" for name, outcome in failures]
    listed = "; ".join(sentences[:3]) + (f"; and {len(sentences) - 3} more" if len(sentences) > 3 else "")
    error = WorkError(
        f"{len(failures)} of {count} failed: {listed}; {kept}, run again for the rest",
        [name for name, _ in failures],
    )
    error.add_note(failures[0][1].trace)
    return error


@contextlib.contextmanager
def hired(
    task: Callable[[Any], Any], *, workers: int, address: str | None = None, retries: int = 2
) -> Iterator[Workers]:
    """Workers for a task; on leaving, those that still work are stopped. Arguments and errors as in :func:`fan_out`."""
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if retries < 0:
        raise ValueError(f"retries: expected at least 0, got {retries}")
    if workers == 1 and address is None:
        yield Here(task)
        return
    with connected(workers, address) as ray:
        crew = RayWorkers(ray, task, workers, retries)
        try:
            yield crew
        finally:
            crew.stop()


def attempt(task: Callable[[Any], Any], item: Any) -> Outcome:
    """Call a task on an item; what it raises becomes words, because not every error can be sent between processes."""
    try:
        return Outcome(item, task(item))
    except Exception as error:
        words = " ".join(str(error).split())
        named = isinstance(error, (ValueError, OSError, ImportError)) and words  # sentences of their own
        reason = words if named else f"{type(error).__name__}: {words}"
        return Outcome(item, None, reason, is_full(error), traceback.format_exc())


class Here:
    """This process, which works when an outcome is asked for."""

    def __init__(self, task: Callable[[Any], Any]) -> None:
        self._task, self._waiting = task, deque[Any]()

    @property
    def idle(self) -> int:
        return int(not self._waiting)

    def put(self, item: Any) -> None:
        self._waiting.append(item)

    def take(self) -> Outcome:
        return attempt(self._task, self._waiting.popleft())


class _Process:
    """What runs in a process of Ray: a copy of the task, and one thread for it."""

    def __init__(self, task: Callable[[Any], Any]) -> None:
        cv2.setNumThreads(1)
        if "torch" in sys.modules:  # else it will read OMP_NUM_THREADS, which Ray has set
            sys.modules["torch"].set_num_threads(1)
        self._task = task

    def begin(self) -> None:
        """Answered as soon as the process stands."""

    def work(self, item: Any) -> Outcome:
        return attempt(self._task, item)


@dataclass
class _Job:
    """An item, or None for a process that is to begin, and how many processes died of it."""

    item: Any
    deaths: int = 0


class RayWorkers:
    """Processes of Ray, replaced when they die."""

    def __init__(self, ray: Any, task: Callable[[Any], Any], count: int, retries: int) -> None:
        self._ray, self._retries = ray, retries
        self._task = ray.put(task)
        self._kind = ray.remote(num_cpus=1, max_restarts=0)(_Process)  # Ray sets OMP_NUM_THREADS to num_cpus
        self._free: list[Any] = []
        self._waiting = deque[_Job]()
        self._asked: dict[Any, tuple[Any, _Job]] = {}  # answer to come -> who was asked what
        for _ in range(count):
            self._hire(_Job(None))

    def _hire(self, job: _Job) -> None:
        process = self._kind.remote(self._task)
        self._asked[process.begin.remote()] = (process, job)

    @property
    def idle(self) -> int:
        beginning = sum(job.item is None for _, job in self._asked.values())
        return len(self._free) + beginning - len(self._waiting)

    def put(self, item: Any) -> None:
        self._waiting.append(_Job(item))

    def take(self) -> Outcome:
        while True:
            while self._waiting and self._free:
                process, job = self._free.pop(), self._waiting.popleft()
                self._asked[process.work.remote(job.item)] = (process, job)
            answered, _ = self._ray.wait([*self._asked], num_returns=1)
            outcome = self._answer(answered[0])
            if outcome is not None:
                return outcome

    def _answer(self, answer: Any) -> Outcome | None:
        """What a process says; None when it has but begun, or died of an item that is tried again."""
        process, job = self._asked.pop(answer)
        try:
            outcome = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:  # not the task, whose errors are outcomes
            outcome = Outcome(job.item, None, f"its value cannot be sent: {_last_line(error)}")
        except self._ray.exceptions.RayError as error:
            self._ray.kill(process)  # in case that it is only out of reach
            return self._replace(job, error)
        self._free.append(process)
        return outcome

    def _replace(self, job: _Job, error: Exception) -> Outcome | None:
        job.deaths += 1
        over = job.deaths > self._retries
        why = f"its process died {job.deaths} times: killed, out of memory or crashed"
        if job.item is None:
            if over:
                raise WorkError(
                    f"workers: expected processes that begin, got none; {_last_line(error)}", []
                ) from error
            self._hire(job)
            return None
        self._hire(_Job(None))
        if over:
            return Outcome(job.item, None, why, trace=str(error))
        self._waiting.appendleft(job)
        return None

    def stop(self) -> None:
        """End all processes, whatever they are at."""
        for process in [*self._free, *(process for process, _ in self._asked.values())]:
            self._ray.kill(process)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
