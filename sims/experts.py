"""Scripted experts: state feedback with smooth proportional steps, and action noise that keeps the clean
label.

``python -m sims.experts --seeds 50`` prints success and length of every task, without and with action
noise.
"""

import argparse
from typing import cast

import gymnasium
import numpy as np

from sims.env import TabletopEnv
from sims.errors import expect
from sims.moves import MOVES, Move, View
from sims.rollout import run_episode

GAIN = 0.6  # share of the remaining distance commanded per step
YAW_GAIN = 0.3  # lower: the state holds the measured yaw, which lags the commanded one
NOISE_STD = 0.25  # action units at noise=1
NOISE_CORRELATION = 0.6  # of the AR(1) process
WANDER_STD = 0.22  # action units, of the executed motion while waiting for a signal
WANDER_CORRELATION = 0.9


class Wander:
    """Small smooth random motion, executed but not part of the clean label."""

    def __init__(self, rng: np.random.Generator, correlation: float, std: float) -> None:
        self._rng, self._correlation, self._std = rng, correlation, std
        self._value = np.zeros(3)

    def step(self) -> np.ndarray:
        """Next value [3] of a stationary AR(1) process, action units."""
        fresh = self._rng.normal(0.0, self._std, 3) * np.sqrt(1.0 - self._correlation**2)
        self._value = self._correlation * self._value + fresh
        return self._value


class Expert:
    """One expert for one environment. ``act`` returns the executed (noisy) action and the clean label, [7]
    each.

    The label is what the expert would do in the visited state (DART, Laskey et al. 2017, arXiv 1703.09327).
    """

    needs_pictures = False  # the state and the privileged facts decide

    def __init__(self, env: gymnasium.Env, noise: float, rng: np.random.Generator) -> None:
        expect(noise >= 0.0, "noise", "a factor >= 0", noise)
        base = cast(TabletopEnv, env.unwrapped)
        self.task: str = base.task.name
        self.scale = base.action_scale.astype(np.float64)
        self._noise = Wander(rng, NOISE_CORRELATION, NOISE_STD * noise)
        self._wander = Wander(rng, WANDER_CORRELATION, WANDER_STD)

    def label(self, obs: dict, info: dict) -> np.ndarray:
        """The clean action [7] float32 in [-1, 1] for this state."""
        return self._to_action(*self._decide(obs, info))

    def act(self, obs: dict, info: dict) -> tuple[np.ndarray, np.ndarray]:
        """Executed action and clean label, each [7] float32 in [-1, 1]."""
        view, move = self._decide(obs, info)
        label = self._to_action(view, move)
        disturbance = move.noise * self._noise.step()
        if self.task == "CueDelayReach" and not view.privileged[11]:
            disturbance = disturbance + self._wander.step()
        action = label.copy()
        action[:3] = np.clip(action[:3] + disturbance, -1.0, 1.0)
        return action, label

    def _decide(self, obs: dict, info: dict) -> tuple[View, Move]:
        view = View(state=obs["state"].astype(np.float64), privileged=info["privileged"].astype(np.float64))
        return view, MOVES[self.task](view)

    def _to_action(self, view: View, move: Move) -> np.ndarray:
        """Proportional step towards the target, shortened as a whole so that no axis exceeds the speed."""
        step = GAIN * (move.target - view.command) / self.scale[:3]
        step *= move.speed / max(move.speed, float(np.abs(step).max()))
        turn = np.clip(YAW_GAIN * (move.yaw - view.yaw) / self.scale[5], -0.5, 0.5)
        return np.array([*step, 0.0, 0.0, turn, move.gripper], np.float32)


def make_expert(env: gymnasium.Env, noise: float = 0.0, rng: np.random.Generator | None = None) -> Expert:
    """The expert of ``env``'s task; ``noise`` 1 disturbs the executed actions by about a quarter of an
    action unit.
    """
    return Expert(env, noise, rng if rng is not None else np.random.default_rng(0))


def measure(task: str, seeds: range, noise: float) -> tuple[float, np.ndarray]:
    """Success rate and frame counts of the expert on ``seeds``, without images."""
    env = gymnasium.make(f"enerverse/{task}-v0", cameras=())
    results = [run_episode(env, make_expert(env, noise, np.random.default_rng(seed)), seed) for seed in seeds]
    env.close()
    return float(np.mean([r.success for r in results])), np.array([r.length for r in results])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    print(f"{'task':22s} noise  success  steps min/median/max  ({len(seeds)} seeds)")
    for task in (*MOVES, "CueDelayReachMarkov"):
        for noise in (0.0, 1.0):
            rate, lengths = measure(task, seeds, noise)
            spread = f"{lengths.min()}/{int(np.median(lengths))}/{lengths.max()}"
            print(f"{task:22s} {noise:5.1f}  {rate:7.2f}  {spread}", flush=True)


if __name__ == "__main__":
    main()
