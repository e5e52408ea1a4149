"""Functions that numba compiles once for all programs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

log = logging.getLogger(__name__)


def cached(**options: Any) -> Callable[[Any], Any]:
    """A decorator like `numba.njit(cache=True, **options)`; where no folder can be written to, what is compiled lasts for
    the program alone, which a warning says once."""
    from numba import njit

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, **options)(function)  # type: ignore[call-overload]
        except RuntimeError:  # numba finds no place for its files
            _warn_once()
            return njit(**options)(function)  # type: ignore[call-overload]

    return decorate


@cache
def _warn_once() -> None:
    log.warning(
        "CPU kernels are compiled anew in every program, as no folder can be written to; set NUMBA_CACHE_DIR to one"
    )
