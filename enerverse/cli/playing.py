"""Playing a policy in the simulator, many episodes in lock-step, watched and timed."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from enerverse.cli.simulator import make_env
from enerverse.films import mosaic
from enerverse.metrics import Interval, wilson

if TYPE_CHECKING:
    from enerverse.pipelines import EnerVersePolicy
    from sims.rollout import Outcome


class Watched:
    """A policy whose pictures of one view are kept and whose time is counted."""

    def __init__(self, policy: EnerVersePolicy, view: str, bar: Any):
        self.policy, self.view, self.bar = policy, view, bar
        self.pictures: dict[Hashable, list[np.ndarray]] = {}
        self.seconds = 0.0

    def select_actions(
        self, observations: Sequence[dict], infos: Sequence[dict], keys: Sequence[Hashable]
    ) -> list[np.ndarray]:
        """The policy's actions [N, A]."""
        for key, observation in zip(keys, observations, strict=True):
            self.pictures.setdefault(key, []).append(observation["images"][self.view])
        began = time.perf_counter()
        actions = self.policy.select_actions(observations, infos, keys)
        self.seconds += time.perf_counter() - began
        self.bar.update()
        return actions


@dataclass(frozen=True, kw_only=True)
class Played:
    """How a policy did in a task: outcomes by episode, pictures uint8 [T, P, P, 3] of its first view by episode,
    decisions (chunks of actions) over all episodes and the seconds they took."""

    task: str
    outcomes: list[Outcome]
    pictures: list[np.ndarray]
    decisions: int
    seconds: float

    @property
    def success(self) -> Interval:
        """Success rate with its 95 % Wilson interval."""
        return wilson(sum(outcome.success for outcome in self.outcomes), len(self.outcomes))

    @property
    def steps(self) -> float:
        """Mean control steps per episode."""
        return float(np.mean([outcome.length for outcome in self.outcomes]))

    @property
    def decision_ms(self) -> float:
        """Milliseconds per decision of one episode, encoding the frames between decisions included."""
        return 1000 * self.seconds / self.decisions

    def film(self) -> np.ndarray:
        """All episodes side by side, uint8 [T, H, W, 3]."""
        names = [f"{outcome.seed} {'solved' if outcome.success else 'failed'}" for outcome in self.outcomes]
        return mosaic(self.pictures, names, [outcome.success for outcome in self.outcomes])


def play(policy: EnerVersePolicy, task: str, seeds: Sequence[int], randomize: bool = False) -> Played:
    """Play `task` with every seed. Raises ValueError naming the closest task for an unknown one."""
    config: Any = policy.config
    views, size = tuple(config.views), int(config.image_size)

    def make() -> Any:
        return make_env(task, cameras=views, image_size=size, randomize=randomize)

    first = make()
    limit = int(first.unwrapped.max_steps)
    first.close()
    from sims.rollout import evaluate

    policy.reset()
    with tqdm(total=limit, desc=task, unit="step", disable=not sys.stderr.isatty()) as bar:
        watched = Watched(policy, views[0], bar)
        outcomes = evaluate(make, watched, seeds)
    execute = policy.head.settings.execute
    return Played(
        task=task,
        outcomes=outcomes,
        pictures=[np.stack(watched.pictures[outcome.seed]) for outcome in outcomes],
        decisions=sum(math.ceil(outcome.length / execute) for outcome in outcomes),
        seconds=watched.seconds,
    )
