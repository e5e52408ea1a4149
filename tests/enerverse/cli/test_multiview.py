"""From two cameras to four, to a page, to a trained world model and policy: the program, end to end at toy sizes."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest

from dataengine.episodes import EpisodeDataset
from enerverse.cli.main import main, parse
from enerverse.cli.multiview import describe, describe_trial, spread
from enerverse.loading import load_policy, load_world
from tests.enerverse.cli.test_refusals import refused

STEPS = ("--steps", 2, "--batch", 2, "--device", "cpu")
QUICK = ("--steps", 3, "--rounds", 1, "--generator", "none")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two demonstrations of Lift, two cameras with depth and bodies, 64 px."""
    folder = tmp_path_factory.mktemp("pair") / "lift"
    words = [
        "record",
        "--task",
        "Lift",
        "--out",
        str(folder),
        "--episodes",
        "2",
        "--cameras",
        "front",
        "left",
    ]
    assert main([*words, "--depth", "--bodies"]) == 0
    return folder


@pytest.fixture(scope="module")
def many(pair, tmp_path_factory):
    """The same with four views."""
    folder = tmp_path_factory.mktemp("many") / "lift4"
    assert (
        main(["multiview", "--dataset", str(pair), "--views", "4", "--out", str(folder), *map(str, QUICK)])
        == 0
    )
    return folder


def test_two_cameras_become_four_and_everything_trains_on_them(pair, many, call, tmp_path):
    made = EpisodeDataset(many)
    assert made.problems() == []
    assert made.views == ("front", "left", "view_00", "view_01")
    assert made.lengths == EpisodeDataset(pair).lengths
    run, views = tmp_path / "run", ("--views", "view_01", "front", "view_00")
    for stage in ("autoencoder", "world", "policy"):
        said = call("train", stage, "--data", many, "--out", run, *views, *STEPS)
        assert said.code == 0, said.err
        assert "views view_01, front, view_00\n" in said.out
    assert (
        f"next: enerverse imagine --checkpoint {run} --data {many}" in said.out
    )  # the simulator has no such camera
    assert tuple(load_world(run).config.views) == tuple(load_policy(run).config.views) == views[1:]
    film = tmp_path / "film.mp4"
    words = ("--checkpoint", run, "--data", many, "--frames", 8, "--steps", 1, "--with-actions")
    assert call("imagine", *words, "--out", film).code == 0
    assert film.stat().st_size > 1000
    refused(
        call("train", "world", "--data", many, "--out", run, *STEPS), "pass --views view_01 front view_00"
    )


def test_without_a_word_training_takes_the_first_three_views(many, call, tmp_path):
    said = call("train", "autoencoder", "--data", many, "--out", tmp_path, *STEPS)
    assert said.code == 0, said.err
    assert "views front, left, view_00\n" in said.out
    assert "next: enerverse train world --data" in said.out
    refused(
        call("train", "autoencoder", "--data", many, "--views", "view_09", *STEPS), "unknown view 'view_09'"
    )
    twice = ("--views", "front", "front", "left")
    refused(call("train", "autoencoder", "--data", many, *twice, *STEPS), "views: expected every view once")


def test_the_same_command_goes_on_and_says_so(pair, many, call):
    said = call("multiview", "--data", pair, "--views", 4, "--out", many, *QUICK)
    assert said.code == 0, said.err
    head, tail = said.out.split(f"{many}: already holds 2 episodes\n")
    assert head.count("\n") <= 6
    assert re.search(r"\nabout \d+ seconds on one core\n", head)
    assert "2 new views beside front, left" in head
    assert "dB; they show" in tail
    assert f"next: enerverse train autoencoder --data {many} --out runs/mine\n" in tail
    assert f"enerverse reconstruct --data {pair} --out runs/scene\n" in tail


def test_new_cameras_may_be_named(pair, call, tmp_path):
    cameras = EpisodeDataset(pair).cameras(0).at(0).select(["front"])
    pose = cameras.camera_to_world[0].copy()
    pose[:3, 3] += (0.0, 0.1, 0.0)
    entry = {"intrinsics": cameras.intrinsics[0].tolist(), "camera_to_world": pose.tolist()}
    (tmp_path / "cameras.json").write_text(json.dumps({"beside": entry}))
    out = tmp_path / "out"
    words = ("--cameras", tmp_path / "cameras.json", "--episodes", 1, "--image-size", 32, "--window", 20)
    said = call("multiview", "--data", pair, "--out", out, *words, *QUICK)
    assert said.code == 0, said.err
    assert "1 new view beside front, left" in said.out
    made = EpisodeDataset(out)
    assert made.views == ("front", "left", "beside")
    assert made.picture_size("beside") == (32, 32)
    np.testing.assert_allclose(made.cameras(0).at(0).camera_to_world[2], pose, atol=1e-6)


