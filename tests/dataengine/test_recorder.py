"""Recording in threads: what is written, and what becomes of errors."""

import hashlib
import threading
import time

import gymnasium
import numpy as np
import pytest

import sims  # noqa: F401 - registers the environments
from dataengine.background import Worker
from dataengine.episodes import DatasetWriteError, EpisodeDataset, EpisodeWriter
from dataengine.record import record, writer_arguments
from sims.experts import make_expert


class Seeing:
    """The expert, as if it looked at the pictures."""

    def __init__(self, env):
        self.env, self.needs_pictures, self.saw = env, True, set()

    def reset(self, seed):
        self.expert = make_expert(self.env, 1.0, np.random.default_rng(seed))

    def act(self, obs, info):
        self.saw.add("images" in obs)
        return self.expert.act(obs, info)


class Blind(Seeing):
    def __init__(self, env):
        super().__init__(env)
        self.needs_pictures = False


def make(**options):
    return gymnasium.make(
        "enerverse/Lift-v0",
        cameras=("front", "wrist"),
        modalities=("rgb", "depth", "segmentation", "bodies"),
        image_size=32,
        **options,
    )


def files_of(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


def test_drawing_apart_writes_the_same_bytes(tmp_path):
    env = make(randomize=True)
    for kind in (Seeing, Blind):
        policy = kind(env)
        with EpisodeWriter(tmp_path / kind.__name__, **writer_arguments(env)) as writer:
            record(env, policy, writer, 2)
        assert policy.saw == {policy.needs_pictures}
        assert env.unwrapped.draws
    env.close()
    assert files_of(tmp_path / "Seeing") == files_of(tmp_path / "Blind")
    assert "images" in env.reset(seed=0)[0]


def test_shots_are_pictures_of_their_moment():
    env = make().unwrapped
    obs, _ = env.reset(seed=0)
    shots = env.shoot()
    env.step(np.ones(7, np.float32))
    found = []

    def draw():
        drawer = env.make_drawer()
        found.append(drawer.draw(shots))
        drawer.close()

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    env.close()
    assert found[0].keys() | {"state"} == obs.keys()
    for key, pictures in found[0].items():
        for view, picture in pictures.items():
            np.testing.assert_array_equal(picture, obs[key][view])


@pytest.mark.parametrize("kind", [Seeing, Blind])
def test_an_error_of_the_policy_keeps_finished_episodes(tmp_path, kind):
    env, calls = make(), iter(range(1000))

    class Broken(kind):
        def act(self, obs, info):
            if next(calls) == 60:
                raise RuntimeError("motor fault")
            return super().act(obs, info)

    before = threading.active_count()
    writer = EpisodeWriter(tmp_path / "d", **writer_arguments(env))
    with writer, pytest.raises(RuntimeError, match="motor fault"):
        record(env, Broken(env), writer, 9)
    env.close()
    assert threading.active_count() == before
    assert env.unwrapped.draws
    dataset = EpisodeDataset(tmp_path / "d")
    assert len(dataset) == 1
    dataset.validate()


@pytest.mark.parametrize("kind", [Seeing, Blind])
def test_a_refused_write_in_the_thread_is_raised(tmp_path, kind, monkeypatch):
    env = make()
    with EpisodeWriter(tmp_path / "d", **writer_arguments(env)) as writer:
        add, calls = writer.add_frame, iter(range(1000))

        def refuse(**frame):
            if next(calls) == 70:
                raise DatasetWriteError("the disk is full")
            add(**frame)

        monkeypatch.setattr(writer, "add_frame", refuse)
        with pytest.raises(DatasetWriteError, match="the disk is full"):
            record(env, kind(env), writer, 9)
        assert writer.frames == 0
    env.close()
    assert len(EpisodeDataset(tmp_path / "d")) == 1


def test_worker_keeps_the_order_and_stops_at_a_failure():
    made, worker = [], Worker(2)
    for i in range(5):
        worker.put(lambda i=i: (time.sleep(0.001), made.append(i)))
    worker.put(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for i in range(100):
            worker.put(lambda i=i: made.append(100 + i))
            time.sleep(0.001)
    with pytest.raises(ZeroDivisionError):
        worker.close(last=lambda: made.append("last"))
    assert made == [0, 1, 2, 3, 4, "last"]
