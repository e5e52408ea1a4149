"""Ranges of tasks of a CPU kernel on several threads. Kernels release the interpreter's lock and know only `low, high`."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

RANGES = 4  # per thread, since tasks may differ in length


def threads() -> int:
    """Threads that a call may use: `SPARSE_CORE_THREADS`, or as many as torch. Raises ValueError where it is no number."""
    asked = os.environ.get("SPARSE_CORE_THREADS")
    if asked is None:
        return torch.get_num_threads()
    if not (asked.isascii() and asked.isdigit() and int(asked)):
        raise ValueError(
            f"SPARSE_CORE_THREADS: expected a whole number of at least 1, got {asked!r}; unset it for as many as torch"
        )
    return int(asked)


@cache
def _pool(size: int, process: int) -> ThreadPoolExecutor:
    """The threads of one process: a fork inherits the pool, but no thread that would ever do its work."""
    return ThreadPoolExecutor(size, thread_name_prefix="sparse_core")


def compile_first(kernel: Any, arguments: tuple[Any, ...], optimize: int) -> None:
    """Compile a kernel for such arguments at a level of optimisation, without Python's garbage collector, which otherwise
    walks the whole program, again and again, over what a compiler makes: a tenth of its time."""
    from numba import config, typeof

    collecting, level = gc.isenabled(), config.OPT  # type: ignore[attr-defined]
    gc.disable()
    config.OPT = type(level)(min(optimize, level))  # type: ignore[attr-defined]
    try:
        kernel.compile(tuple(typeof(argument) for argument in arguments))
    finally:
        config.OPT = level  # type: ignore[attr-defined]
        if collecting:
            gc.enable()


def split(kernel: Any, arguments: tuple[Any, ...], tasks: int, *, optimize: int = 3) -> None:
    """Run tasks 0 .. tasks of `kernel(*arguments, low, high)` on as many threads as may be used.

    `optimize` is how hard LLVM tries when the kernel is compiled, 1 to 3: one that is made of vector intrinsics gains
    nothing by more than 1, and is there sooner.
    """
    parts = min(threads(), tasks)
    if not kernel.signatures:
        compile_first(kernel, (*arguments, 0, tasks), optimize)
    if parts <= 1:
        kernel(*arguments, 0, tasks)
        return
    count = min(tasks, RANGES * parts)
    edges = [tasks * part // count for part in range(count + 1)]
    list(
        _pool(parts, os.getpid()).map(lambda low, high: kernel(*arguments, low, high), edges[:-1], edges[1:])
    )
