"""Files: atomic writes, tensor files, and the folder of a run.

A run folder holds `config.json`, `environment.txt` and `metrics.jsonl`; what else lies in it is the caller's.
A reader never sees half a file: everything is written under a temporary name beside its target and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from enerverse.environment import describe

AnyPath = str | PathLike[str]
_FULL = (errno.ENOSPC, errno.EDQUOT)


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


def fingerprint(module: torch.nn.Module) -> str:
    """Return twelve hexadecimal digits that tell one set of weights from another."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def prepare_run(path: AnyPath, config_json: str) -> Path:
    """Make the run folder `path` for a config given as JSON text, or accept it when it holds the same config.

    Writes `config.json`, and `environment.txt` unless an earlier start of the same run wrote one.
    Raises ValueError naming the first differing key when the folder belongs to another config.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a folder for the run, got a file; choose another path")
    config_path = path / "config.json"
    if config_path.exists():
        _check_same_config(path, read_json(config_path), json.loads(config_json))
    else:
        _write_text(config_path, config_json)
    if not (path / "environment.txt").exists():
        _write_text(path / "environment.txt", describe("cuda" if torch.cuda.is_available() else "cpu"))
    return path


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises ValueError in one sentence where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got broken text ({error}); remove the file") from None


def append_metrics(path: AnyPath, metrics: Mapping[str, Any]) -> None:
    """Append one record to `metrics.jsonl` of the run folder `path`; numbers may be zero-dimensional tensors.

    A last line that an earlier crash left without its end is completed or dropped first.
    Raises ValueError when a value is more than one number, OSError when the disk is full.
    """
    target = Path(path) / "metrics.jsonl"
    line = json.dumps({key: _number(key, value) for key, value in metrics.items()}) + "\n"
    try:
        with open(target, "ab+") as file:
            _mend_last_line(file)
            file.write(line.encode())
    except OSError as error:
        if is_full(error):
            raise disk_full(target, "the last record is lost") from error
        raise


def read_metrics(path: AnyPath) -> list[dict[str, Any]]:
    """Return the records of `metrics.jsonl` in the run folder `path`; none when nothing was recorded yet.

    A torn last line, left by a crash, is passed over. Raises FileNotFoundError when there is no such folder,
    ValueError naming any other broken line.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected the folder of a run, found none; check the path")
    target = path / "metrics.jsonl"
    lines = target.read_bytes().split(b"\n") if target.exists() else []
    records = [_record(line) for line in lines if line]
    if records and records[-1] is None and lines[-1]:
        records.pop()
    for number, record in enumerate(records, start=1):
        if record is None:
            raise ValueError(f"{target}: expected a JSON object on line {number}, got broken text; remove it")
    return [record for record in records if record is not None]


def cut_metrics(path: AnyPath, step: int) -> list[dict[str, Any]]:
    """Drop the records after optimiser step `step` from `metrics.jsonl` and return the others.

    A run that goes on from a checkpoint repeats what came after it; raises what `read_metrics` raises.
    """
    records = read_metrics(path)
    kept = [record for record in records if record.get("step", 0) <= step]
    if len(kept) < len(records):
        _write_text(Path(path) / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def total_seconds(records: Iterable[Mapping[str, Any]], key: str = "seconds") -> float:
    """Seconds of training over all starts of a run; a value below the one before it belongs to a fresh count."""
    total = last = 0.0
    for record in records:
        value = record.get(key)
        if value is not None:
            total, last = total + (value - last if value >= last else value), value
    return total


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Whether `error` says that the disk, or the user's share of it, is full."""
    # Writers in other languages report a full disk as text only.
    texts = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")
    return getattr(error, "errno", None) in _FULL or any(text in str(error) for text in texts)


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


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _check_same_config(path: Path, there: Any, here: Any) -> None:
    difference = _first_difference(there, here, "")
    if difference is not None:
        advice = "choose another folder or delete this one"
        raise ValueError(f"{path}: the folder holds a run with another config ({difference}); {advice}")


def _first_difference(there: Any, here: Any, place: str) -> str | None:
    """Say where two JSON values first differ, `model.width is 64 there and 32 here`, or return None."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return None if there == here else f"{place or 'it'} is {there!r} there and {here!r} here"
    for key in [*there, *(key for key in here if key not in there)]:
        inner = f"{place}.{key}" if place else key
        if key not in there or key not in here:
            return f"{inner} is only {'there' if key in there else 'here'}"
        if difference := _first_difference(there[key], here[key], inner):
            return difference
    return None


def _number(key: str, value: Any) -> Any:
    """Turn a one-element tensor or array into its number; leave plain values as they are."""
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) != 1:
        raise ValueError(f"metrics[{key!r}]: expected one number, got shape {shape}; reduce it first")
    return value.item() if hasattr(value, "item") else value


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _mend_last_line(file: Any) -> None:
    """Leave `file` (opened "ab+") ending in a newline: complete an unfinished record, cut a torn one off."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    if _record(content[start:]) is None:
        file.truncate(start)
    else:
        file.write(b"\n")
