"""Which implementation of an operation runs: chosen by device and dtype, imported when it is first asked for."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

log = logging.getLogger(__name__)


@cache
def installed(name: str) -> bool:
    """Whether a package is there, without importing it."""
    return find_spec(name) is not None


def choose(device: torch.device, implementations: tuple[str, ...], dtype: torch.dtype = torch.float32) -> str:
    """What `auto` takes on a device: the kernel made for it where there is one, else plain torch, else the reference. The
    kernels compute in float32 at most, and so never get float64."""
    kernel = {"cpu": "numba", "cuda": "triton"}.get(device.type, "")
    if kernel in implementations and installed(kernel) and dtype != torch.float64:
        return kernel
    return "gather" if "gather" in implementations else "reference"


@cache
def find(
    package: str, name: str, device: torch.device, implementations: tuple[str, ...], function: str = "attend",
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Any]:  # fmt: skip
    """The function of an implementation of the operation in `package`, for `auto` the one that `choose` takes. Raises
    ValueError for one that there is not, and for one that does not run on the device."""
    chosen = choose(device, implementations, dtype) if name == "auto" else name
    if chosen not in implementations:
        raise ValueError(
            f"implementation: expected auto or one of {', '.join(implementations)}, got {name!r}"
        )
    if chosen == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "implementation: expected one for tensors on the cpu, got 'triton'; use 'auto', or set TRITON_INTERPRET=1 to "
            "test its arithmetic"
        )
    if chosen == "numba" and device.type != "cpu":
        raise ValueError(f"implementation: expected one for tensors on {device}, got 'numba'; use 'auto'")
    log.info("%s runs as %s", package.rpartition(".")[2], chosen)
    return getattr(import_module(f"{package}.{chosen}"), function)


def call(
    package: str, name: str, implementations: tuple[str, ...], *arguments: Any, function: str = "attend"
) -> Any:
    """What that function makes of `arguments`, of which the first is a tensor. `torch.compile` does not look inside: the
    kernels are compiled already, and what numba does cannot be traced."""
    # Once it is there, a frame that it no longer compiles may still call others that it would.
    if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
        return _untraced()(package, name, implementations, arguments, function)
    return _call(package, name, implementations, arguments, function)


def _call(
    package: str, name: str, implementations: tuple[str, ...], arguments: tuple[Any, ...], function: str
) -> Any:
    first = arguments[0]
    run = find(package, name, first.device, implementations, function, first.dtype)
    try:
        return run(*arguments)
    except RuntimeError as error:
        if "functorch" not in str(error):
            raise
        raise RuntimeError(
            f"{package.rpartition('.')[2]}: expected no transform of torch.func around a kernel with a backward pass of "
            "its own, got one; use implementation='gather'"
        ) from error


_left_alone: list[Callable[..., Any]] = []  # a list and no `cache`, of which the compiler would warn


def _untraced() -> Callable[..., Any]:
    """`_call` as `torch.compile` leaves it alone. Made when it is needed: the compiler takes seconds to import."""
    if not _left_alone:
        _left_alone.append(torch.compiler.disable(_call))
    return _left_alone[0]
