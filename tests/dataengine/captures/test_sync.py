"""Offsets between cameras: exact on shifted streams, fractions of a frame, doubt where nothing moves."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch

import sims  # noqa: F401 - registers the environments
from dataengine.captures import Offsets, align, estimate_offsets
from dataengine.captures.sync import correlate
from dataengine.episodes import EpisodeDataset, EpisodeWriter
from dataengine.record import record, writer_arguments
from dataengine.views import Views
from sims.experts import make_expert


def delayed(views, late):
    """The same recording with streams that lag by whole frames."""
    late = np.array(late)
    starts, count = late.max() - late, len(views) - int(np.ptp(late))
    parts = [
        views.select([n]).at(slice(s, s + count)) for n, s in zip(views.names, starts.tolist(), strict=True)
    ]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.join(part)
    return joined


@pytest.mark.parametrize("late", [(0.0, 0.0, 0.0), (0.0, 2.0, -3.0), (0.0, 0.4, 1.3), (0.0, -1.5, 0.25)])
def test_offsets_of_a_rolling_ball(make_scene, late):
    names = ("front", "left", "top")
    found = estimate_offsets(make_scene(40, names, late=dict(zip(names, late, strict=True))))
    assert np.abs(found.frames - late).max() < 0.3
    assert found.confidence.min() > 0.5
    assert found.frames[0] == 0


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two episodes of three fixed cameras at 10 frames per second."""
    root = tmp_path_factory.mktemp("sync") / "lift"
    env = gymnasium.make("enerverse/Lift-v0", cameras=("front", "left", "top"), image_size=64)
    with EpisodeWriter(root, **writer_arguments(env)) as writer:
        record(env, make_expert(env), writer, 2, seed=3, keep="all")
    env.close()
    return [Views.from_episode(episode) for episode in EpisodeDataset(root)]


@pytest.mark.parametrize("late", [(0, 0, 0), (0, 3, -2), (0, -4, 1), (0, 1, 4)])
def test_offsets_of_recorded_episodes(recorded, late):
    for views in recorded:
        found = estimate_offsets(delayed(views, late))
        assert np.abs(found.frames - late).max() <= 0.5, (late, str(found))
        assert found.confidence.min() > 0.2


def test_aligned_views_show_the_same_moments(recorded):
    views = recorded[0]
    late = delayed(views, (0, 3, -2))
    again = align(late, estimate_offsets(late))
    assert len(again) == len(views) - 10
    assert torch.equal(again.images, views.images[5 : 5 + len(again)])
    assert again.names == views.names


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
def test_no_confidence_where_nothing_moves(make_scene, noise):
    views = make_scene(30, path=lambda t: np.array([0.1, 0.0, 0.18]))
    torch.manual_seed(0)
    shaken = (views.images + noise / 255 * torch.randn_like(views.images)).clamp(0, 1)
    found = estimate_offsets(replace(views, images=shaken))
    assert found.confidence.max() < 0.2
    with pytest.raises(
        ValueError,
        match=r"offsets: expected a confidence of at least 0\.2, got 0\.\d\d for 'front'.*leave those",
    ):
        align(views, found)


def test_signals_of_any_length():
    """A joint's speed against a camera's motion, say; the second signal starts 4.5 frames later in the same movement."""
    time = np.arange(200)
    parts = ((1, 40, 5), (2, 90, 3), (1.5, 130, 8), (1, 160, 4))
    bumps = np.sum([a * np.exp(-(((time - c) / w) ** 2)) for a, c, w in parts], 0)
    fine = np.interp(np.arange(120) + 4.5, time, bumps)
    found = estimate_offsets({"joint": bumps[:150], "camera": 3 * fine + 1}, max_offset=20)
    assert found.frames[1] == pytest.approx(-4.5, abs=0.2)
    assert found.confidence[1] > 0.2
    assert str(found).startswith("joint +0.00 frames")


def test_a_camera_that_moves_takes_part(make_scene):
    names = ("front", "left", "top")
    found = estimate_offsets(make_scene(30, names, late={"left": 2.0}, moving=True))
    assert abs(found.frames[1] - 2) < 0.3  # the fixed pair is not disturbed
    assert found.confidence[1] > 0.5


def test_correlation_is_one_at_the_true_lag():
    random = np.random.default_rng(0)
    signal = random.normal(size=(2, 60))
    curve = correlate(signal[:, 5:], signal[:, :55], 8)
    assert curve.argmax() - 8 == 5
    assert curve.max() == pytest.approx(np.sqrt(50 / 55))


def test_bad_input(make_scene):
    views = make_scene(8, ("front", "left"))
    with pytest.raises(
        ValueError, match="streams: expected at least 2 of at least 8 frames, got 2 of 5; record longer ones"
    ):
        estimate_offsets(views.at(slice(0, 5)))
    with pytest.raises(ValueError, match="streams: expected at least 2 of at least 8 frames, got 1 of 8"):
        estimate_offsets(views.select(["left"]))
    with pytest.raises(
        ValueError, match="max_offset: expected 1 to 4 frames, got 7; leave room for an overlap"
    ):
        estimate_offsets(views, max_offset=7)
    with pytest.raises(
        ValueError, match=r"streams\['b'\]: expected \[T\] finite numbers, got NaN or infinity"
    ):
        estimate_offsets({"a": np.ones(9), "b": np.full(9, np.nan)})
    sure = Offsets(names=("front", "left"), frames=np.array([0.0, 8.0]), confidence=np.ones(2))
    with pytest.raises(ValueError, match="offsets: expected a common window, got none of 8 frames for front"):
        align(views, sure)
    with pytest.raises(
        ValueError, match=r"offsets: expected those of \['left'\], got \['front', 'left'\]; estimate them on"
    ):
        align(views.select(["left"]), sure)
