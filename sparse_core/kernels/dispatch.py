"""Which implementation of an operation runs: chosen by device, imported when it is first asked for."""

from __future__ import annotations

import logging
import os
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


def choose(device: torch.device, implementations: tuple[str, ...]) -> str:
    """What `auto` takes on a device: the kernel made for it where there is one, else plain torch, else the reference."""
    kernel = {"cpu": "numba", "cuda": "triton"}.get(device.type, "")
    if kernel in implementations and installed(kernel):
        return kernel
    return "gather" if "gather" in implementations else "reference"


@cache
def find(
    package: str, name: str, device: torch.device, implementations: tuple[str, ...], function: str = "attend"
) -> Callable[..., Any]:
    """The function of an implementation of the operation in `package`, for `auto` the one that `choose` takes. Raises
    ValueError for one that there is not, and for one that does not run on the device."""
    chosen = choose(device, implementations) if name == "auto" else name
    if chosen not in implementations:
        raise ValueError(
            f"implementation: expected auto or one of {', '.join(implementations)}, got {name!r}"
        )
    if chosen == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "implementation: expected one for tensors on the cpu, got 'triton'; use 'auto', or set TRITON_INTERPRET=1 to "
            "test its arithmetic"
        )
    log.info("%s runs as %s", package.rpartition(".")[2], chosen)
    return getattr(import_module(f"{package}.{chosen}"), function)
