"""The experts solve their tasks, and what they promise about labels and noise holds."""

import gymnasium
import numpy as np
import pytest

import sims
from sims.experts import make_expert, measure
from sims.rollout import rollout


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("task", [*sims.TASKS, "CueDelayReachMarkov"])
def test_success(task, noise):
    rate, lengths = measure(task, range(100, 110), noise)
    assert rate >= (1.0 if noise == 0.0 else 0.9)
    assert lengths.min() >= 20


def test_success_under_randomisation():
    for task in ("Lift", "Push", "PickPlace"):
        env = gymnasium.make(f"enerverse/{task}-v0", cameras=(), randomize=True)
        assert all(rollout(env, make_expert(env), seed).success for seed in range(4))


def test_labels_are_the_expert_in_the_visited_state():
    env = gymnasium.make("enerverse/Lift-v0", cameras=())
    noisy = rollout(env, make_expert(env, 1.0, np.random.default_rng(3)), 1)
    clean = make_expert(env)
    again = [clean.label(obs, info) for obs, info in zip(noisy.observations, noisy.infos, strict=True)]
    np.testing.assert_array_equal(noisy.labels, again[:-1])
    difference = (noisy.actions - noisy.labels)[:, :3]
    assert 0.05 < difference.std() < 0.3
    np.testing.assert_array_equal(noisy.actions[:, 3:], noisy.labels[:, 3:])


def test_without_noise_action_is_label():
    env = gymnasium.make("enerverse/Push-v0", cameras=())
    episode = rollout(env, make_expert(env), 0)
    np.testing.assert_array_equal(episode.actions, episode.labels)
    assert np.abs(episode.actions).max() <= 1.0


def test_episode_ends_with_done_frames():
    env = gymnasium.make("enerverse/OpenDrawer-v0", cameras=())
    episode = rollout(env, make_expert(env), 0)
    assert episode.rewards[-4:].tolist() == [1.0] * 4
    assert episode.rewards.sum() == 4.0


def test_negative_noise_is_refused():
    env = gymnasium.make("enerverse/Lift-v0", cameras=())
    with pytest.raises(ValueError, match="noise: expected a factor >= 0, got -1"):
        make_expert(env, -1.0)
