"""The verbs and flags of the program, frozen in flags.json.

When a flag is added, renamed or gets another default on purpose, run `python tests/enerverse/cli/test_flags.py`
to rewrite that file, and say in CHANGELOG.md what changed.
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path

from enerverse.cli.main import VERBS

FROZEN = Path(__file__).with_name("flags.json")


def flags() -> dict[str, dict[str, str]]:
    """Per verb: flag -> its default as text, or `required`."""
    return {
        verb: {
            field.name: "required" if field.default is MISSING else str(field.default)
            for field in fields(settings)
        }
        for verb, settings in VERBS.items()
    }


def test_flags_are_the_frozen_ones():
    assert flags() == json.loads(FROZEN.read_text())


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(flags(), indent=2) + "\n")