def test_a_page_of_the_scene(pair, call, tmp_path):
    out = tmp_path / "scene"
    said = call("reconstruct", "--dataset", pair, "--out", out, "--steps", 3, "--formats", "page", "film")
    assert said.code == 0, said.err
    assert re.search(r", 3 steps each; about \d+ seconds on one core\n", said.out)
    page = out / "episode_000" / "scene.html"
    assert f"page: {page}\n" in said.out
    assert page.read_text().startswith("<!")
    assert f"canonical: {out / 'episode_000' / 'canonical.ply'}\n" in said.out
    assert (out / "episode_000" / "canonical.ply").is_file()
    assert "enerverse multiview" in said.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["multiview", "--views", "2"], "views: expected more than the 2 that are observed (front, left), got 2"),
        (["multiview", "--generator", "restor"], "generator: expected one of none, fill, restorer, world, got 'restor'"),
        (["multiview", "--observed", "front"], "expected at least 2 views with camera poses, got 1"),
        (["multiview", "--observed", "front", "letf"], "unknown view 'letf'; did you mean 'left'"),
        (["multiview", "--episodes", "7"], "episodes: expected some of 0 to 1"),
        (["multiview", "--workers", "0"], "workers: expected at least 1, got 0"),
        (["multiview", "--window", "0"], "window: expected at least 1 frame, got 0"),
        (["multiview", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["multiview", "--seed", "-1"], "seed: expected 0 or more, got -1"),
        (["multiview", "--cameras", "none.json"], "none.json: expected a file of cameras, found none"),
        (["reconstruct", "--formats", "plyy"], "formats: expected some of page, ply"),
        (["reconstruct", "--motion", "ridgid"], "got 'ridgid'; did you mean 'rigid'"),
        (["reconstruct", "--episodes", "2"], "episodes: expected some of 0 to 1"),
        (["reconstruct", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["reconstruct", "--workers", "0"], "workers: expected at least 1, got 0"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_named(words, sentence, pair, call, tmp_path):
    refused(call(*words, "--data", pair, "--out", tmp_path / "x"), sentence)
    assert not (tmp_path / "x").exists()


def test_the_folder_of_the_data_is_refused(pair, call):
    refused(
        call("multiview", "--data", pair, "--out", pair), "out: expected another folder than the dataset's"
    )


def test_nothing_to_read_is_said(call, tmp_path):
    refused(
        call("multiview", "--data", tmp_path, "--out", tmp_path / "x"),
        "expected this file in a LeRobot dataset",
    )
    refused(
        call("reconstruct", "--data", tmp_path),
        "expected a LeRobot dataset, a transforms.json or a COLMAP model",
    )


def test_doubtful_results_are_told():
    from dataengine.multiview import Report

    figures = ({"input_psnr": 15.0, "cover": {"view_00": 0.9, "view_01": 0.4}, "rounds": 0.5},) * 2
    report = Report(made=2, before=0, frames=10, seconds=3.0, figures=figures)
    lines = describe(report, "out")
    assert "of 2 rounds of repair 0.5 were kept" in describe(report, "out", 2)[2]
    assert lines[0] == "made 2 episodes, 10 frames in 3 s: out"
    assert "15.0 dB; they show 65% of the new views' pixels" in lines[1]
    assert "below 20 dB the new views are doubtful" in lines[2]
    assert lines[3].startswith("seen less than 80%: view_01 (40%); observe more views")
    trial = {"rounds": 1, "last_word": True, "hidden_psnr": [20.0, 24.04, 23.0], "repaired_psnr": 24.5}
    assert describe(dataclasses.replace(report, probe=trial), "out", 2)[2] == (
        "pixels hidden for a trial are shown with 20.0 -> 24.0 -> 23.0 dB round by round, so 1 round each; its last "
        "repair gives 24.5 dB"
    )
    colour = dataclasses.replace(report, figures=({"input_psnr": 25.0, "cover": None, "rounds": 2},))
    assert describe(colour, "out")[1:] == [
        "the scene gives the observed views back with 25.0 dB; they have no depth"
    ]


def test_a_trial_says_why_rounds_that_showed_more_are_not_turned():
    told = {"hidden_psnr": [21.4, 22.8], "rounds": 0, "last_word": False, "repaired_psnr": 23.3}
    assert describe_trial(told) == (
        "pixels hidden for a trial are shown with 21.4 -> 22.8 dB round by round, so 0 rounds each, as more made observed "
        "views worse; its last repair is left out"
    )


def test_rerun_without_its_package_is_one_sentence(pair, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    refused(
        call("reconstruct", "--data", pair, "--out", tmp_path / "x", "--formats", "rerun"),
        "rerun-sdk: expected the package, ",
    )
    assert not (tmp_path / "x").exists()


def test_one_worker_is_this_process():
    assert spread(1) is map
    assert parse(["multiview", "--dataset", "a", "--out", "b"]).data.name == "a"
