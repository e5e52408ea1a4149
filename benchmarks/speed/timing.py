"""Timing of candidates that take turns, so that whatever else the machine does falls on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def take_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu"
) -> dict[str, float]:
    """Least milliseconds of each call over `repeats` rounds after one to warm up: processor time on a CPU; on a GPU, idle
    before and after, time by the clock."""
    best = dict.fromkeys(calls, float("inf"))
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            took = _milliseconds(call, device)
            if round_:
                best[name] = min(best[name], took)
    return best


def _milliseconds(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        began = time.process_time()
        call()
        return 1000 * (time.process_time() - began)
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)
