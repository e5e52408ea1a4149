"""Failures that a user can cause, each as one sentence; anything else is ours and keeps its traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FAILED, INTERRUPTED = 2, 130
_NAMED = (  # looked up only in modules that are loaded: what is not loaded cannot have raised
    ("dataengine.errors", "DatasetError", FAILED),
    ("dataengine.errors", "WorkError", FAILED),
    ("dataengine.errors", "MissingPackage", FAILED),
    ("enerverse.train.loop", "NotFinite", FAILED),
    ("enerverse.train.loop", "TrainingStopped", INTERRUPTED),
    ("sims.errors", "RenderingError", FAILED),
)


def exit_code(error: BaseException) -> int | None:
    """The exit code of an expected failure, None for a mistake in the program."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    for module, name, code in _NAMED:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return code
    return FAILED if isinstance(error, (ValueError, OSError)) else None


def explain(error: BaseException) -> str:
    """One line of text for an expected failure."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped; nothing more was written"
    if isinstance(error, OSError) and error.errno and error.strerror and error.args[1:]:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{_system_words(error)}"
    return " ".join(str(error).split()) or type(error).__name__


def _system_words(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or choose another folder"
    if error.errno == errno.ENOENT:
        return "expected a file or folder, found none; check the path"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "not allowed to write or read there; choose another path"
    return str(error.strerror)


@contextmanager
def same_command(out: Path) -> Iterator[None]:
    """A write that the disk refuses to a dataset in `out` is told in the words of the program."""
    from dataengine.episodes import DatasetWriteError

    try:
        yield
    except DatasetWriteError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DatasetWriteError(
            f"{out}: cannot write ({reason}), finished episodes are kept; free some space and run the same command again",
            errno=error.errno,
        ) from error
