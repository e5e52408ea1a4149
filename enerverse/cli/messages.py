"""What the program says: what it is about to do, a table, what comes next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any


def announce(*lines: str) -> None:
    """Say what is about to happen, in at most six lines."""
    print("\n".join(lines), flush=True)


def count(number: int, noun: str) -> str:
    """`1 episode`, `2 episodes`."""
    return f"{number} {noun}" + "s" * (number != 1)


def expect(seconds: float, workers: int = 1) -> str:
    """How long work may take: `about 3 minutes on one core`."""
    from dataengine.progress import about

    return f"{about(seconds / workers)} on {'one core' if workers == 1 else f'{workers} cores'}"


def command(words: str, **flags: Any) -> str:
    """A command line to paste: `words`, then the flags that are not None; True stands for a flag without a value."""
    line = [words]
    for name, value in flags.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, (tuple, list)) else [value]
            line.append(shlex.join([f"--{name.replace('_', '-')}", *map(str, values)]))
    return " ".join(line)


def table(rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> str:
    """Rows under their columns as aligned text; floats with one decimal."""
    cells = [list(columns), *[[_text(value) for value in row] for row in rows]]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def _text(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
