"""`enerverse sparse`: the methods of `sparse_core`, and what their papers claim, measured."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from enerverse.cli.messages import announce, table

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """List the sparse methods, or measure the claim of one (`claim routing`)."""

    action: Annotated[Literal["list", "claim"], tyro.conf.Positional]
    """list: all methods; claim: measure one."""
    name: Annotated[str | None, tyro.conf.Positional] = None
    """Method whose claim to measure, such as routing or attention/routing."""
    seeds: int | None = None
    """Seeds of the claim; when not given, as many as it says (3)."""

    def run(self) -> None:
        """Print the table, or the claim's line. Raises ValueError for a method that there is not."""
        if self.action == "list":
            print(list_table())
            return
        from sparse_core import get_method, list_methods

        if self.name is None:
            raise ValueError(
                f"name: expected a method to claim for, got none; take one of {', '.join(list_methods())}"
            )
        method = get_method(self.name)
        claims = ROOT / "benchmarks" / "claims"
        if not claims.is_dir():
            raise FileNotFoundError(
                f"{claims}: expected the claims, which come with a clone of the project, found none; clone it and "
                "`pip install -e .`"
            )
        announce(
            f"claim of {method.name} (arXiv {method.paper}): one seed after another, some minutes at most"
        )
        seeds = [] if self.seeds is None else ["--seeds", str(self.seeds)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.claims", method.name, "--no-keep", *seeds], cwd=ROOT
        )
        sys.exit(done.returncode)


def list_table() -> str:
    """All methods: name, paper, kind, how close to the paper, what must come first, and what they do where it did not."""
    from sparse_core import get_method, list_methods

    methods = [get_method(name) for name in list_methods()]
    rows = [
        (m.name, m.paper, m.kind, m.fidelity, ", ".join(m.needs) or "-", m.without or "-") for m in methods
    ]
    return table(rows, ("method", "arXiv", "for", "fidelity", "needs first", "without"))
