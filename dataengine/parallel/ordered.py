"""A task called on one item after another by several processes, with results in order as soon as they are there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from dataengine.parallel.workers import Numbered, failed, hired

Item = TypeVar("Item")
Value = TypeVar("Value")
AHEAD = 1  # results per process that may wait for an earlier one


def map_in_order(
    task: Callable[[Item], Value], items: Iterable[Item], *, workers: int, address: str | None = None
) -> Iterator[Value]:
    """``map(task, items)`` by several processes.

    Items are taken as processes become free, and at most one result per process waits for its turn, so memory does not
    grow with the number of items. Results go from process to process: with large ones, work on smaller items. An item
    whose process dies is tried again, as :func:`dataengine.parallel.fan_out` does.

    Raises:
        WorkError, OSError: an item failed; the results before it have been given. Others as :func:`fan_out`.
    """
    with hired(Numbered(task), workers=workers, address=address) as crew:
        waiting, done = iter(enumerate(items)), {}
        busy = 0
        for turn in itertools.count():
            while turn not in done:
                while busy + len(done) < (1 + AHEAD) * workers and crew.idle:
                    if (item := next(waiting, None)) is None:
                        break
                    crew.put(item)
                    busy += 1
                if not busy:
                    return
                outcome = crew.take()
                busy -= 1
                done[outcome.item[0]] = outcome
            outcome = done.pop(turn)
            if outcome.failure is not None:
                raise failed([(f"item {turn}", outcome)], turn + 1)
            yield outcome.value
