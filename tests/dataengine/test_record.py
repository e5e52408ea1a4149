"""Recording: environments with images and state, with cameras, and plain ones that only render."""

import gymnasium
import numpy as np
import pytest

import sims  # noqa: F401 - registers the environments
from dataengine.episodes import DatasetError, EpisodeDataset, EpisodeWriter
from dataengine.record import record, writer_arguments

VIEWS = ("front", "top")


class ReachEnv(gymnasium.Env):
    """A point on a line that must reach +1; solved from even seeds only. Dict observations."""

    metadata = {"render_modes": [], "render_fps": 10}  # noqa: RUF012

    def __init__(self):
        image = gymnasium.spaces.Box(0, 255, (16, 24, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "images": gymnasium.spaces.Dict(dict.fromkeys(VIEWS, image)),
                "state": gymnasium.spaces.Box(-9, 9, (2,)),
            }
        )
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,))
        self._state = np.zeros(2, np.float32)  # one buffer, overwritten by every step
        self.resets = []

    def _result(self):
        images = {v: np.full((16, 24, 3), int(100 + 50 * self._state[0]), np.uint8) for v in VIEWS}
        camera = {"intrinsics": np.diag([20.0, 20.0, 1.0]), "camera_to_world": np.eye(4)}
        info = {
            "task": f"reach from {self.seed}",
            "is_success": bool(self._state[0] >= 1 and self.seed % 2 == 0),
            "cameras": {**dict.fromkeys(VIEWS, camera), "wrist": camera},
            "privileged": np.arange(3) * self._state[0],
        }
        return {"images": images, "state": self._state}, info

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed = seed
        self.resets.append(seed)
        self._state[:] = (0, seed)
        return self._result()

    def step(self, action):
        self._state[0] += action[0]
        return *self._result()[:1], 0.0, bool(self._state[0] >= 1), False, self._result()[1]


class Pusher:
    """Executes a noisy action and labels it with the clean one."""

    def reset(self, seed):
        self.random = np.random.default_rng(seed)

    def act(self, obs, info):
        clean = np.array([0.3])
        return clean + self.random.uniform(0, 0.1, 1), clean


def open_for(env, root):
    return EpisodeWriter(root, **writer_arguments(env))


def test_record_dict_environment(tmp_path):
    env = ReachEnv()
    with open_for(env, tmp_path / "d") as writer:
        report = record(env, Pusher(), writer, 3, seed=10)
    assert (report.kept, report.tried) == (3, 5)
    dataset = EpisodeDataset(tmp_path / "d")
    assert [dataset.meta(i).seed for i in range(3)] == [10, 12, 14]
    assert dataset.success == (True, True, True)
    assert report.frames == sum(dataset.lengths)
    dataset.validate()
    episode = dataset[1]
    assert episode.task == "reach from 12"
    assert episode.cameras.names == VIEWS
    np.testing.assert_allclose(episode.extra["privileged"][:, 2], 2 * episode.state[:, 0], rtol=1e-6)
    np.testing.assert_allclose(episode.extra["action.clean"], 0.3)


def test_row_holds_observation_and_the_action_taken_there(tmp_path):
    env = ReachEnv()
    with open_for(env, tmp_path / "d") as writer:
        record(env, Pusher(), writer, 1)
    episode = EpisodeDataset(tmp_path / "d")[0]
    steps = np.diff(episode.state[:, 0])
    np.testing.assert_allclose(episode.action[:-1, 0], steps, rtol=1e-5)
    assert episode.state[-1, 0] >= 1 > episode.state[-2, 0]
    assert episode.action[-1] == episode.action[-2]  # never executed: the last action again


def test_recording_resumes_after_the_seeds_that_are_done(tmp_path):
    env = ReachEnv()
    with open_for(env, tmp_path / "d") as writer:
        record(env, Pusher(), writer, 2, seed=10)
    with open_for(env, tmp_path / "d") as writer:
        env.resets.clear()
        report = record(env, Pusher(), writer, 4, seed=10)
        assert env.resets == [13, 14, 15, 16]
        assert (report.kept, report.tried) == (2, 4)
        assert record(env, Pusher(), writer, 4, seed=10).tried == 0
    with open_for(env, tmp_path / "whole") as writer:
        record(env, Pusher(), writer, 4, seed=10)
    resumed, whole = EpisodeDataset(tmp_path / "d"), EpisodeDataset(tmp_path / "whole")
    assert len(resumed) == len(whole) == 4
    for i in range(4):
        np.testing.assert_array_equal(resumed[i].state, whole[i].state)


def test_keep_all_stores_failures(tmp_path):
    env = ReachEnv()
    with open_for(env, tmp_path / "d") as writer:
        report = record(env, Pusher(), writer, 4, keep="all")
    assert (report.kept, report.tried) == (4, 4)
    assert EpisodeDataset(tmp_path / "d").success == (True, False, True, False)


def test_policy_as_function_and_step_limit(tmp_path):
    env = ReachEnv()
    with open_for(env, tmp_path / "d") as writer:
        record(env, lambda obs, info: np.zeros(1), writer, 1, keep="all", max_steps=4)
    assert EpisodeDataset(tmp_path / "d").lengths == (5,)


def test_too_few_successes(tmp_path):
    env = ReachEnv()
    sentence = r"record: expected 2 episodes from seeds 0 to 3, got 0; they are kept .* more max_tries"
    with open_for(env, tmp_path / "d") as writer, pytest.raises(DatasetError, match=sentence):
        record(env, lambda obs, info: np.ones(1) * (env.seed % 2), writer, 2, max_tries=4, max_steps=2)


