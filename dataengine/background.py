"""Work that goes on beside the caller's own, or, with the same words, before the caller goes on."""

from __future__ import annotations

from collections.abc import Callable
from queue import Queue
from threading import Thread


class Worker:
    """A thread that makes calls, one after another in the order they are put.

    After a call fails, no further one is made; the failure is raised by the next :meth:`put` and by :meth:`close`.

    Args:
        depth: how many calls may wait; with more, :meth:`put` waits.
    """

    def __init__(self, depth: int) -> None:
        self._calls: Queue[Callable[[], object] | None] = Queue(depth)
        self._failure: BaseException | None = None
        self._last: Callable[[], object] | None = None
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], object]) -> None:
        """Have a call made."""
        if self._failure is not None:
            raise self._failure
        self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._failure is None:
                try:
                    call()
                except BaseException as error:  # whatever it is, the thread that put the call must hear of it
                    self._failure = error
        if self._last is not None:
            self._last()

    def close(self, last: Callable[[], object] | None = None) -> None:
        """Wait until every call is made and end the thread; ``last`` is called in it even after a failure."""
        self._last = last
        self._calls.put(None)
        interrupt = None
        while self._thread.is_alive():
            try:
                self._thread.join()
            except KeyboardInterrupt as error:  # what the thread has in hand cannot be taken from it
                interrupt = error
        if interrupt is not None:
            raise interrupt
        if self._failure is not None:
            raise self._failure


class Direct:
    """Makes every call at once, in the thread of the caller, who also gets its failure."""

    def put(self, call: Callable[[], object]) -> None:
        """Make a call."""
        call()

    def close(self, last: Callable[[], object] | None = None) -> None:
        """Nothing is left to be waited for; ``last`` is called."""
        if last is not None:
            last()
