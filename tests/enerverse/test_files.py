import errno
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from dataengine import storage
from enerverse import files
from enerverse.environment import describe, device_name, versions

ADVICE = "free some space or choose another folder"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_and_makes_parents(tmp_path) -> None:
    path = tmp_path / "a" / "b.txt"
    for content in ("one", "two"):
        with files.atomic_write(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == ".txt"
            temporary.write_text(content)
        assert path.read_text() == content
    assert names(path.parent) == ["b.txt"]


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path) -> None:
    path = tmp_path / "b.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["b.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_becomes_one_sentence(tmp_path, number: int) -> None:
    path = tmp_path / "b.txt"
    with pytest.raises(OSError) as caught, files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"{path}: the disk is full, nothing was changed; {ADVICE}"
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_full_disk_told_by_safetensors_is_understood(tmp_path, monkeypatch) -> None:
    def save_file(*_args, **_kwargs) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(storage, "save_file", save_file)
    with pytest.raises(OSError, match="the disk is full"):
        files.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})


def test_tensors_round_trip_with_metadata(tmp_path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": tied,
        "tied": tied,
        "view": tied.t(),
        "half": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(5),
    }
    path = files.save_tensors(tmp_path / "x.safetensors", tensors, {"step": "3"})
    loaded, metadata = files.load_tensors(path)
    assert metadata == {"step": "3"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_tensor_files_can_be_read_by_whom_the_umask_lets(tmp_path) -> None:
    path = files.save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    assert path.stat().st_mode & 0o777 == 0o666 & ~storage.UMASK


def test_metadata_must_be_text(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"^metadata\['step'\]: expected a string, got int; use json\.dumps$"):
        files.save_tensors(tmp_path / "x.safetensors", {}, {"step": 3})  # type: ignore[dict-item]


def test_missing_and_broken_tensor_files_are_named(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError) as missing:
        files.load_tensors(path)
    assert str(missing.value) == f"{path}: expected a safetensors file, found none; check the path"
    files.save_tensors(path, {"a": torch.zeros(100)})
    whole = path.read_bytes()
    for content in (b"", b"no tensors at all", whole[:20], whole[:-4]):
        path.write_bytes(content)
        with pytest.raises(ValueError) as broken:
            files.load_tensors(path)
        assert str(broken.value).startswith(
            f"{path}: expected a whole safetensors file, got one that cannot be"
        )
        assert str(broken.value).endswith("; copy or write it again")


def test_run_folder_holds_config_and_environment(tmp_path) -> None:
    run = files.prepare_run(tmp_path / "runs" / "one", '{"steps": 3}')
    assert names(run) == ["config.json", "environment.txt"]
    environment = (run / "environment.txt").read_text()
    assert f"torch {torch.__version__.split('+')[0]}" in environment
    assert socket.gethostname() not in environment
    (run / "environment.txt").write_text("first start")
    assert files.prepare_run(run, '{ "steps":3 }') == run
    assert (run / "environment.txt").read_text() == "first start"


@pytest.mark.parametrize(
    ("here", "difference"),
    [
        ({"model": {"width": 32, "depth": 1}, "steps": 3}, "model.width is 64 there and 32 here"),
        ({"model": {"width": 64}, "steps": 3}, "model.depth is only there"),
        ({"model": {"width": 64, "depth": 1}, "steps": 3, "new": 1}, "new is only here"),
        ({"model": 3, "steps": 3}, "model is {'width': 64, 'depth': 1} there and 3 here"),
    ],
)
def test_run_folder_of_another_config_is_refused(tmp_path, here: dict, difference: str) -> None:
    there = {"model": {"width": 64, "depth": 1}, "steps": 3}
    files.prepare_run(tmp_path, json.dumps(there))
    with pytest.raises(ValueError) as caught:
        files.prepare_run(tmp_path, json.dumps(here))
    sentence = (
        f"the folder holds a run with another config ({difference}); choose another folder or delete this one"
    )
    assert str(caught.value) == f"{tmp_path}: {sentence}"


def test_run_folder_must_be_a_folder_with_a_whole_config(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder for the run, got a file; choose another path$"):
        files.prepare_run(tmp_path / "file", "{}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"config\.json: expected JSON, got broken text .*; remove the file$"
    ):
        files.prepare_run(tmp_path, "{}")


def test_metrics_are_read_back(tmp_path) -> None:
    assert files.read_metrics(tmp_path) == []
    files.append_metrics(tmp_path, {"step": 1, "loss": torch.tensor(0.5), "psnr": np.float32(2.0)})
    files.append_metrics(tmp_path, {"step": 2, "note": "ü"})
    assert files.read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "psnr": 2.0}, {"step": 2, "note": "ü"}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 60))
def test_a_crash_at_any_byte_loses_only_the_last_records(tmp_path, cut: int) -> None:
    target = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 0.5} for step in range(3)]
    target.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.truncate(target, target.stat().st_size - cut)
    kept = files.read_metrics(tmp_path)
    assert kept == records[: len(kept)]
    assert len(kept) >= (target.stat().st_size + 1) // len('{"step": 0, "loss": 0.5}\n')
    files.append_metrics(tmp_path, {"step": 9})
    assert files.read_metrics(tmp_path) == [*kept, {"step": 9}]


def test_bad_metrics_are_named(tmp_path) -> None:
    with pytest.raises(ValueError) as caught:
        files.append_metrics(tmp_path, {"loss": torch.zeros(3)})
    assert str(caught.value) == "metrics['loss']: expected one number, got shape (3,); reduce it first"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match="expected a JSON object on line 2, got broken text; remove it$"):
        files.read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected the folder of a run, found none; check the path$"):
        files.read_metrics(tmp_path / "none")


def test_metrics_after_a_step_are_cut(tmp_path) -> None:
    for step in (1, 2, 3):
        files.append_metrics(tmp_path, {"step": step, "loss": 0.5})
    assert files.cut_metrics(tmp_path, 2) == files.read_metrics(tmp_path)
    assert [record["step"] for record in files.read_metrics(tmp_path)] == [1, 2]
    assert files.cut_metrics(tmp_path, 0) == []


def test_seconds_add_up_over_starts_that_count_anew() -> None:
    records = [{"seconds": value} for value in (1.0, 4.0, 2.0, 3.0)] + [{"psnr": 20.0}, {"seconds": 5.0}]
    assert files.total_seconds(records) == 4.0 + 5.0
    assert files.total_seconds([]) == 0.0


def test_metrics_on_a_full_disk(tmp_path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full to imitate a full disk")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="the disk is full") as caught:
        files.append_metrics(tmp_path, {"step": 1})
    sentence = f"the disk is full, the last record is lost; {ADVICE}"
    assert str(caught.value) == f"{tmp_path / 'metrics.jsonl'}: {sentence}"


def test_environment_names_versions_and_no_place() -> None:
    text = describe()
    assert list(versions())[:3] == ["python", "enerverse", "torch"]
    assert f"device {device_name()}" in text
    assert str(Path.home()) not in text
