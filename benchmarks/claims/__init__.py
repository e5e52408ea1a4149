"""What each paper claims, at a scale that two cores can check, one module per method.

A module `benchmarks/claims/<family>/<name>.py` holds

    CLAIM       one sentence, what must be seen
    THRESHOLD   what decides, one sentence with the numbers; where the paper gives none, why this one
    SEEDS       how many seeds a full run takes
    measure(seed) -> Trial

and nothing in it may be fitted to the seed it is measured with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from sparse_core.errors import unknown

ROOT = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One seed: `value` is what the method reached, `control` what would show the claim false, `oracle` the best possible.

    passed: whether this seed meets every condition of THRESHOLD; details: all other figures, by name.
    """

    value: float
    control: float
    oracle: float | None = None
    passed: bool
    details: Mapping[str, float] = field(default_factory=dict)


def list_claims() -> list[str]:
    """Names of all claims, `family/name`, sorted."""
    return sorted(
        f"{path.parent.name}/{path.stem}" for path in ROOT.glob("*/*.py") if path.stem != "__init__"
    )


def run_claim(name: str, seeds: int | None = None) -> dict[str, Any]:
    """Measure a claim: means over seeds, every seed's figures, whether all seeds passed. ValueError for no such claim."""
    if name not in list_claims():
        raise unknown("claim", name, list_claims())
    module = import_module(f"benchmarks.claims.{name.replace('/', '.')}")
    began = time.perf_counter()
    trials = [module.measure(seed) for seed in range(seeds or module.SEEDS)]
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
        "trials": [asdict(trial) for trial in trials],
    }


def _mean(values: list[float] | list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
