"""The recipe uses again only what was made from the same data and settings; the card counts what is there."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dataengine.episodes import EpisodeWriter
from enerverse import presets
from enerverse.config import to_json
from enerverse.recipes import ship, tiny


def write_dataset(root, seeds):
    with EpisodeWriter(
        root, fps=10, views=("front",), image_size=(16, 16), state_dim=1, action_dim=1
    ) as writer:
        for seed in seeds:
            for _ in range(2):
                image = np.zeros((16, 16, 3), np.uint8)
                writer.add_frame(images={"front": image}, state=[0.0], action=[0.0], task="push")
            writer.save_episode(success=True, seed=seed)


def test_every_stage_trains_longer_on_a_gpu(monkeypatch):
    plain = presets.tiny()
    monkeypatch.setattr(tiny.stages, "default_device", lambda: "cuda")
    preset = tiny.Tiny(gpu_factor=3).preset()
    for stage in ("autoencoder", "world", "policy"):
        section = f"train_{stage}"
        assert getattr(preset, section).steps == 3 * getattr(plain, section).steps
    assert tiny.Tiny(world_steps=7).preset().train_world.steps == 7
    monkeypatch.setattr(tiny.stages, "default_device", lambda: "cpu")
    assert tiny.Tiny().preset() == plain


def test_the_policy_is_trained_on_the_default_device(monkeypatch, tmp_path):
    seen = {}

    class Part:
        unet = None

        def to(self, device):
            return self

    def train_policy(*_, device=None, **__):
        seen["device"] = device
        return Part()

    monkeypatch.setattr(tiny.stages, "default_device", lambda: "cuda")
    monkeypatch.setattr(tiny.stages.LatentEpisodes, "load", lambda path: None)
    monkeypatch.setattr(tiny.EnerVersePipeline, "from_pretrained", lambda path: Part())
    monkeypatch.setattr(tiny, "read_split", lambda out, split: {})
    monkeypatch.setattr(tiny, "fingerprint", lambda module: "0")
    monkeypatch.setattr(tiny, "train_policy", train_policy)
    monkeypatch.setattr(tiny, "export_checkpoint", lambda *_: None)
    tiny.Tiny(out=tmp_path)._policy()
    assert seen == {"device": "cuda"}
    assert json.loads((tmp_path / "policy" / "data.json").read_text()) == {"datasets": [], "world": "0"}


def test_data_of_another_plan_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "TASKS", {"Push": 3})
    write_dataset(tmp_path / "data" / "train" / "Push", range(3))
    tiny.check_data(tmp_path)  # adopted
    tiny.check_data(tmp_path)
    monkeypatch.setattr(tiny, "TASKS", {"Push": 4})
    with pytest.raises(ValueError, match="the folder was made from other train"):
        tiny.check_data(tmp_path)
    (tmp_path / "data.json").unlink()
    monkeypatch.setattr(tiny, "TASKS", {"Push": 2})
    with pytest.raises(
        ValueError, match="Push: expected at most 2 episodes as the recipe says, got 3; choose another"
    ):
        tiny.check_data(tmp_path)


def test_a_stage_of_other_settings_is_refused(tmp_path):
    preset = presets.tiny()
    (tmp_path / "config.json").write_text(to_json(preset))
    tiny.check_settings(tmp_path, preset, "world")
    tiny.check_settings(
        tmp_path, replace(preset, train_policy=replace(preset.train_policy, steps=1)), "world"
    )
    longer = replace(preset, train_world=replace(preset.train_world, steps=1))
    tiny.check_settings(tmp_path, longer, "autoencoder")
    sentence = rf"\(train_world.steps is {preset.train_world.steps} there and 1 here\); choose another --out or delete it"
    with pytest.raises(ValueError, match=sentence):
        tiny.check_settings(tmp_path, longer, "world")


def test_settings_that_a_preset_got_later_do_not_count(tmp_path):
    older = json.loads(to_json(presets.tiny()))
    del older["unet"]["embedding"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    tiny.check_settings(tmp_path, presets.tiny(), "world")
    tiny.check_settings(tmp_path / "fresh", presets.tiny(), "world")


def test_the_card_counts_what_the_run_holds(tmp_path):
    for split, seeds in (("train", range(100_000, 100_020)), ("test", range(150_000, 150_002))):
        write_dataset(tmp_path / "data" / split / "Push", seeds)
    for part in ("autoencoder", "world", "policy"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({f"train_{part}": {"batch": 8, "seed": 0}}))
        rows = [
            {"step": step, "loss": 0.5, "seconds": seconds}
            for step, seconds in ((10, 5.0), (20, 9.0), (30, 2.0))
        ]
        (tmp_path / part / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = ship.card(tmp_path, tmp_path / "results")
    row = next(line for line in text.splitlines() if line.startswith("| Push"))
    episodes, disturbed, undisturbed, frames = (int(cell) for cell in row.split("|")[2:6])
    assert (episodes, frames) == (20, 40)
    assert disturbed + undisturbed == 20
    assert disturbed > undisturbed > 0
    assert row.endswith("| 100000 to 100019 |")
    assert "Held out: test (2 episodes, seeds + 50000)." in text
    assert "| world | 30 | 8 | 0 | 11 | 0.5000 |" in text
    assert "| figure | value |" in text


def test_the_card_quotes_what_was_measured(tmp_path):
    gains = {"1-8": {"gain": 5.04, "gain_interval": [4.71, 5.4]}}
    measured = {
        "imagination": {"test": {"copy_last": gains, "plan_5_steps": gains}},
        "policies": {"tokens": {"Lift": {"success": 0.9, "interval": [0.8, 0.95]}, "p_against_latents": 0.1}},
        "memory_recall": {
            "chance": 1 / 3,
            "history": {"sparse_uniform": {"rate": 0.5, "interval": [0.4, 0.6]}},
        },
    }
    (tmp_path / "cpu").mkdir()
    for case, values in measured.items():
        (tmp_path / "cpu" / f"{case}.json").write_text(json.dumps({"values": values}))
    assert ship.measured_rows(tmp_path) == [
        "| by planned actions, 5 steps, frames 1-8: gain over copying | +5.0 dB [+4.7, +5.4] |",
        "| policy, Lift: success | 90 % [80, 95] |",
        "| cue recall, history, sparse memory | 50 % [40, 60] |",
    ]
    assert ship.measured_rows(tmp_path / "nowhere") == []
