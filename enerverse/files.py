"""Files: atomic writes, tensor files, and the folder of a run.

A run folder holds `config.json`, `environment.txt` and `metrics.jsonl`; what else lies in it is the caller's.
A reader never sees half a file: everything is written under a temporary name beside its target and renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dataengine.storage import (
    AnyPath,
    atomic_write,
    disk_full,
    is_full,
    load_tensors,
    read_json,
    save_tensors,
)
from enerverse.environment import describe

__all__ = [
    "append_metrics",
    "atomic_write",
    "cut_metrics",
    "disk_full",
    "fingerprint",
    "is_full",
    "load_tensors",
    "prepare_run",
    "read_json",
    "read_metrics",
    "save_tensors",
    "total_seconds",
]


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
