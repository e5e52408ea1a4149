"""JSON without NaN and Infinity."""

import json
import math

import pytest

from dataengine.jsontext import json_text, through_json
from dataengine.lerobot import files
from dataengine.storage import write_json


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


@pytest.mark.parametrize("write", [write_json, files.write_json])
def test_numbers_that_are_not_finite_become_null(tmp_path, write):
    path = tmp_path / "values.json"
    write(path, {"a": math.inf, "b": [-math.inf, 1.5, "Infinity"], "c": {"d": (math.nan, 2)}})
    told = json.loads(path.read_text(), parse_constant=refuse)
    assert told == {"a": None, "b": [None, 1.5, "Infinity"], "c": {"d": [None, 2]}}


def test_what_was_written_is_equal_to_what_comes_back():
    value = {"sizes": (1, 2), "tolerance": math.inf, "sure": True}
    assert json.loads(json_text(value)) == through_json(value) != value
