"""The public names of each package, frozen in public_api.json.

When a name is added or removed on purpose, run `python tests/test_public_api.py` to rewrite that file, and
say in CHANGELOG.md what changed.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import TypeVar

import pytest

ROOT = Path(__file__).parents[1]
FROZEN = Path(__file__).with_name("public_api.json")
MODULES = (
    "sims",
    "dataengine",
    "sparse_core",
    "enerverse",
    "enerverse.config",
    "enerverse.files",
    "enerverse.loading",
    "enerverse.metrics",
    "enerverse.report",
)


def public_names(module_name: str) -> list[str]:
    """Return the sorted `__all__` of a module, or its own public functions and classes where it has none."""
    module = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    things = {name: value for name, value in vars(module).items() if name[0] != "_"}
    own = (name for name, value in things.items() if getattr(value, "__module__", None) == module_name)
    return sorted(name for name in own if not isinstance(things[name], TypeVar))


@pytest.mark.parametrize("module_name", MODULES)
def test_public_names_are_the_frozen_ones(module_name: str) -> None:
    frozen, names = json.loads(FROZEN.read_text())[module_name], public_names(module_name)
    added, gone = sorted(set(names) - set(frozen)), sorted(set(frozen) - set(names))
    advice = "if that is meant, run `python tests/test_public_api.py` and note it in CHANGELOG.md"
    assert names == frozen, f"{module_name}: added {added}, gone {gone}; {advice}"


@pytest.mark.parametrize("module_name", MODULES)
def test_public_names_exist(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert [name for name in public_names(module_name) if not hasattr(module, name)] == []


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    FROZEN.write_text(json.dumps({name: public_names(name) for name in MODULES}, indent=2) + "\n")
