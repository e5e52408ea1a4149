"""Files that are there entirely or not at all, and the lock that keeps a folder to one writer."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataengine.errors import DatasetError
from dataengine.jsontext import json_text

try:
    import fcntl
except ImportError:  # Windows has no advisory locks on folders; there the user must not start two writers
    fcntl = None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk; missing or damaged is a :class:`DatasetError` that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(
            f"{path}: expected this file in a LeRobot dataset, found none; is the root right?", path=path
        ) from None
    except (OSError, ValueError) as cause:
        raise DatasetError(
            f"{path}: cannot be read ({cause}); restore this file from a copy", path=path
        ) from cause


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: readers see the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object atomically; null stands for numbers that are not finite."""
    write_atomically(path, json_text(values, indent=4, ensure_ascii=False).encode())


def parquet_bytes(table: pa.Table, *, compact: bool = False) -> bytes:
    """A table as parquet, built in memory so that the write itself goes through one checked file.

    Args:
        compact: leave out dictionaries, column statistics and the Arrow schema, which are most of a file of
            one row; fixed-size lists then come back as plain lists.
    """
    sink = pa.BufferOutputStream()
    full = not compact
    pq.write_table(
        table,
        sink,
        use_dictionary=full,
        write_statistics=full,
        store_schema=full,
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()


def checksum(path: Path) -> int:
    """CRC-32 of a file, read in blocks."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def move_all(moves: list[tuple[Path, Path]]) -> None:
    """Rename in order; on failure take back what was moved, so that no file stays that nobody owns."""
    done: list[Path] = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            done.append(target)
    except OSError:
        for target in done:
            target.unlink(missing_ok=True)
        raise


class FolderLock:
    """An advisory lock on a folder, gone when the process ends, however it ends; leaves no file behind."""

    def __init__(self, root: Path):
        self._handle: int | None = None
        self.held = True
        if fcntl is None:
            return
        handle = os.open(root, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise DatasetError(
                f"{root}: expected one writer at a time, but another one has this dataset open; wait or use "
                "another root",
                path=root,
            ) from None
        self._handle = handle

    def release(self) -> None:
        """Let the next writer in; safe to call twice."""
        self.held = False
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
