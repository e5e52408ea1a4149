"""Run policies: one episode, or many environments in lock-step with one batched policy call."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np

from sims.errors import expect


class EpisodePolicy(Protocol):
    """Acts in one environment; returns the executed action and its clean label, as the experts do."""

    def act(self, obs: dict, info: dict) -> tuple[np.ndarray, np.ndarray]: ...


class BatchPolicy(Protocol):
    """Acts in many environments at once: lists of N observations, infos and keys -> actions [N, 7].

    A key tells the episodes apart for a policy that remembers; here it is the episode's seed.
    """

    def select_actions(
        self, observations: list[dict], infos: list[dict], keys: list[int]
    ) -> Sequence[np.ndarray]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one episode ended; ``length`` counts control steps."""

    seed: int
    success: bool
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """One recorded episode: T + 1 observations and infos around T actions, clean labels and rewards."""

    observations: list[dict[str, Any]]
    infos: list[dict[str, Any]]
    actions: np.ndarray  # [T, 7] float32, executed
    labels: np.ndarray  # [T, 7] float32, clean
    rewards: np.ndarray  # [T] float32
    success: bool

    @property
    def length(self) -> int:
        """Control steps."""
        return len(self.actions)


def run_episode(env: gymnasium.Env, policy: EpisodePolicy, seed: int) -> Outcome:
    """Play one episode and keep only how it ended."""
    obs, info = env.reset(seed=seed)
    length, finished = 0, False
    while not finished:
        obs, _, terminated, truncated, info = env.step(policy.act(obs, info)[0])
        length += 1
        finished = terminated or truncated
    return Outcome(seed=seed, success=bool(info["is_success"]), length=length)


def rollout(env: gymnasium.Env, policy: EpisodePolicy, seed: int) -> Rollout:
    """Play and record one episode."""
    obs, info = env.reset(seed=seed)
    observations, infos, actions, labels, rewards = [obs], [info], [], [], []
    finished = False
    while not finished:
        action, label = policy.act(obs, info)
        obs, reward, terminated, truncated, info = env.step(action)
        observations.append(obs)
        infos.append(info)
        actions.append(action)
        labels.append(label)
        rewards.append(reward)
        finished = terminated or truncated
    return Rollout(
        observations=observations,
        infos=infos,
        actions=np.asarray(actions, np.float32),
        labels=np.asarray(labels, np.float32),
        rewards=np.asarray(rewards, np.float32),
        success=bool(info["is_success"]),
    )


def evaluate(
    make_env: Callable[[], gymnasium.Env], policy: BatchPolicy, seeds: Iterable[int]
) -> list[Outcome]:
    """Play all seeds in lock-step, one environment each; finished ones are closed and dropped from the
    batch. A policy that has a ``reset`` forgets earlier episodes first: seeds repeat from task to task.
    """
    if callable(reset := getattr(policy, "reset", None)):
        reset()
    running: dict[int, tuple[gymnasium.Env, dict, dict]] = {}
    for seed in seeds:
        expect(seed not in running, "seeds", "distinct seeds", f"{seed} twice")
        env = make_env()
        running[seed] = (env, *env.reset(seed=seed))
    order, outcomes, length = list(running), {}, 0
    try:
        while running:
            length += 1
            names = list(running)
            observations, infos = [running[s][1] for s in names], [running[s][2] for s in names]
            actions = policy.select_actions(observations, infos, names)
            expect(len(actions) == len(names), "select_actions", f"{len(names)} actions", len(actions))
            for seed, action in zip(names, actions, strict=True):
                env = running[seed][0]
                obs, _, terminated, truncated, info = env.step(action)
                running[seed] = (env, obs, info)
                if terminated or truncated:
                    outcomes[seed] = Outcome(seed=seed, success=bool(info["is_success"]), length=length)
                    running.pop(seed)[0].close()
    finally:
        for env, *_ in running.values():
            env.close()
    return [outcomes[seed] for seed in order]
