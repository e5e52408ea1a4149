"""What each task shows and decides."""

import gymnasium
import numpy as np
import pytest

import sims
from sims.experts import make_expert
from sims.rollout import rollout
from sims.tasks.base import wrap_quarter


def lamp(env, name):
    return env.unwrapped.sim.model.geom(name).rgba[:3].copy()


@pytest.mark.parametrize("markov", [False, True])
def test_cue_is_shown_for_eight_frames(markov):
    env = gymnasium.make("enerverse/CueDelayReach-v0", cameras=(), delay=4, markov=markov)
    _, info = env.reset(seed=3)
    cue = np.argmax(info["privileged"][8:11])
    shown, timer, go = [], [], []
    for _ in range(14):
        shown.append(bool(np.argmax(lamp(env, "cue_lamp")) == cue and lamp(env, "cue_lamp").max() > 0.5))
        timer.append(lamp(env, "timer_lamp")[0])
        go.append(float(info["privileged"][11]))
        _, _, _, _, info = env.step(np.zeros(7, np.float32))
    assert shown == ([True] * 14 if markov else [True] * 8 + [False] * 6)
    np.testing.assert_allclose(timer, np.minimum(1.0, np.arange(14) / 12), atol=1e-6)
    assert go == [0.0] * 12 + [1.0] * 2
    assert info["task"] == f"reach the cube that {'is' if markov else 'was'} shown"


def test_hidden_cue_leaves_no_trace_in_pictures():
    """After the cue the pictures of two episodes that differ in the cue alone are the same."""
    env = gymnasium.make("enerverse/CueDelayReach-v0", delay=4)
    pictures = []
    for cue in range(3):
        env.reset(seed=1)
        env.unwrapped.task.cue = cue
        for _ in range(10):
            obs, *_ = env.step(np.zeros(7, np.float32))
        pictures.append(obs["images"])
    env.close()
    for name, picture in pictures[0].items():
        for other in pictures[1:]:
            np.testing.assert_array_equal(picture, other[name])


def reach(env, info, target):
    """Walk the TCP to ``target`` until the episode ends."""
    obs = {"state": info["state"]}
    for _ in range(40):
        step = (target - obs["state"][:3] - obs["state"][8:11]) / 0.016
        action = np.zeros(7, np.float32)
        action[:3] = np.clip(step, -1, 1)
        obs, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            return terminated, info
    return False, info


def test_wrong_or_early_cube_fails():
    for which, delay in (("wrong", 0), ("right", 0), ("early", 30)):
        env = gymnasium.make("enerverse/CueDelayReach-v0", cameras=(), delay=delay)
        obs, info = env.reset(seed=2)
        task, sim = env.unwrapped.task, env.unwrapped.sim
        for _ in range(0 if which == "early" else 8):
            obs, _, _, _, info = env.step(np.zeros(7, np.float32))
        wrong = next(name for name in task.objects[:3] if name != task.cued_cube)
        cube = sim.position(wrong if which == "wrong" else task.cued_cube)
        terminated, info = reach(env, {"state": obs["state"]}, cube + np.array([0, 0, 0.04]))
        assert terminated
        assert info["is_success"] == (which == "right")


def test_colours_cover_all_choices():
    env = gymnasium.make("enerverse/PickPlace-v0", cameras=())
    instructions = {env.reset(seed=seed)[1]["task"] for seed in range(30)}
    assert instructions == {f"put the cube in the {colour} bin" for colour in ("red", "green", "blue")}


def test_wrong_bin_is_no_success():
    env = gymnasium.make("enerverse/PickPlace-v0", cameras=())
    env.reset(seed=0)
    base = env.unwrapped
    other = "bin_left" if base.task.target == "bin_right" else "bin_right"
    for name, expected in ((other, False), (base.task.target, True)):
        base.sim.place("cube", (*base.sim.position(name)[:2], 0.03))
        base.sim.refresh()
        assert base.task.succeeded(base.sim) is expected


def test_privileged_layout():
    for index, task in enumerate(sims.TASKS):
        env = gymnasium.make(f"enerverse/{task}-v0", cameras=())
        _, info = env.reset(seed=0)
        vector = info["privileged"]
        assert vector.shape == (24,)
        assert vector.dtype == np.float32
        assert vector[19:].tolist() == np.eye(5)[index].tolist()
        _, _, _, _, info = env.step(np.zeros(7, np.float32))
        assert info["privileged"][18] == pytest.approx(1 / env.unwrapped.max_steps)


def test_truncates_at_max_steps():
    env = gymnasium.make("enerverse/Lift-v0", cameras=())
    env.reset(seed=0)
    flags = [env.step(np.zeros(7, np.float32))[2:4] for _ in range(env.unwrapped.max_steps)]
    assert flags[-1] == (False, True)
    assert not any(terminated or truncated for terminated, truncated in flags[:-1])


def test_action_stays_in_view():
    """The fingertips' midpoint is inside every default picture throughout the experts' episodes."""
    from sims.cameras import project

    for task in sims.TASKS:
        env = gymnasium.make(f"enerverse/{task}-v0", image_size=64, modalities=("segmentation",))
        for seed in range(2):
            episode = rollout(env, make_expert(env, 1.0, np.random.default_rng(seed)), seed)
            for obs, info in zip(episode.observations, episode.infos, strict=True):
                for camera in info["cameras"].values():
                    pixel, _ = project(
                        obs["state"][None, :3], camera["intrinsics"], camera["camera_to_world"]
                    )
                    assert np.all(pixel > 3)
                    assert np.all(pixel < 61)
        env.close()


def test_wrap_quarter():
    yaws = np.linspace(-4, 4, 101)
    wrapped = np.array([wrap_quarter(yaw) for yaw in yaws])
    assert np.all(np.abs(wrapped) <= np.pi / 4 + 1e-12)
    np.testing.assert_allclose(np.sin(4 * wrapped), np.sin(4 * yaws), atol=1e-9)
