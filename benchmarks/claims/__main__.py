"""Measure claims and keep what was measured.

    python -m benchmarks.claims family/name [--seeds 3]     one claim, or `all`

prints one JSON line per claim and writes `benchmarks/results/<device>/claims/<family>/<name>.json`. Leaves with 1 when
a claim does not hold.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from benchmarks.claims import list_claims, run_claim
from benchmarks.results_io import write_result


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
    for name in list_claims() if settings.name == "all" else [settings.name]:
        try:
            result = run_claim(name, settings.seeds)
        except ValueError as error:
            sys.exit(str(error))
        held = held and result["passed"]
        print(json.dumps({key: value for key, value in result.items() if key != "trials"}), flush=True)
        if settings.keep:
            write_result(f"claims/{name}", result, seconds=result["seconds"])
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main(tyro.cli(Claims))
