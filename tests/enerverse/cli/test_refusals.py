"""Whatever a user can get wrong ends in one sentence and exit code 2."""

import errno
import json
import shutil

import numpy as np
import pytest

from dataengine.episodes import EpisodeDataset, EpisodeWriter
from enerverse import loading
from enerverse.cli.failures import exit_code, explain
from enerverse.cli.main import main
from enerverse.train.loop import NotFinite, TrainingStopped

STEPS = ("--steps", 2, "--batch", 2, "--device", "cpu")


def refused(said, sentence):
    """One line on standard error that holds `sentence`, exit code 2."""
    assert said.code == 2, said
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("enerverse: ")
    assert "Traceback" not in said.err
    assert sentence in said.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["imagin"], "unknown verb 'imagin': did you mean 'imagine'?"),
        (["train", "wrld", "--data", "DATA"], "unknown stage 'wrld': did you mean 'world'?"),
        (["train", "world", "--data", "DATA", "--preset", "tny"], "unknown preset 'tny': did you mean 'tiny'?"),
        (["rollout", "--task", "Lfit"], "unknown task 'Lfit': did you mean 'Lift'?"),
        (["record", "--task", "Pish", "--out", "x"], "unknown task 'Pish': did you mean 'Push'?"),
        (["demo", "--tasks", "Lift", "OpenDraw"], "unknown task 'OpenDraw': did you mean 'OpenDrawer'?"),
        (
            ["imagine", "--data", "DATA", "--checkpoint", "RUN", "--memory", "sparse"],
            "unknown memory policy 'sparse': did you mean 'sparse_uniform'?",
        ),
        (["train", "autoencoder", "--data", "nowhere"], "nowhere: expected a dataset folder, found none"),
        (["train", "autoencoder", "--data", "DATA", "--device", "tpu"], "expected cpu or cuda, got 'tpu'"),
        (["train", "autoencoder", "--data", "DATA", "--steps", "0"], "expected at least 1, got 0"),
        (["train", "world", "--data", "DATA", "--out", "x"], "expected a trained autoencoder, found none"),
        (["train", "policy", "--data", "DATA", "--out", "x"], "x: expected a trained world model, found none"),
        (["imagine", "--data", "DATA", "--checkpoint", "nowhere"], "nowhere: expected a trained world model"),
        (["rollout", "--task", "Lift", "--checkpoint", "nowhere"], "nowhere: expected a trained policy"),
        (["rollout", "--task", "Lift", "--episodes", "0"], "episodes: expected at least 1, got 0"),
        (["rollout", "--task", "Lift", "--out", "x.gif"], "out: expected a name that ends in .mp4"),
        (["imagine", "--data", "DATA", "--checkpoint", "RUN", "--episode", "9"], "expected 0 to 1"),
        (["imagine", "--data", "DATA", "--checkpoint", "RUN", "--start", "0"], "expected at least one observed"),
        (["imagine", "--data", "DATA", "--checkpoint", "RUN", "--start", "999"], "start: expected at most"),
        (
            ["imagine", "--data", "DATA", "--checkpoint", "RUN", "--with-actions", "--plan"],
            "with-actions and plan: expected one of them, got both",
        ),
        (["imagine", "--data", "nowhere", "--checkpoint", "RUN"], "nowhere: expected a dataset folder"),
        (["demo", "--episodes", "0"], "episodes: expected at least 1, got 0"),
        (["rollout", "--task", "Lift", "--seed", "-1"], "seed: expected 0 or more, got -1"),
        (["record", "--task", "Lift", "--out", "x", "--seed", "-1"], "seed: expected 0 or more, got -1"),
        (["record", "--task", "Lift", "--out", "x", "--clean-share", "2"], "clean_share: expected a share from 0"),
        (["record", "--task", "Push", "--out", "DATA"], "task: expected Lift as in the dataset in"),
        (["record", "--task", "Lift", "--out", "DATA", "--noise", "0"], "noise: expected 1.0 as in the dataset"),
        (["train", "world", "--data", "DATA", "--seed", "-1"], "seed: expected 0 or more, got -1"),
        (["sparse", "claim", "attention/hipp"], "unknown method 'attention/hipp': did you mean 'attention/hip'?"),
        (["sparse", "claim"], "name: expected a method to claim for, got none; take one of attention/combiner"),
        (["sparse", "claim", "hipp"], "unknown method 'hipp': did you mean 'hip'?"),
        (["train", "world", "--data", "DATA", "--attention", "s3"], "unknown method 's3': did you mean 's2'?"),
        (
            ["train", "policy", "--data", "DATA", "--attention", "s2"],
            "attention: expected none for the stage policy, got s2; it belongs to the stage world",
        ),
        (["train", "autoencoder", "--data", "DATA", "--attention", "s2"], "expected none for the stage autoencoder"),
        (["train", "world", "--data", "DATA", "--attention", "tidal"], "attention/tidal: expected a method for whole"),
        (["info", "--checkpoint", "nowhere"], "nowhere: expected a trained world model or policy, found none"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_named(words, sentence, call, data, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"DATA": data, "RUN": trained}
    refused(call(*[places.get(word, word) for word in words]), sentence)


def test_the_missing_shipped_checkpoint_says_how_to_train_one(call, data, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SHIPPED", tmp_path)
    refused(call("imagine", "--data", data), "run `make tiny` to train one")


def test_other_views(call, trained, tmp_path):
    assert (
        call("record", "--task", "Lift", "--out", tmp_path, "--episodes", 1, "--cameras", "front").code == 0
    )
    sentence = "expected the 3 views front, left, top for the preset tiny, got front; record with --cameras"
    refused(call("train", "autoencoder", "--data", tmp_path, *STEPS), sentence)
    refused(call("imagine", "--data", tmp_path, "--checkpoint", trained), "for the checkpoint, got front")


def test_another_picture_size(call, trained, tmp_path):
    assert call("record", "--task", "Lift", "--out", tmp_path, "--episodes", 1, "--image-size", 32).code == 0
    sentence = (
        "expected pictures of 64 x 64 pixels for the checkpoint, got 32 x 32; record with --image-size 64"
    )
    refused(call("imagine", "--data", tmp_path, "--checkpoint", trained), sentence)


def test_a_damaged_dataset(call, data, trained, tmp_path):
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "meta" / "info.json").write_text("{")
    refused(call("train", "autoencoder", "--data", broken), "info.json")
    broken = shutil.copytree(data, tmp_path / "cut")
    for video in broken.rglob("*.mp4"):
        video.write_bytes(video.read_bytes()[:200])
    refused(call("imagine", "--data", broken, "--checkpoint", trained), "cannot read episode 0")


def test_a_damaged_checkpoint(call, data, trained, tmp_path):
    broken = shutil.copytree(trained / "checkpoint", tmp_path / "broken")
    weights = next((broken / "world" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(call("imagine", "--data", data, "--checkpoint", broken), "got a damaged one")
    (broken / "world" / "model_index.json").write_text("{")
    refused(call("imagine", "--data", data, "--checkpoint", broken), "model_index.json: expected JSON")


def test_a_damaged_autoencoder(call, data, trained, tmp_path):
    broken = shutil.copytree(trained / "autoencoder" / "autoencoder", tmp_path / "broken")
    weights = broken / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    words = ("train", "world", "--data", data, "--out", tmp_path / "run", "--autoencoder", broken)
    refused(call(*words), "expected a whole autoencoder, got a damaged one")


def test_actions_out_of_range(call, data, trained, tmp_path):
    source = EpisodeDataset(data).episode(0)
    assert source.cameras is not None
    with EpisodeWriter(
        tmp_path, fps=10, views=source.views, image_size=(64, 64), state_dim=source.state.shape[1],
        action_dim=7, cameras=True,
    ) as writer:  # fmt: skip
        for t in range(len(source)):
            cameras = {
                view: {
                    "intrinsics": source.cameras.intrinsics[t, v],
                    "camera_to_world": source.cameras.camera_to_world[t, v],
                }
                for v, view in enumerate(source.views)
            }
            images = {view: source.images[view][t] for view in source.views}
            writer.add_frame(
                images=images, state=source.state[t], action=np.full(7, 2.0), task="lift", cameras=cameras
            )
        writer.save_episode(success=True)
    words = ("imagine", "--data", tmp_path, "--checkpoint", trained, "--out", tmp_path / "x.mp4")
    refused(call(*words, "--with-actions"), "actions: expected values in [-1, 1], got 2")
    assert not (tmp_path / "x.mp4").exists()


def test_another_config_in_the_run_folder(call, data, trained):
    words = ("train", "world", "--data", data, "--out", trained, "--steps", 3, "--batch", 2)
    sentence = (
        "another config (train_world.steps is 2 there and 3 here); choose another folder or delete this one"
    )
    refused(call(*words), sentence)


def test_other_data_in_the_run_folder(call, data, trained, tmp_path):
    more = shutil.copytree(data, tmp_path / "more")
    sentence = "the folder was made from other datasets"
    for stage in ("autoencoder", "world", "policy"):
        refused(call("train", stage, "--data", data, more, "--out", trained, *STEPS), sentence)


def test_other_data_are_refused_when_the_cache_has_lost_its_facts(call, data, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    more = shutil.copytree(data, tmp_path / "more")
    (run / "latents.json").unlink()
    (run / "policy" / "features.safetensors").unlink()
    words = ("--data", data, "--out", run, *STEPS)
    refused(call("train", "world", *words), f"delete {run / 'latents.safetensors'}")
    for stage in ("world", "policy"):
        refused(call("train", stage, "--data", data, more, "--out", run, *STEPS), "made from other datasets")


def test_an_autoencoder_of_another_run(call, data, trained, tmp_path):
    other = tmp_path / "other"
    assert call("train", "autoencoder", "--data", data, "--out", other, *STEPS, "--seed", 5).code == 0
    words = ("train", "world", "--data", data, "--out", trained, "--autoencoder", other, *STEPS)
    refused(call(*words), "the folder was made from other autoencoder")


def test_traceback_on_demand(monkeypatch):
    with pytest.raises(ValueError, match="unknown verb"):
        main(["imagin", "--traceback"])
    monkeypatch.setenv("ENERVERSE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown verb"):
        main(["imagin"])


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            2,
            "a/b: the disk is full; free some space",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a/b"),
            2,
            "a/b: expected a file or folder, found none",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            2,
            "a/b: not allowed to write or read there",
        ),
        (NotFinite("step 3: expected a finite loss"), 2, "step 3: expected a finite loss"),
        (TrainingStopped("stopped after step 3"), 130, "stopped after step 3"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ValueError("two\nlines"), 2, "two lines"),
    ],
)
def test_failures_outside_our_reach(error, code, sentence):
    assert exit_code(error) == code
    assert explain(error).startswith(sentence)
    assert "\n" not in explain(error)


def test_mistakes_of_the_program_keep_their_traceback():
    assert exit_code(RuntimeError("shape mismatch")) is None
    assert exit_code(KeyError("x")) is None


def test_facts_of_a_folder_are_json(trained):
    facts = json.loads((trained / "latents.json").read_text())
    assert facts["datasets"][0][:2] == ["lift", 2]
    assert len(facts["autoencoder"]) == 12
