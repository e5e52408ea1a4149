import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enerverse import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    kind: Literal["sparse"] = "sparse"
    frames: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fifo:
    kind: Literal["fifo"] = "fifo"
    frames: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    width: int
    rate: float = 1e-3
    name: str = "unet"
    bias: bool = True
    norm: Literal["group", "layer", 2] = "group"
    widths: tuple[int, ...] = (32, 64)
    size: tuple[int, float] = (1, 2.0)
    seed: int | None = None
    extra: dict[str, float] = dataclasses.field(default_factory=dict)
    tags: list[str] = dataclasses.field(default_factory=list)
    memory: Memory | Fifo = Memory()
    other: Memory | None = None
    free: Any = None

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ValueError(f"width: expected a positive number of channels, got {self.width}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    model: Model
    steps: int = 10


text = st.text(max_size=8)
finite = st.floats(allow_nan=False)
models = st.builds(
    Model,
    width=st.integers(1, 10**6),
    rate=finite,
    name=text,
    bias=st.booleans(),
    norm=st.sampled_from(["group", "layer", 2]),
    widths=st.lists(st.integers()).map(tuple),
    size=st.tuples(st.integers(), finite),
    seed=st.none() | st.integers(),
    extra=st.dictionaries(text, finite, max_size=3),
    tags=st.lists(text, max_size=3),
    memory=st.builds(Memory, frames=st.integers()) | st.builds(Fifo, frames=st.integers()),
    other=st.none() | st.builds(Memory, frames=st.integers()),
    free=st.none() | st.integers() | text,
)


@given(st.builds(Run, model=models, steps=st.integers()))
def test_json_round_trip_gives_the_same_config(run: Run) -> None:
    again = config.from_json(Run, config.to_json(run))
    assert again == run
    assert type(again.model.widths) is tuple


def test_integer_is_taken_as_float_and_stays_a_float() -> None:
    rate = config.from_dict(Model, {"width": 1, "rate": 2}).rate
    assert rate == 2.0
    assert type(rate) is float


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            {"width": 1, "widht": 2},
            "Model: unknown key 'widht': did you mean 'width'? (available: bias, extra, free, memory, "
            "name, norm, other, rate, seed, size, tags, width, widths)",
        ),
        ({}, "Model: key 'width' is missing; add it, a value of type int"),
        ({"width": "wide"}, "Model.width: expected int, got 'wide' (str)"),
        ({"width": True}, "Model.width: expected int, got True (bool)"),
        ({"width": 1.0}, "Model.width: expected int, got 1.0 (float)"),
        ({"width": 1, "bias": 1}, "Model.bias: expected bool, got 1 (int)"),
        ({"width": 1, "rate": "1e-3"}, "Model.rate: expected float, got '1e-3' (str)"),
        (
            {"width": 1, "norm": "grup"},
            "Model.norm: unknown value 'grup': did you mean 'group'? (available: 2, group, layer)",
        ),
        ({"width": 1, "norm": 3}, "Model.norm: expected one of 'group', 'layer', 2, got 3 (int)"),
        ({"width": 1, "widths": 3}, "Model.widths: expected tuple[int, ...], got 3 (int)"),
        ({"width": 1, "widths": [1, "a"]}, "Model.widths[1]: expected int, got 'a' (str)"),
        ({"width": 1, "size": [1]}, "Model.size: expected 2 values, got 1: [1]"),
        ({"width": 1, "seed": "x"}, "Model.seed: expected int, got 'x' (str)"),
        ({"width": 1, "extra": []}, "Model.extra: expected dict[str, float], got [] (list)"),
        ({"width": 1, "extra": {"a": "b"}}, "Model.extra['a']: expected float, got 'b' (str)"),
        ({"width": 1, "tags": "ab"}, "Model.tags: expected list[str], got 'ab' (str)"),
        ({"width": 1, "memory": 3}, "Model.memory: expected Memory | Fifo, got 3 (int)"),
        (
            {"width": 1, "memory": {"frames": 3}},
            "Model.memory: expected a form that fits one config, "
            "got one that fits Memory and Fifo; add its `kind`",
        ),
        (
            {"width": 1, "other": {"frame": 1}},
            "Model.other: unknown key 'frame': did you mean 'frames'? (available: frames, kind)",
        ),
        ({"width": 0}, "width: expected a positive number of channels, got 0"),
        ([1], "Model: expected the keys of a Model, got [1] (list)"),
    ],
)
def test_bad_data_is_refused_with_a_sentence(data: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        config.from_dict(Model, data)
    assert str(caught.value) == sentence


def test_union_of_configs_is_resolved_by_kind() -> None:
    data = {"width": 1, "memory": {"kind": "fifo", "frames": 2}}
    assert config.from_dict(Model, data).memory == Fifo(frames=2)


def test_nested_error_names_the_whole_place() -> None:
    with pytest.raises(ValueError, match=r"^Run\.model\.rate: expected float, got None \(NoneType\)$"):
        config.from_dict(Run, {"model": {"width": 1, "rate": None}})


def test_value_without_json_form_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^Model\.tags\[1\]: expected a value with a JSON form, got set$"):
        config.to_dict(Model(width=1, tags=["a", {1}]))  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^config: expected a dataclass instance, got dict$"):
        config.to_dict({})


def test_save_and_load(tmp_path) -> None:
    run = Run(model=Model(width=3))
    path = config.save(run, tmp_path / "deep" / "config.json")
    assert config.load(Run, path) == run
    assert json.loads(path.read_text())["model"]["widths"] == [32, 64]


def test_load_names_the_file(tmp_path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError) as missing:
        config.load(Run, path)
    assert str(missing.value) == f"{path}: expected a Run in JSON, found no file; check the path"
    path.write_text('{"model": ')
    with pytest.raises(ValueError) as broken:
        config.load(Run, path)
    expected = f"{path}: Run: expected JSON, got text that breaks at line 1 column 11: Expecting value"
    assert str(broken.value) == expected


def test_unknown_names_the_closest() -> None:
    options = ["tiny", "small", "paper"]
    expected = "unknown preset 'tny': did you mean 'tiny'? (available: paper, small, tiny)"
    assert str(config.unknown("preset", "tny", options)) == expected
    assert (
        str(config.unknown("preset", "zzz", options))
        == "unknown preset 'zzz' (available: paper, small, tiny)"
    )
    assert str(config.unknown("preset", "x", [])) == "unknown preset 'x' (available: none)"


@given(st.lists(st.text(min_size=1), min_size=1))
def test_closest_finds_the_name_itself(options: list[str]) -> None:
    assert config.closest(options[0], options) == options[0]
