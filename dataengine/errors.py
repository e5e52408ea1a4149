"""Errors of the data engine: each says what was expected, what came and what to do, in one sentence."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DatasetError(RuntimeError):
    """A dataset on disk is missing, damaged or contradicts itself.

    Attributes:
        path: the file at fault, if one is known.
        episode: episode index, if one is known.
        frame: frame index within the episode, if one is known.
    """

    def __init__(
        self, message: str, *, path: Path | None = None, episode: int | None = None, frame: int | None = None
    ):
        super().__init__(message)
        self.path, self.episode, self.frame = path, episode, frame


class DatasetWriteError(OSError):
    """The file system refused a write (disk full, quota, file-size limit, permission).

    Finished episodes stay readable; the unfinished one is dropped. ``errno`` is that of the cause.
    """

    def __init__(self, message: str, *, errno: int | None = None):
        super().__init__(message)
        self.errno = errno


class MissingPackage(ImportError):
    """A package that only some things need is not installed; the sentence says how to install it."""


class WorkError(RuntimeError):
    """Some of many items could not be worked on; what was finished of the others is kept.

    Attributes:
        names: the items that failed, by name.
    """

    def __init__(self, message: str, names: list[str]):
        super().__init__(message)
        self.names = names


def damaged(path: Path, episode: int, frame: int, reason: object) -> DatasetError:
    """The error for a file of one episode that cannot be read from some frame on."""
    return DatasetError(
        f"{path}: cannot read episode {episode} from frame {frame} on ({in_words(reason)}); restore this file "
        "from a copy or record the dataset again, the other episodes can still be read one by one",
        path=path,
        episode=episode,
        frame=frame,
    )


def in_words(reason: object) -> str:
    """What went wrong on one line: of an error of the system or of a codec its words alone, without numbers, paths
    and names of C functions."""
    return " ".join(str(getattr(reason, "strerror", None) or reason).split())


def is_full(error: BaseException) -> bool:
    """Whether `error` says that the disk, or the user's share of it, is full."""
    # Writers in other languages report a full disk as text only.
    texts = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122", "os error 27)")
    return getattr(error, "errno", None) in FULL or any(text in str(error) for text in texts)


def closest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'front'?"`` or, with nothing close, the list of known names."""
    names = [str(k) for k in known]
    match = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if match:
        return f"did you mean {match[0]!r}?"
    return "known: " + (", ".join(repr(n) for n in names) or "none")
