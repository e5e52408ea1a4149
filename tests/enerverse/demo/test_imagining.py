"""Takes, scores over the horizon, and what the demo's page shows."""

import math
from dataclasses import replace

import numpy as np
import pytest

from enerverse.cli.demo import check_observed
from enerverse.demo.imagining import Imagined, frame_psnr, mean_psnr
from enerverse.demo.page import build
from enerverse.demo.results import Acting, DemoResults, Imaginations
from enerverse.demo.takes import Take
from enerverse.metrics import wilson

VIEWS = ("front", "top")


def make_take(frames: int = 6, size: int = 8) -> Take:
    """Frame t is t levels bright; action t holds t."""
    pictures = np.arange(frames, dtype=np.uint8)[:, None, None, None, None]
    return Take(
        pictures=np.broadcast_to(pictures, (frames, 2, size, size, 3)).copy(),
        state=np.zeros((frames, 11), np.float32),
        action=np.tile(np.arange(frames - 1, dtype=np.float32)[:, None], (1, 7)),
        intrinsics=np.tile(np.eye(3), (2, 1, 1)),
        camera_to_world=np.tile(np.eye(4), (2, 1, 1)),
        task="push",
        fps=10.0,
        views=VIEWS,
    )


def test_actions_lead_to_the_frames_after_the_seen_ones():
    take = make_take(frames=6)
    np.testing.assert_array_equal(take.actions_after(2, 3)[:, 0], [1, 2, 3])


def test_past_the_end_the_arm_rests_and_the_gripper_keeps_its_command():
    ahead = make_take(frames=6).actions_after(4, 5)
    np.testing.assert_array_equal(ahead[:, 0], [3, 4, 0, 0, 0])
    np.testing.assert_array_equal(ahead[:, -1], [3, 4, 4, 4, 4])


def test_frame_psnr_is_that_of_the_mean_squared_error():
    truth = np.zeros((3, 2, 4, 4, 3), np.uint8)
    frames = truth.copy()
    frames[1] = 51  # a fifth of the range
    frames[2, 0] = 51
    values = frame_psnr([frames], [truth])
    assert values[0] == math.inf
    np.testing.assert_allclose(values[1:], [-10 * math.log10(0.04), -10 * math.log10(0.02)])


def test_a_take_that_has_ended_no_longer_counts():
    long, short = np.zeros((3, 1, 4, 4, 3), np.uint8), np.full((3, 1, 4, 4, 3), 51, np.uint8)
    values = frame_psnr([long, short], [long, np.zeros((1, 1, 4, 4, 3), np.uint8)])
    np.testing.assert_allclose(values[0], -10 * math.log10(0.02))
    assert values[1] == math.inf
    assert np.isnan(frame_psnr([short], [short[:2]])[2])


def test_mean_psnr_weighs_by_error():
    assert mean_psnr(np.array([20.0, np.nan])) == pytest.approx(20.0)
    assert mean_psnr(np.array([10.0, 20.0])) == pytest.approx(-10 * math.log10(0.055))
    assert math.isnan(mean_psnr(np.array([np.nan])))


@pytest.fixture
def results() -> DemoResults:
    """One task, two takes of different lengths, perfect imagination from actions."""
    takes = [make_take(6), make_take(9)]
    frames = np.stack([np.resize(take.pictures[2:], (4, 2, 8, 8, 3)) for take in takes])
    told = Imagined(frames=frames, ended=[-1, 2], chunks=2, seconds=0.4)
    part = Imaginations(takes=takes, seen=2, versions={"instruction": told, "actions": told})
    acting = Acting(
        wins=3, episodes=4, success=wilson(3, 4), steps=20.0, decision_ms=5.0,
        film=np.zeros((3, 16, 16, 3), np.uint8),
    )  # fmt: skip
    return DemoResults(
        imaginations={"Push": part}, acting={"Push": acting}, memory=part, viewed=None, chunk_ms=100.0, chunk=2, fps=10.0,
        device="cpu", checkpoint="Checkpoint: test", seconds={"imagining": 1.0, "acting": 2.0},
    )  # fmt: skip


def test_time_per_chunk_is_for_one_take(results):
    assert results.imaginations["Push"].versions["actions"].chunk_ms == pytest.approx(100.0)


def test_curves_end_with_the_shortest_take(results):
    curves = results.imaginations["Push"].curves()
    assert set(curves) == {"instruction", "actions", "copying the last frame"}
    assert all(len(values) == 4 for values in curves.values())
    assert np.isinf(curves["actions"]).all()
    assert (np.diff(curves["copying the last frame"]) < 0).all()


def test_rows_and_page_say_the_same(results):
    row = results.rows()[0]
    assert len(row) == len(results.columns())
    assert row[0] == "Push"
    assert row[4:] == ["3 of 4", "30 to 95%", "20.0"]
    assert ["seconds in total", "3.0"] in results.timing()
    page = build(results).html()
    assert "3 of 4" in page
    assert "30 to 95%" in page
    assert (
        "over the true frames, at most 4, and all views of 2 episodes with seeds outside the training data"
        in page
    )
    assert "<td>20.0</td>" in page
    assert page.count("<video") == 5  # two takes, twice, and the policy


def test_one_is_counted_in_the_singular(results):
    short = {
        "told": Imagined(frames=np.zeros((1, 1, 2, 8, 8, 3), np.uint8), ended=[-1], chunks=1, seconds=0.1)
    }
    part = Imaginations(
        takes=[make_take(6)], seen=2, versions={"instruction": short["told"], "actions": short["told"]}
    )
    page = build(replace(results, imaginations={"Push": part}, memory=None)).html()
    assert "over the true frames, at most 1, and all views of 1 episode with seeds" in page


def test_more_observed_frames_than_the_shortest_take_has_are_refused():
    check_observed("Push", [make_take(9), make_take(6)], 5)
    sentence = "observed: expected at most 5, one frame less than the shortest episode of Push, got 6"
    with pytest.raises(ValueError, match=sentence):
        check_observed("Push", [make_take(9), make_take(6)], 6)
