"""Measure claims and keep what was measured.

    python -m benchmarks.claims family/name [--seeds 3]     one claim, or `all`

prints one JSON line per claim and writes `benchmarks/results/<device>/claims/<family>/<name>.json`, or, with more seeds
than the claim asks for, `more_seeds/<family>/<name>.json` beside it; fewer are not kept. Leaves with 1 when a claim does
not hold.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from benchmarks.claims import list_claims, load_claim, run_claim
from benchmarks.results_io import commit, write_result


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Measure the claims of the papers at small scale."""

    name: Annotated[str, tyro.conf.Positional]
    seeds: int | None = None
    keep: bool = True


def main(settings: Claims) -> None:
    """Run, print, write."""
    torch.set_num_threads(1)
    held = True
    if settings.keep and commit().endswith("-dirty"):
        print(
            f"commit: expected a clean checkout, got changes; results are marked {commit()}", file=sys.stderr
        )
    for name in list_claims() if settings.name == "all" else [settings.name]:
        try:
            result = run_claim(name, settings.seeds)
        except ValueError as error:
            sys.exit(str(error))
        held = held and result["passed"]
        print(json.dumps({key: value for key, value in result.items() if key != "trials"}), flush=True)
        folder = _folder(result["seeds"], load_claim(name).SEEDS)
        if settings.keep and folder:
            write_result(f"{folder}/{name}", result, seconds=result["seconds"])
    sys.exit(0 if held else 1)


def _folder(seeds: int, asked: int) -> str | None:
    """Where a run of so many seeds is kept, None for fewer than the claim asks for: they show nothing."""
    return None if seeds < asked else "claims" if seeds == asked else "more_seeds"


if __name__ == "__main__":
    main(tyro.cli(Claims))
