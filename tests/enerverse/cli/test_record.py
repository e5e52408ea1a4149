"""The settings of a dataset bind those who add to it."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest

from dataengine.episodes import DatasetWriteError, EpisodeDataset, EpisodeWriter
from enerverse.cli import record as verb
from enerverse.cli.messages import command
from enerverse.cli.record import Record, bound_settings, check_record, read_settings, recorded_task
from enerverse.cli.simulator import is_disturbed


def write_push(root):
    """One episode whose facts say Push, without the file of settings."""
    with EpisodeWriter(
        root,
        fps=10,
        views=("front",),
        image_size=(16, 16),
        state_dim=1,
        action_dim=1,
        extra={"privileged": 24},
    ) as writer:
        facts = np.zeros(24, np.float32)
        facts[20] = 1.0
        for _ in range(2):
            image = np.zeros((16, 16, 3), np.uint8)
            writer.add_frame(
                images={"front": image}, state=[0.0], action=[0.0], task="push", extra={"privileged": facts}
            )
        writer.save_episode(success=True, seed=0)
    return root


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task": "Lift"}, "task: expected Push as in the dataset in"),
        ({"noise": 0.5}, "noise: expected 1.0 as in the dataset in"),
        ({"clean_share": 0.0}, "clean_share: expected 0.25 as in the dataset in"),
        ({"randomize": True}, "randomize: expected False as in the dataset in"),
        ({"cameras": ("front",)}, r"cameras: expected \['front', 'left', 'top'\] as in the dataset in"),
        ({"clean_share": 1.5}, "clean_share: expected a share from 0 to 1, got 1.5"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"noise": -1.0}, "noise: expected 0 or more, got -1.0"),
        ({"episodes": 0}, "episodes: expected at least 1, got 0"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"ring": -1}, "ring: expected 0 or more cameras, got -1"),
        ({"holdout_ring": -2}, "holdout_ring: expected 0 or more cameras, got -2"),
        ({"ring": 4}, "ring: expected 0 as in the dataset in"),
        ({"bodies": True}, "bodies: expected False as in the dataset in"),
    ],
)
def test_other_settings_are_refused(changes, sentence, tmp_path):
    settings = Record(task="Push", out=write_push(tmp_path / "push"))
    (settings.out / "meta" / "record.json").write_text(json.dumps(bound_settings(settings)))
    check_record(settings)
    check_record(replace(settings, episodes=500, seed=100))
    with pytest.raises(ValueError, match=sentence):
        check_record(replace(settings, **changes))


def test_a_dataset_without_settings_still_tells_its_task(tmp_path):
    folder = write_push(tmp_path / "push")
    assert read_settings(folder) == {"task": "Push"}
    assert recorded_task(folder) == "Push"
    with pytest.raises(
        ValueError, match="task: expected Push as in the dataset in .*, got Lift; choose another --out"
    ):
        check_record(Record(task="Lift", out=folder))
    assert read_settings(tmp_path / "none") == {}
    assert recorded_task(tmp_path / "none") == "TASK"


def test_rings_and_bodies_are_recorded(tmp_path):
    settings = Record(
        task="Lift",
        out=tmp_path / "d",
        episodes=1,
        cameras=("top",),
        ring=2,
        holdout_ring=1,
        bodies=True,
        image_size=16,
    )
    verb.record_task(settings)
    dataset = EpisodeDataset(settings.out)
    assert dataset.views == ("top", "ring_00", "ring_01", "holdout_00")
    assert dataset.bodies[-1] == "cube"
    episode = dataset.episode(0, 0, 2)
    assert np.ptp(episode.cameras.camera_to_world, axis=0).max() == 0.0
    placed = verb.free_cameras(settings)["holdout_00"].position
    np.testing.assert_allclose(episode.cameras.camera_to_world[0, 3, :3, 3], placed, atol=1e-6)
    assert episode.body_ids["holdout_00"].shape == (2, 16, 16)
    assert read_settings(settings.out)["holdout_ring"] == 1
    assert verb.views_in_words(settings) == "top, 2 on a ring, 1 held out"


def test_a_refused_write_advises_the_same_command(tmp_path, monkeypatch):
    class Env:
        def close(self):
            pass

    def refuse(*_, **__):
        raise DatasetWriteError("continue with a new EpisodeWriter", errno=errno.ENOSPC)

    monkeypatch.setattr(verb, "make_env", lambda *_, **__: Env())
    monkeypatch.setattr("dataengine.record.writer_arguments", lambda env: {})
    monkeypatch.setattr("dataengine.episodes.EpisodeWriter", refuse)
    with pytest.raises(
        DatasetWriteError, match="No space left on device.*; free some space and run the same command"
    ):
        verb.record_task(Record(task="Push", out=tmp_path))


def test_disturbed_episodes_follow_from_the_seed():
    assert all(is_disturbed(seed, 0.0) for seed in range(50))
    assert not any(is_disturbed(seed, 1.0) for seed in range(50))
    assert 250 < sum(is_disturbed(seed, 0.25) for seed in range(400)) < 350


def test_commands_can_be_pasted():
    said = command("enerverse imagine", data="my data", episode=None, with_actions=True, device="cpu")
    assert said == "enerverse imagine --data 'my data' --with-actions --device cpu"
    assert command("enerverse train world", data=("a", "b")) == "enerverse train world --data a b"
