"""What a run folder was made from: written down, compared, never guessed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dataengine.episodes import EpisodeDataset, EpisodeWriter
from enerverse import presets
from enerverse.cli.stages import describe_data, remember, trained_steps, write_card


def write_dataset(root: Path, level: float = 0.0, episodes: int = 2) -> EpisodeDataset:
    """Episodes of two frames whose states hold `level`."""
    with EpisodeWriter(
        root, fps=10, views=("front",), image_size=(16, 16), state_dim=1, action_dim=1
    ) as writer:
        for _ in range(episodes):
            for _ in range(2):
                image = np.zeros((16, 16, 3), np.uint8)
                writer.add_frame(images={"front": image}, state=[level], action=[0.0], task="push")
            writer.save_episode(success=True)
    return EpisodeDataset(root)


def test_datasets_are_told_apart_by_content_and_order(tmp_path):
    one, other = write_dataset(tmp_path / "a" / "push"), write_dataset(tmp_path / "b" / "push", level=1.0)
    assert describe_data([one])["datasets"][0][:3] == ["push", 2, 4]
    assert describe_data([one]) != describe_data([other])
    assert describe_data([one, other]) != describe_data([other, one])
    copy = EpisodeDataset(shutil.copytree(one.root, tmp_path / "c" / "push"))
    assert describe_data([copy]) == describe_data([one])


def test_other_pictures_are_other_data(tmp_path):
    dataset = write_dataset(tmp_path / "push")
    before = describe_data([dataset])
    for path in dataset.root.glob("meta/episodes/*/*.parquet"):
        path.unlink()
    shutil.rmtree(dataset.root)
    with EpisodeWriter(
        tmp_path / "push", fps=10, views=("front",), image_size=(16, 16), state_dim=1, action_dim=1
    ) as writer:
        for _ in range(2):
            for _ in range(2):
                image = np.full((16, 16, 3), 200, np.uint8)
                writer.add_frame(images={"front": image}, state=[0.0], action=[0.0], task="push")
            writer.save_episode(success=True)
    assert describe_data([EpisodeDataset(tmp_path / "push")]) != before


def test_facts_are_compared_where_something_was_made(tmp_path):
    facts, made = tmp_path / "latents.json", tmp_path / "latents.safetensors"
    remember(facts, {"datasets": [["push", 2]]}, made)
    remember(facts, {"datasets": [["lift", 2]]}, made)  # nothing was made of the first ones
    made.touch()
    remember(facts, {"datasets": [("lift", 2)]}, made)
    with pytest.raises(
        ValueError, match=r"made from other datasets \(.*\); choose another --out, or delete"
    ) as error:
        remember(facts, {"datasets": [["push", 2]]}, made)
    assert str(error.value).endswith(f"delete {made} and whatever was made from it")


def test_what_is_of_unknown_origin_is_refused_until_it_is_deleted(tmp_path):
    facts, made = tmp_path / "latents.json", tmp_path / "latents.safetensors"
    made.touch()
    with pytest.raises(
        ValueError, match="expected the facts that say what latents.safetensors was made from"
    ) as error:
        remember(facts, {"datasets": 1}, made)
    assert str(error.value).endswith(f"delete {made}")
    assert not facts.exists()
    made.unlink()
    remember(facts, {"datasets": 1}, made)
    assert json.loads(facts.read_text()) == {"datasets": 1}


def test_a_recipe_adopts_what_it_made_before_facts_were_written(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    remember(tmp_path / "data.json", {"datasets": 1}, tmp_path / "checkpoints", adopt=True)
    with pytest.raises(ValueError, match="made from other datasets"):
        remember(tmp_path / "data.json", {"datasets": 2}, tmp_path / "checkpoints", adopt=True)


def test_the_card_tells_the_steps_that_the_world_model_had(tmp_path):
    run, dataset = tmp_path / "run", write_dataset(tmp_path / "push")
    (run / "world").mkdir(parents=True)
    (run / "world" / "config.json").write_text('{"train_world": {"steps": 17}}')
    assert trained_steps(run / "world" / "pipeline") == 17
    assert trained_steps(run / "checkpoint" / "world") == 17
    assert trained_steps(tmp_path / "elsewhere" / "world") is None
    write_card(run / "checkpoint", presets.tiny(), [dataset], {"world": 17, "policy": 2})
    text = (run / "checkpoint" / "card.md").read_text()
    assert "steps: world 17, policy 2;" in text
    assert "Trained on push (2 episodes, 4 frames)." in text
