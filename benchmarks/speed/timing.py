"""Timing of candidates that take turns, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping

import torch


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    failed: dict[str, str] | None = None,
) -> dict[str, float]:
    """Least milliseconds of each call over `repeats` rounds after one to warm up: processor time on a CPU; on a GPU, idle
    before and after, time by the clock. With `failed`, a call that raises is left out and its reason put there."""
    best = dict.fromkeys(calls, float("inf"))
    for round_ in range(repeats + 1):
        for name in list(best):
            if failed is None:
                took = _milliseconds(calls[name], device)
            else:
                took, why = _attempt(calls[name], device)
                if why:
                    failed[name] = why
                    del best[name]
                    continue
            if round_:
                best[name] = min(best[name], took)
    return best


def _attempt(call: Callable[[], object], device: str) -> tuple[float, str]:
    """Milliseconds of a call, and why it failed if it did."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            return _milliseconds(call, device), ""
        except Exception as error:
            # Torch's attention warns of what is missing before it raises that something is.
            parts = [f"{type(error).__name__}: {error}", *(str(warning.message) for warning in heard)]
    # Only here, where the error no longer holds the tensors of the call, can their memory be given back.
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    text = re.sub(r"\(Triggered internally [^)]*\)|\s+", " ", "; ".join(dict.fromkeys(parts)))
    return float("inf"), re.sub(r" +", " ", text)[:500].strip()


def _milliseconds(call: Callable[[], object], device: str) -> float:
    if torch.device(device).type == "cpu":
        began = time.process_time()
        call()
        return 1000 * (time.process_time() - began)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began)
