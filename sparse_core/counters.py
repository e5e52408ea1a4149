"""One meter for sparse computation: what was multiplied and read, counted where it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_active: ContextVar[tuple[Counter, ...]] = ContextVar("counters", default=())


@dataclass
class Counter:
    """Counts within a `count()` block. multiply_adds: of the arithmetic that depends on the data, kept pairs only;
    products: dot products of a query and a key, for attending or for choosing; kv_bytes: of keys and values read;
    saved_bytes: kept for a backward pass."""

    multiply_adds: int = 0
    products: int = 0
    kv_bytes: int = 0
    saved_bytes: int = 0


@contextmanager
def count() -> Iterator[Counter]:
    """Count what the kernels and methods of this package do inside the block; blocks may be nested."""
    counter = Counter()
    token = _active.set((*_active.get(), counter))
    try:
        yield counter
    finally:
        _active.reset(token)


def add(**amounts: int) -> None:
    """Add to every counter that is counting."""
    for counter in _active.get():
        for name, amount in amounts.items():
            setattr(counter, name, getattr(counter, name) + int(amount))


def counting() -> bool:
    """Whether anybody is counting, for amounts that cost time to find."""
    return bool(_active.get())
