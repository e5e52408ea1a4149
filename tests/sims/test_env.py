"""The Gymnasium contract, determinism, sharing of the renderer and kind errors."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import sims
from sims import rendering
from sims.rendering import SharedRenderer

IDS = (*(f"enerverse/{task}-v0" for task in sims.TASKS), "enerverse/CueDelayReachMarkov-v0")


def play(env, seed, steps=4):
    """States and pictures of a short episode under seeded random actions."""
    rng = np.random.default_rng(0)
    obs, info = env.reset(seed=seed)
    frames = [(obs, info)]
    for _ in range(steps):
        obs, _, _, _, info = env.step(rng.uniform(-1, 1, 7).astype(np.float32))
        frames.append((obs, info))
    return frames


def assert_same(first, second):
    for (obs_a, info_a), (obs_b, info_b) in zip(first, second, strict=True):
        np.testing.assert_array_equal(obs_a["state"], obs_b["state"])
        np.testing.assert_array_equal(info_a["privileged"], info_b["privileged"])
        assert info_a["task"] == info_b["task"]
        for name, picture in obs_a["images"].items():
            np.testing.assert_array_equal(picture, obs_b["images"][name])


@pytest.mark.parametrize("name", IDS)
@pytest.mark.filterwarnings("ignore")
def test_check_env(name):
    env = gymnasium.make(name, image_size=32, cameras=("front", "wrist"), modalities=sims.MODALITIES)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("randomize", [False, True])
@pytest.mark.parametrize("task", sims.TASKS)
def test_seed_fixes_episode(task, randomize):
    env = gymnasium.make(f"enerverse/{task}-v0", image_size=32, randomize=randomize)
    first = play(env, 7)
    play(env, 8)
    assert_same(first, play(env, 7))
    other = gymnasium.make(f"enerverse/{task}-v0", image_size=32, randomize=randomize)
    assert_same(first, play(other, 7))
    env.close()
    other.close()


def test_picture_does_not_depend_on_other_users_of_the_renderer():
    small = gymnasium.make("enerverse/Lift-v0", image_size=32)
    alone = play(small, 3)
    large = gymnasium.make("enerverse/Push-v0", image_size=96, randomize=True)
    large.reset(seed=0)
    assert_same(alone, play(small, 3))
    small.close()
    large.close()


def test_fixed_look_and_randomised_look():
    def table_pixels(randomize, seed):
        env = gymnasium.make("enerverse/Lift-v0", randomize=randomize, modalities=("rgb", "segmentation"))
        obs, _ = env.reset(seed=seed)
        env.close()
        return obs["images"]["front"][20], obs["segmentation"]["front"]

    first, _ = table_pixels(False, 1)
    again, _ = table_pixels(False, 2)
    shifted, _ = table_pixels(True, 1)
    assert np.array_equal(first[:5], again[:5])
    assert not np.array_equal(first[:5], shifted[:5])


def test_randomization_switches():
    options = sims.Randomization(colours=False, lights=False, cameras=True, spread=1.0)
    env = gymnasium.make("enerverse/Lift-v0", randomize=options)
    plain = gymnasium.make("enerverse/Lift-v0")
    (_, moved), (_, still) = env.reset(seed=4), plain.reset(seed=4)
    pose = "camera_to_world"
    assert not np.allclose(moved["cameras"]["top"][pose], still["cameras"]["top"][pose])
    np.testing.assert_array_equal(moved["privileged"], still["privileged"])
    with pytest.raises(ValueError, match=r"spread: expected a factor in \(0, 1.5\], got 3"):
        sims.Randomization(spread=3.0)


@pytest.fixture
def fresh_renderer(monkeypatch):
    """A renderer of its own, so that users from other tests do not count."""
    renderer = SharedRenderer()
    monkeypatch.setattr(rendering, "_shared", renderer)
    yield renderer
    renderer.free()


def test_state_only_env_renders_nothing(fresh_renderer):
    env = gymnasium.make("enerverse/Lift-v0", cameras=())
    obs, info = env.reset(seed=0)
    assert list(obs) == ["state"]
    assert info["cameras"] == {}
    env.step(np.zeros(7, np.float32))
    assert not fresh_renderer.is_open
    env.close()


def test_close_frees_the_context_with_the_last_user(fresh_renderer):
    envs = [gymnasium.make(f"enerverse/{task}-v0", image_size=16) for task in ("Lift", "OpenDrawer")]
    for env in envs:
        env.reset(seed=0)
    assert fresh_renderer.users == 2
    envs[0].close()
    envs[0].close()
    assert fresh_renderer.is_open
    envs[1].close()
    assert not fresh_renderer.is_open
    assert fresh_renderer.users == 0
    envs[1].unwrapped.render_camera("top")  # a closed environment may still be asked for a picture
    envs[1].close()


def test_render_modes():
    env = gymnasium.make("enerverse/Push-v0", image_size=24, cameras=("top",), render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), obs["images"]["top"])
    assert env.unwrapped.render_camera("wrist", "depth", size=40).shape == (40, 40)
    env.close()


def test_action_semantics():
    env = gymnasium.make("enerverse/Lift-v0", cameras=())
    before, _ = env.reset(seed=0)
    for _ in range(5):
        after, _, _, _, info = env.step(np.array([0.5, -0.5, 0.25, 0, 0, 0.4, -1], np.float32))
    for _ in range(4):
        after, _, _, _, info = env.step(np.zeros(7, np.float32))
    moved = after["state"][:3] - before["state"][:3]
    np.testing.assert_allclose(moved, 5 * np.array([0.5, -0.5, 0.25]) * 0.016, atol=1.5e-3)
    assert after["state"][7] < 0.002  # closed, and kept closed by a zero
    assert info["privileged"][16] == -1.0
    np.testing.assert_allclose(env.unwrapped.action_scale, [0.016] * 3 + [0.15] * 3 + [1.0], rtol=1e-6)


def test_control_rate_keeps_speed():
    env = gymnasium.make("enerverse/Lift-v0", cameras=(), control_hz=20)
    np.testing.assert_allclose(env.unwrapped.action_scale[:3], 0.008, rtol=1e-6)


@pytest.mark.parametrize("vector", [gymnasium.vector.SyncVectorEnv, gymnasium.vector.AsyncVectorEnv])
def test_vector_envs(vector):
    single = gymnasium.make("enerverse/Lift-v0", image_size=16)
    expected, _ = single.reset(seed=5)  # a GL context in the parent must not hurt forked workers
    envs = vector([lambda: gymnasium.make("enerverse/Lift-v0", image_size=16)] * 2)
    obs, info = envs.reset(seed=[5, 6])
    assert obs["images"]["front"].shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(obs["images"]["top"][0], expected["images"]["top"])
    assert info["privileged"].shape == (2, 24)
    obs, reward, *_ = envs.step(np.zeros((2, 7), np.float32))
    assert reward.shape == (2,)
    envs.close()
    single.close()


def test_unknown_names_name_the_closest():
    with pytest.raises(gymnasium.error.NameNotFound, match="Lift"):
        gymnasium.make("enerverse/Lifft-v0")
    with pytest.raises(ValueError, match=r"task: expected one of .*, got 'Lifft'; did you mean 'Lift'\?"):
        sims.TabletopEnv("Lifft")
    with pytest.raises(ValueError, match=r"camera: expected one of .*, got 'frnt'; did you mean 'front'"):
        gymnasium.make("enerverse/Lift-v0", cameras=("frnt",))
    with pytest.raises(
        ValueError, match="modality: expected one of rgb, depth, segmentation, bodies, got 'deph'"
    ):
        gymnasium.make("enerverse/Lift-v0", modalities=("deph",))
    with pytest.raises(
        ValueError, match="option of CueDelayReach: expected one of delay, markov, got 'dely'"
    ):
        gymnasium.make("enerverse/CueDelayReach-v0", dely=3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"image_size": 0}, "image_size: expected a whole number of pixels > 0, got 0"),
        ({"image_size": -3}, "image_size: expected a whole number of pixels > 0, got -3"),
        ({"cameras": "front"}, r"cameras: expected a sequence of names, got 'front'; write \('front',\)"),
        ({"control_hz": 0}, r"control_hz: expected a rate in \(0, 500\] Hz, got 0"),
        ({"randomize": 3}, "randomize: expected True, False or a Randomization, got 3"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        gymnasium.make("enerverse/Lift-v0", **options)


def test_bad_delay():
    with pytest.raises(ValueError, match="delay: expected a whole number of control steps >= 0, got -1"):
        gymnasium.make("enerverse/CueDelayReach-v0", delay=-1)


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (np.full(7, np.nan), "action: expected finite numbers"),
        (np.full(7, 1.5), r"action: expected values in \[-1, 1\]"),
        (np.zeros(6), r"action: expected shape \(7,\), got \(6,\)"),
    ],
)
def test_bad_actions(action, sentence):
    env = sims.TabletopEnv("Lift", cameras=())
    with pytest.raises(ValueError, match=r"call reset\(\) first"):
        env.step(np.zeros(7))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=sentence):
        env.step(action)
