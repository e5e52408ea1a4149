"""Folders of several files: whole or not there."""

import errno

import pytest
import torch

from enerverse.folders import INDEX, staged_folder
from enerverse.latents import PatchAutoencoder
from enerverse.model import HashedTextEncoder


def test_files_arrive_with_the_index_last_and_others_stay(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "card.md").write_text("kept")
    moved = []
    replace = __import__("os").replace
    monkeypatch.setattr("enerverse.folders.os.replace", lambda a, b: (moved.append(a.name), replace(a, b)))
    with staged_folder(target) as stage:
        for name in (INDEX, "a.json", "unet/config.json", "unet/w.safetensors", "z.safetensors"):
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_text(name)
    assert moved == ["w.safetensors", "z.safetensors", "a.json", "config.json", INDEX]
    assert (target / "card.md").read_text() == "kept"
    assert (target / "unet" / "config.json").read_text() == "unet/config.json"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_block_that_raises_changes_nothing(tmp_path):
    target = tmp_path / "model"
    with staged_folder(target) as stage:
        (stage / "config.json").write_text("old")
    with pytest.raises(RuntimeError, match="half way"), staged_folder(target) as stage:
        (stage / "config.json").write_text("new")
        raise RuntimeError("half way")
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("part", [HashedTextEncoder(8, 16), PatchAutoencoder(8, 4, 16, 1, 1)])
def test_a_full_disk_while_a_model_is_saved_is_one_sentence(part, tmp_path, monkeypatch):
    """Weights are written by another language, which reports a full disk as text."""

    def fill(*_, **__):
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    part.save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    monkeypatch.setattr("safetensors.torch.save_file", fill)
    with torch.no_grad():
        next(part.parameters()).add_(1)
    with pytest.raises(
        OSError, match=r"model: the disk is full, nothing was changed; free some space"
    ) as caught:
        part.save_pretrained(tmp_path / "model")
    assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
