"""JSON as every reader takes it: Python's own would write NaN and Infinity, which are none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON with null for numbers that are not finite; `options` go to `json.dumps`."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def through_json(value: Any) -> Any:
    """`value` as it comes back from a file, to be compared with what is there."""
    return json.loads(json_text(value))


def difference(there: Any, here: Any) -> tuple[Any, Any]:
    """What stands in either at the first place where two JSON values differ, under its name."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key, value in here.items():
            if there.get(key) != value:
                found, wanted = difference(there.get(key), value)
                return f"{key} {found}", f"{key} {wanted}"
    return there, here


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value
