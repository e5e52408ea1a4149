"""One meter for sparse computation: what was multiplied and read, counted where it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_active: ContextVar[tuple[Counter, ...]] = ContextVar("counters", default=())


@dataclass
class Counter:
    """Counts within a `count()` block, of forward passes: a backward pass of attention multiplies 2.5 times as much as its
    forward pass, and is not counted.

    multiply_adds: of the arithmetic that depends on the data, kept pairs only; products: dot products of a query and a
    key, for attending or for choosing; kv_bytes: of keys and values read; peak_tile_bytes: the most bytes of scores that a
    kernel of this package held at once, in one thread or program (a dense one holds all of them); saved_bytes: what
    autograd keeps for a backward pass, counted by `count(saved=True)` alone.
    """

    multiply_adds: int = 0
    products: int = 0
    kv_bytes: int = 0
    peak_tile_bytes: int = 0
    saved_bytes: int = 0


@contextmanager
def count(*, saved: bool = False) -> Iterator[Counter]:
    """Count what the kernels and methods of this package do inside the block; blocks may be nested, and count what is done
    in the thread that opened them.

    saved: also the memory that autograd keeps for a backward pass of everything that runs inside, of whatever package:
    inputs and weights as well, each piece of memory once. This uses `torch.autograd.graph.saved_tensors_hooks`, and so
    takes the place of those of an outer block; inside of gradient checkpointing, do not ask for it.
    """
    counter = Counter()
    token = _active.set((*_active.get(), counter))
    try:
        with _keeping(counter) if saved else nullcontext():
            yield counter
    finally:
        _active.reset(token)


def _keeping(counter: Counter) -> AbstractContextManager[None]:
    seen: set[int] = set()

    def pack(x: Tensor) -> tuple[Tensor, int]:
        memory = x.untyped_storage()
        if memory.data_ptr() not in seen:
            seen.add(memory.data_ptr())
            counter.saved_bytes += memory.nbytes()
        kept = x.detach()  # what is returned as it is keeps itself alive
        return kept, kept._version

    def unpack(packed: tuple[Tensor, int]) -> Tensor:
        kept, version = packed
        if kept._version != version:  # autograd itself looks only where there are no hooks
            raise RuntimeError(
                f"backward: expected a tensor {list(kept.shape)} as the forward pass left it, got one modified by an "
                "inplace operation; modify a copy"
            )
        return kept

    return saved_tensors_hooks(pack, unpack)


def add(**amounts: int) -> None:
    """Add to every counter that is counting."""
    for counter in _active.get():
        for name, amount in amounts.items():
            setattr(counter, name, getattr(counter, name) + int(amount))


def reach(**amounts: int) -> None:
    """Raise every counter that is counting to at least these amounts."""
    for counter in _active.get():
        for name, amount in amounts.items():
            setattr(counter, name, max(getattr(counter, name), int(amount)))


def counting() -> bool:
    """Whether anybody is counting, for amounts that cost time to find."""
    return bool(_active.get())
