"""Saved policies: whole wherever they lie, light beside the world model whose parts they share."""

import json
import shutil

import numpy as np
import pytest
import torch

from enerverse.loading import load_world
from enerverse.pipelines import EnerVersePipeline, EnerVersePolicy
from enerverse.pipelines.saving import export_checkpoint


def test_saved_and_loaded_gives_the_same_actions(make_policy, play, tmp_path):
    policy = make_policy()
    policy.save_pretrained(tmp_path)
    loaded = EnerVersePolicy.from_pretrained(tmp_path)
    for name in ("autoencoder", "unet", "text_encoder", "head"):
        weights = getattr(policy, name).state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in getattr(loaded, name).state_dict().items())
    np.testing.assert_allclose(play(loaded, 6), play(policy, 6), atol=1e-5)


def test_a_policy_without_a_world_is_saved_without_one(make_policy, play, tmp_path):
    policy = make_policy(world=None)
    policy.save_pretrained(tmp_path)
    loaded = EnerVersePolicy.from_pretrained(tmp_path)
    assert loaded.unet is None
    assert not (tmp_path / "unet").exists()
    np.testing.assert_allclose(play(loaded, 6), play(policy, 6), atol=1e-5)


@pytest.fixture
def checkpoint(make_pipe, make_policy, tmp_path):
    """A folder with `world` and a light `policy` that refers to its parts."""
    return export_checkpoint(make_pipe(), make_policy(), tmp_path / "checkpoint")


def test_a_light_policy_saved_elsewhere_is_whole(checkpoint, play, tmp_path):
    light = EnerVersePolicy.from_pretrained(checkpoint / "policy")
    light.save_pretrained(tmp_path / "other" / "mine")
    shutil.rmtree(checkpoint)
    loaded = EnerVersePolicy.from_pretrained(tmp_path / "other" / "mine")
    assert (loaded.config.world, tuple(loaded.config.shared)) == (None, ())
    np.testing.assert_allclose(play(loaded, 6), play(light, 6), atol=1e-5)


def test_a_folder_with_its_own_parts_takes_none_from_its_neighbour(
    checkpoint, play, tmp_path, make_pipe, make_unet
):
    """Folders written by earlier versions name a neighbour although they hold every part."""
    light = EnerVersePolicy.from_pretrained(checkpoint / "policy")
    light.register_to_config(world="../world", shared=("autoencoder", "unet", "text_encoder"))
    light.save_pretrained(tmp_path / "other" / "mine")
    foreign = make_pipe(make_unet(widths=(8, 8)))
    foreign.save_pretrained(tmp_path / "other" / "world")
    loaded = EnerVersePolicy.from_pretrained(tmp_path / "other" / "mine")
    assert tuple(loaded.unet.config.widths) == (8, 16)
    np.testing.assert_allclose(play(loaded, 6), play(light, 6), atol=1e-5)


def test_an_index_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(["EnerVersePipeline"]))
    with pytest.raises(ValueError, match=r"model_index.json: expected a JSON object, got list; restore it"):
        EnerVersePipeline.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a trained world model, found none"):
        load_world(tmp_path)
