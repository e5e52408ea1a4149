"""Plain values that a user hands in: arrays, counts, generators. Each check names the argument in one sentence."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(value: Any, name: str, expected: str) -> Tensor:
    """`value` as a tensor of its own type; ValueError for what is no array of numbers."""
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
        backwards = any(stride < 0 for stride in array.strides)  # torch takes none of these
        return torch.as_tensor(array.copy() if backwards else array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: expected {expected}, got {type(value).__name__}; pass numbers in one regular array"
        ) from error


def check_counts(**counts: Any) -> None:
    """Raise ValueError, naming it, for a count that is not a whole number of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}; give an int")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def check_guidance(scale: Any) -> None:
    """Raise ValueError for a guidance scale that is negative or no finite number."""
    if not isinstance(scale, Real) or not 0 <= float(scale) < math.inf:
        raise ValueError(
            f"guidance_scale: expected a finite number of at least 0, got {scale!r}; 1 turns guidance off"
        )


def check_generator(generator: Any) -> None:
    """Raise ValueError for a source of noise that is neither a generator, nor a list of them, nor None."""
    if generator is None:
        return
    for item in generator if isinstance(generator, list) else [generator]:
        if not isinstance(item, torch.Generator):
            raise ValueError(
                f"generator: expected a torch.Generator, a list of one per episode or None, got {item!r}; "
                "make one with torch.Generator().manual_seed(0)"
            )
