"""Files that are there whole or not at all: atomic writes, tensor files, JSON.

Everything is written under a temporary name beside its target, synced and renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dataengine.errors import is_full
from dataengine.jsontext import json_text

__all__ = [
    "AnyPath",
    "atomic_write",
    "disk_full",
    "is_full",
    "load_tensors",
    "read_json",
    "save_tensors",
    "write_json",
]

AnyPath = str | PathLike[str]
UMASK = os.umask(0)
os.umask(UMASK)  # there is no way to ask without setting it


@contextlib.contextmanager
def atomic_write(path: AnyPath) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is synced and renamed to `path`.

    Parent folders are made. The temporary name keeps the suffix: some writers choose their format by it.
    When the block raises, the temporary file is removed and what was at `path` stays as it was.
    Raises OSError (errno ENOSPC) with one plain sentence when the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_full(error):
            raise disk_full(path, "nothing was changed") from error
        raise


def save_tensors(
    path: AnyPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write named tensors (any shape, dtype and device) and string metadata to one safetensors file.

    Tensors that share memory are written once each, so tied weights come back untied.
    Raises TypeError when a metadata value is no string, OSError when the disk is full.
    """
    metadata = dict(metadata or {})
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(
                f"metadata[{key!r}]: expected a string, got {type(value).__name__}; use json.dumps"
            )
    separate = _separate(tensors)
    with atomic_write(path) as temporary:
        save_file(separate, temporary, metadata=metadata)
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors lets nobody but the owner read
    return Path(path)


def load_tensors(
    path: AnyPath, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote: the tensors by name, on `device`, and the metadata.

    Raises FileNotFoundError when there is no such file, ValueError when it is cut off or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a safetensors file, found none; check the path")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        reason = f"{path}: expected a whole safetensors file, got one that cannot be read ({error})"
        raise ValueError(f"{reason}; copy or write it again") from None


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises ValueError in one sentence where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got broken text ({error}); remove the file") from None


def write_json(path: AnyPath, value: Any) -> Path:
    """Write a value as JSON, whole or not at all; null stands for numbers that are not finite.

    Raises OSError when the disk is full.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json_text(value, indent=1) + "\n", encoding="utf-8")
    return Path(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_full(path: Path, outcome: str) -> OSError:
    """The error that says so in one sentence; `outcome`: what became of what was to be written."""
    message = f"{path}: the disk is full, {outcome}; free some space or choose another folder"
    error = OSError(message)
    error.errno = errno.ENOSPC  # set afterwards: given two arguments, OSError would print the number too
    return error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU, contiguous, no two of them in the same memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate
