"""What each paper claims, at a scale that two cores can check, one module per method.

A module `benchmarks/claims/<family>/<name>.py` holds

    CLAIM       one sentence, what must be seen
    THRESHOLD   what decides, one sentence with the numbers; where the paper gives none, why this one
    SEEDS       how many seeds a full run takes
    measure(seed) -> Trial

and nothing in it may be fitted to the seed it is measured with. The conditions of a Trial have names, so that a file says
which one failed, and they must catch what is not the method: dense attention by what it costs, zeros or a random choice by
what they are worth (tests/benchmarks/test_claims_catch_stubs.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from sparse_core.errors import unknown

ROOT = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One seed: `value` is what the method reached, `control` what would show the claim false, `oracle` the best possible.

    conditions: what THRESHOLD asks, by name, and whether this seed meets it; details: all other figures, by name.
    """

    value: float
    control: float
    oracle: float | None = None
    conditions: Mapping[str, bool]
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether this seed meets every condition."""
        return all(self.conditions.values())

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "passed": self.passed}


def list_claims() -> list[str]:
    """Names of all claims, `family/name`, sorted."""
    return sorted(
        f"{path.parent.name}/{path.stem}" for path in ROOT.glob("*/*.py") if path.stem != "__init__"
    )


def run_claim(name: str, seeds: int | None = None) -> dict[str, Any]:
    """Measure a claim: means over seeds, every seed's figures, whether all seeds passed. seeds: as many as the claim
    says unless given. Raises ValueError for no such claim and for no seeds."""
    if name not in list_claims():
        raise unknown("claim", name, list_claims())
    if seeds is not None and seeds < 1:
        raise ValueError(
            f"seeds: expected at least 1, got {seeds}; leave it out for as many as the claim says"
        )
    module = load_claim(name)
    began = time.perf_counter()
    trials = [module.measure(seed) for seed in range(module.SEEDS if seeds is None else seeds)]
    return {
        "name": name,
        "claim": module.CLAIM,
        "value": _mean([trial.value for trial in trials]),
        "control": _mean([trial.control for trial in trials]),
        "oracle": _mean([trial.oracle for trial in trials]),
        "threshold": module.THRESHOLD,
        "passed": all(trial.passed for trial in trials),
        "seeds": len(trials),
        "seconds": round(time.perf_counter() - began, 1),
        "trials": [trial.record() for trial in trials],
    }


def load_claim(name: str) -> ModuleType:
    """The module of a claim that there is."""
    return import_module(f"benchmarks.claims.{name.replace('/', '.')}")


def _mean(values: list[float] | list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
