"""The frame that claims are measured in; the claims themselves take too long for tests."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import claims
from benchmarks.claims import Trial, __main__
from sparse_core.registry import list_methods


def tiny(passes: list[bool]) -> ModuleType:
    """A claim of which seed i holds if passes[i]."""
    module = ModuleType("benchmarks.claims.attention.tiny")
    module.CLAIM, module.THRESHOLD, module.SEEDS = "Two is more than one.", "value >= 2", len(passes)
    module.measure = lambda seed: Trial(
        value=2.0 + seed,
        control=1.0,
        oracle=None if seed else 8.0,
        conditions={"two": passes[seed], "sum": True},
        details={"seed": seed},
    )
    return module


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Make `attention/tiny` the only claim."""

    def add(passes: list[bool]) -> None:
        folder = tmp_path / "attention"
        folder.mkdir()
        for name in ("tiny", "__init__"):
            (folder / f"{name}.py").touch()
        monkeypatch.setattr(claims, "ROOT", tmp_path)
        monkeypatch.setitem(sys.modules, "benchmarks.claims.attention.tiny", tiny(passes))

    return add


def leave(settings: __main__.Claims) -> object:
    with pytest.raises(SystemExit) as left:
        __main__.main(settings)
    return left.value.code


def test_every_claim_is_of_a_method():
    found = [name for name in claims.list_claims() if name.startswith("attention/")]
    assert found == sorted(found)
    assert {f"attention/{name}" for name in ("combiner", "double_sparsity", "hip", "s2", "tidal")} <= set(
        found
    )
    assert set(found) <= set(list_methods())


@pytest.mark.parametrize("name", claims.list_claims())
def test_a_claim_states_what_decides(name):
    module = import_module(f"benchmarks.claims.{name.replace('/', '.')}")
    assert module.CLAIM.endswith(".")
    assert any(digit in module.THRESHOLD for digit in "0123456789")
    assert module.SEEDS >= 3
    assert callable(module.measure)


def test_an_unknown_claim_names_the_closest():
    with pytest.raises(ValueError, match="unknown claim 'attention/hop': did you mean 'attention/hip'"):
        claims.run_claim("attention/hop")
    assert "did you mean 'attention/hip'" in str(leave(__main__.Claims(name="attention/hop", keep=False)))


def test_a_result_holds_means_and_every_seed(install):
    install([True, True])
    assert claims.list_claims() == ["attention/tiny"]
    result = claims.run_claim("attention/tiny")
    assert set(result) == {
        "name", "claim", "value", "control", "oracle", "threshold", "passed", "seeds", "seconds", "trials",
    }  # fmt: skip
    assert result["claim"] == "Two is more than one."
    assert (result["value"], result["control"], result["oracle"]) == (2.5, 1.0, 8.0)
    assert result["passed"] is True
    assert result["seeds"] == 2
    assert [trial["details"]["seed"] for trial in result["trials"]] == [0, 1]
    assert json.loads(json.dumps(result)) == result
    assert result["trials"][0]["conditions"] == {"two": True, "sum": True}
    assert result["trials"][0]["passed"] is True


def test_fewer_seeds_may_be_asked_for(install):
    install([True, False])
    assert claims.run_claim("attention/tiny", 1)["passed"] is True
    assert claims.run_claim("attention/tiny", 1)["seeds"] == 1


@pytest.mark.parametrize("seeds", [0, -1])
def test_no_seeds_show_nothing(install, capsys, seeds):
    install([True])
    sentence = f"seeds: expected at least 1, got {seeds}; leave it out for as many as the claim says"
    with pytest.raises(ValueError, match=sentence):
        claims.run_claim("attention/tiny", seeds)
    assert leave(__main__.Claims(name="attention/tiny", seeds=seeds)) == sentence
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seeds", "case"),
    [
        (1, None),
        (2, "claims/attention/tiny"),
        (None, "claims/attention/tiny"),
        (3, "more_seeds/attention/tiny"),
    ],
)
def test_only_a_run_of_all_seeds_is_the_result_and_one_of_more_lies_beside_it(
    install, monkeypatch, seeds, case
):
    install([True, True, False])
    monkeypatch.setattr(sys.modules["benchmarks.claims.attention.tiny"], "SEEDS", 2)
    kept = []
    monkeypatch.setattr(__main__, "write_result", lambda case, values, *, seconds: kept.append(case))
    leave(__main__.Claims(name="attention/tiny", seeds=seeds))
    assert kept == ([] if case is None else [case])


@pytest.mark.parametrize(("name", "warned"), [("abc1234-dirty", True), ("abc1234", False)])
def test_changes_that_no_commit_holds_are_told_of(install, monkeypatch, capsys, name, warned):
    install([True])
    monkeypatch.setattr(__main__, "commit", lambda: name)
    monkeypatch.setattr(__main__, "write_result", lambda case, values, *, seconds: None)
    leave(__main__.Claims(name="attention/tiny"))
    sentence = "commit: expected a clean checkout, got changes; results are marked abc1234-dirty"
    assert (sentence in capsys.readouterr().err) == warned


@pytest.mark.parametrize(("passes", "code"), [([True, True], 0), ([True, False], 1)])
@pytest.mark.parametrize("name", ["attention/tiny", "all"])
def test_one_seed_that_fails_fails_the_claim(install, capsys, passes, code, name):
    install(passes)
    assert leave(__main__.Claims(name=name, keep=False)) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is (code == 0)
    assert printed["threshold"] == "value >= 2"
    assert "trials" not in printed


def test_a_failed_claim_is_kept_on_disk(install, monkeypatch, tmp_path):
    install([False])
    kept: dict[str, object] = {}

    def write(case: str, values: dict[str, object], *, seconds: float) -> Path:
        kept[case] = values
        return tmp_path

    monkeypatch.setattr(__main__, "write_result", write)
    assert leave(__main__.Claims(name="attention/tiny")) == 1
    assert kept["claims/attention/tiny"]["passed"] is False
    assert len(kept["claims/attention/tiny"]["trials"]) == 1
