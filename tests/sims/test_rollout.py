"""Single episodes and lock-step evaluation agree."""

import gymnasium
import numpy as np
import pytest

from sims.experts import make_expert
from sims.rollout import evaluate, rollout, run_episode


class BatchedExpert:
    """One clean expert applied to every environment; counts its calls."""

    def __init__(self, env):
        self.expert = make_expert(env)
        self.sizes, self.keys = [], []

    def select_actions(self, observations, infos, keys):
        self.sizes.append(len(observations))
        self.keys.append(keys)
        return [self.expert.label(obs, info) for obs, info in zip(observations, infos, strict=True)]


def make():
    return gymnasium.make("enerverse/Lift-v0", cameras=())


def test_lock_step_equals_single_episodes():
    env = make()
    policy = BatchedExpert(env)
    outcomes = evaluate(make, policy, [4, 2, 9])
    assert outcomes == [run_episode(env, make_expert(env), seed) for seed in (4, 2, 9)]
    assert policy.sizes[0] == 3
    assert policy.keys[0] == [4, 2, 9]
    assert all(len(keys) == size for keys, size in zip(policy.keys, policy.sizes, strict=True))
    assert policy.sizes[-1] >= 1
    assert sum(policy.sizes) == sum(outcome.length for outcome in outcomes)


def test_a_policy_that_remembers_forgets_earlier_episodes_first():
    """Seeds repeat from task to task: what is held under a seed belongs to another episode."""

    class Remembering(BatchedExpert):
        def __init__(self, env):
            super().__init__(env)
            self.steps = {}

        def reset(self):
            self.steps = {}

        def select_actions(self, observations, infos, keys):
            for key in keys:
                self.steps[key] = self.steps.get(key, 0) + 1
            return super().select_actions(observations, infos, keys)

    policy = Remembering(make())
    for _ in range(2):
        outcomes = evaluate(make, policy, [4, 2])
        assert policy.steps == {outcome.seed: outcome.length for outcome in outcomes}


def test_rollout_record():
    env = gymnasium.make("enerverse/Lift-v0", image_size=16, cameras=("front",))
    episode = rollout(env, make_expert(env), 0)
    assert episode.success
    assert len(episode.observations) == len(episode.infos) == episode.length + 1
    assert episode.actions.shape == episode.labels.shape == (episode.length, 7)
    assert episode.actions.dtype == np.float32
    env.close()


def test_evaluate_checks_its_arguments():
    with pytest.raises(ValueError, match="seeds: expected distinct seeds, got 1 twice"):
        evaluate(make, BatchedExpert(make()), [1, 1])

    class Short:
        def select_actions(self, observations, infos, keys):
            return []

    with pytest.raises(ValueError, match="select_actions: expected 1 actions, got 0"):
        evaluate(make, Short(), [1])
