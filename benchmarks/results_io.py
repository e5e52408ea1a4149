"""Results on disk: one JSON file per measured case, `benchmarks/results/<device>/<case>.json`.

Every file says what it was measured with (device, versions, commit) and how long the measurement took, so a
figure or a table can be traced back to it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from enerverse.environment import device_name, versions
from enerverse.files import atomic_write

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
DRAWN = (":(top,exclude)benchmarks/results", ":(top,exclude)docs/figures", ":(top,exclude)README.md")
_CASE = re.compile(r"[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured case: `case` is its name, `values` what was measured, `seconds` what that took."""

    case: str
    values: dict[str, Any]
    seconds: float
    device: str
    commit: str
    versions: dict[str, str]


def write_result(
    case: str,
    values: Mapping[str, Any],
    *,
    seconds: float,
    device: str | torch.device = "cpu",
    root: Path = RESULTS,
) -> Path:
    """Write one result and return its path, `<root>/<device>/<case>.json`; an earlier one is replaced.

    `case` may name folders, `claims/attention/hip`. Values must have a JSON form.
    Raises ValueError for a case that is no plain relative name, TypeError for a value without a JSON form.
    """
    if not _CASE.fullmatch(case) or ".." in case.split("/"):
        raise ValueError(f"case: expected names joined by '/', such as 'speed/spmm', got {case!r}")
    name = device_name(device)
    result = Result(
        case=case, values=dict(values), seconds=seconds, device=name, commit=commit(), versions=versions()
    )
    text = json.dumps(asdict(result), indent=2) + "\n"
    with atomic_write(root / folder_name(name) / f"{case}.json") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return root / folder_name(name) / f"{case}.json"


def read_results(root: Path = RESULTS, prefix: str = "") -> list[Result]:
    """Return the results under `root` whose case begins with `prefix`, ordered by device, then case.

    Raises ValueError naming the file when one is no result.
    """
    found = [read_result(path) for path in sorted(root.rglob("*.json"))]
    return [result for result in found if result.case.startswith(prefix)]


def read_result(path: Path) -> Result:
    """Read one result file. Raises ValueError naming the file when it is no result."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got broken text ({error}); measure it again") from None
    expected = [field.name for field in fields(Result)]
    if not isinstance(data, dict) or sorted(data) != sorted(expected):
        got = ", ".join(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path}: expected the keys {', '.join(expected)}, got {got}; measure it again")
    return Result(**data)


def by_device(results: list[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Yield each device with its results, devices in order of first appearance."""
    for device in dict.fromkeys(result.device for result in results):
        yield device, [result for result in results if result.device == device]


def folder_name(device: str) -> str:
    """Return a device's model name as a folder name: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def commit() -> str:
    """Return the short hash of the checkout, with `-dirty` when tracked code differs, else `unknown`.

    Results and what is drawn from them do not count: a second measurement would else be dirty by the first.
    """
    try:
        name = _git("describe", "--always", "--exclude=*")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *DRAWN)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