def test_error_in_the_policy_keeps_finished_episodes(tmp_path):
    env, calls = ReachEnv(), iter(range(100))

    def policy(obs, info):
        if next(calls) == 5:
            raise RuntimeError("motor fault")
        return np.array([0.5])

    with open_for(env, tmp_path / "d") as writer, pytest.raises(RuntimeError, match="motor fault"):
        record(env, policy, writer, 9)
    assert EpisodeDataset(tmp_path / "d").lengths == (3,)


class PlainEnv(gymnasium.Env):
    """Box observations, discrete actions, no success: only render() gives a picture."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-9, 9, (3,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, render_mode="rgb_array"):
        self.render_mode, self.t = render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(3, self.t, np.float32), 0.0, False, False, {}

    def render(self):
        return np.full((12, 10, 3), 20 * self.t, np.uint8) if self.render_mode == "rgb_array" else None


def test_record_plain_environment_with_wrapper(tmp_path):
    """Gymnasium's own TimeLimit ends it; the picture is the view "render" and the action a number."""
    env = gymnasium.wrappers.TimeLimit(PlainEnv(), 4)
    with open_for(env, tmp_path / "d") as writer:
        record(env, lambda obs, info: 1, writer, 2, keep="all")
    dataset = EpisodeDataset(tmp_path / "d")
    assert dataset.views == ("render",)
    assert dataset.fps == 20
    episode = dataset[0]
    assert (episode.task, episode.success, episode.cameras) == ("PlainEnv", None, None)
    np.testing.assert_array_equal(episode.action, np.ones((5, 1)))
    np.testing.assert_allclose(episode.images["render"][:, 0, 0, 0], 20 * np.arange(5), atol=2)


def test_record_stock_environment(tmp_path):
    """CartPole as Gymnasium ships it, when its renderer is installed."""
    pytest.importorskip("pygame")
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array", max_episode_steps=5)
    with open_for(env, tmp_path / "d") as writer:
        record(env, lambda obs, info: 0, writer, 1, keep="all")
    episode = EpisodeDataset(tmp_path / "d")[0]
    assert episode.task == "CartPole-v1"
    assert episode.images["render"].shape[1:] == (400, 600, 3)


def test_record_stock_environment_drawn_by_a_wrapper(tmp_path):
    """Pendulum as Gymnasium ships it; its picture is drawn here, because its own renderer is an extra."""

    class Drawn(gymnasium.Wrapper):
        render_mode = "rgb_array"

        def render(self):
            image = np.zeros((32, 32, 3), np.uint8)
            angle = self.env.unwrapped.state[0]
            image[int(16 - 12 * np.cos(angle)), int(16 + 12 * np.sin(angle))] = 255
            return image

    env = Drawn(gymnasium.make("Pendulum-v1", max_episode_steps=6))
    with open_for(env, tmp_path / "d") as writer:
        record(env, lambda obs, info: env.action_space.sample(), writer, 2, keep="all")
    dataset = EpisodeDataset(tmp_path / "d")
    assert dataset.lengths == (7, 7)
    assert dataset.tasks == ("Pendulum-v1",)
    dataset.validate()


@pytest.mark.parametrize(
    ("env", "arguments", "sentence"),
    [
        (PlainEnv(), {}, r"env: expected info\['is_success'\] .* pass keep='all'"),
        (
            PlainEnv(None),
            {"keep": "all"},
            "env: expected an image from render.., got NoneType; make the environment with "
            "render_mode='rgb_array'",
        ),
        (PlainEnv(), {"keep": "some"}, "keep: expected 'success' or 'all', got 'some'"),
        (PlainEnv(), {"episodes": 0}, "episodes: expected at least 1, got 0"),
        (
            PlainEnv(),
            {"policy": lambda obs, info: (0, 1, 2)},
            "policy: expected an action or .executed, clean., got a tuple of 3",
        ),
    ],
)
def test_bad_arguments(tmp_path, env, arguments, sentence):
    defaults = {"policy": lambda obs, info: 0, "episodes": 1, "max_steps": 2}
    with open_for(PlainEnv(), tmp_path / "d") as writer, pytest.raises(ValueError, match=sentence):
        record(env, writer=writer, **(defaults | arguments))


def test_depth_of_a_camera_on_the_wrist(tmp_path):
    """The fingers stand less than five centimetres before it."""
    env = gymnasium.make(
        "enerverse/Lift-v0", cameras=("front", "wrist"), modalities=("rgb", "depth"), image_size=32
    )
    with EpisodeWriter(tmp_path / "wrist", **writer_arguments(env)) as writer:
        record(env, lambda obs, info: np.zeros(7, np.float32), writer, 1, keep="all", max_steps=2)
    observation, _ = env.reset(seed=0)
    env.close()
    episode = EpisodeDataset(writer.root)[0]
    assert 0.02 < episode.depth["wrist"].min() < 0.05
    for view in ("front", "wrist"):
        near_enough = np.minimum(observation["depth"][view], 10)
        np.testing.assert_allclose(episode.depth[view][0], near_enough, rtol=8e-4)


def test_observation_without_images(tmp_path):
    env = gymnasium.wrappers.TransformObservation(ReachEnv(), lambda obs: {"state": obs["state"]}, None)
    with pytest.raises(
        ValueError, match=r"env: expected observations with 'images' and 'state', got the keys \['state'\]"
    ):
        writer_arguments(env)
