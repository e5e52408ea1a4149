import re
import subprocess

import pytest

from benchmarks import results_io
from benchmarks.results_io import by_device, commit, folder_name, read_result, read_results, write_result
from enerverse.environment import device_name, versions


def test_result_is_read_back_with_its_origin(tmp_path) -> None:
    path = write_result("claims/attention/hip", {"value": 0.5, "seeds": [0, 1]}, seconds=1.5, root=tmp_path)
    assert path == tmp_path / folder_name(device_name()) / "claims" / "attention" / "hip.json"
    result = read_result(path)
    assert result.values == {"value": 0.5, "seeds": [0, 1]}
    assert (result.seconds, result.device, result.commit) == (1.5, device_name(), commit())
    assert result.versions == versions()


def test_a_commit_is_dirty_by_code_and_not_by_results(tmp_path, monkeypatch) -> None:
    for name in ("benchmarks/results/cpu/a.json", "docs/figures/a.svg", "README.md", "benchmarks/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(results_io, "ROOT", tmp_path / "benchmarks")
    assert commit() == "unknown"
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
    clean = commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    for name in ("benchmarks/results/cpu/a.json", "docs/figures/a.svg", "README.md"):
        (tmp_path / name).write_text("2")
    assert commit() == clean
    (tmp_path / "benchmarks/a.py").write_text("2")
    assert commit() == f"{clean}-dirty"


def test_results_are_filtered_and_grouped(tmp_path) -> None:
    for case in ("speed/b", "speed/a", "claims/c"):
        write_result(case, {}, seconds=0, root=tmp_path)
    assert [result.case for result in read_results(tmp_path)] == ["claims/c", "speed/a", "speed/b"]
    speed = read_results(tmp_path, prefix="speed/")
    assert [(device, len(results)) for device, results in by_device(speed)] == [(device_name(), 2)]
    assert read_results(tmp_path / "none") == []


def test_a_second_measurement_replaces_the_first(tmp_path) -> None:
    for value in (1, 2):
        path = write_result("speed/a", {"value": value}, seconds=0, root=tmp_path)
    assert [result.values for result in read_results(tmp_path)] == [{"value": 2}]
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("case", ["", "/a", "a/../../b", "a b", "a//b"])
def test_case_must_be_a_plain_name(tmp_path, case: str) -> None:
    sentence = f"case: expected names joined by '/', such as 'speed/spmm', got {case!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        write_result(case, {}, seconds=0, root=tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "expected JSON, got broken text"),
        (
            '{"a": 1}',
            "expected the keys case, values, seconds, device, commit, versions, got a; measure it again",
        ),
        (
            "[]",
            "expected the keys case, values, seconds, device, commit, versions, got list; measure it again",
        ),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, content: str, sentence: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'x.json'}: {sentence}")):
        read_results(tmp_path)


def test_folder_name_is_plain() -> None:
    assert folder_name("AMD EPYC 9B14 (96-Core)") == "amd-epyc-9b14-96-core"
