"""Scripted experts: functions of ``obs["state"]`` and ``info["privileged"]`` only, so a Markov policy can learn them.

``python -m sims.experts --seeds 50`` prints success and length of every task, without and with action noise.
"""

import argparse
import dataclasses
from collections.abc import Callable

import gymnasium
import numpy as np

from sims.errors import expect

GAIN = 0.6  # share of the remaining distance commanded per step
YAW_GAIN = 0.3  # lower: the state holds the measured yaw, which lags the commanded one
NOISE_STD = 0.25  # action units at noise=1
NOISE_CORRELATION = 0.6  # of the AR(1) process
OPEN, CLOSED = 1.0, -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """The two vectors an expert sees, by name; metres, radians, world frame."""

    state: np.ndarray
    privileged: np.ndarray

    @property
    def tcp(self) -> np.ndarray:
        return self.state[0:3]

    @property
    def command(self) -> np.ndarray:
        return self.state[0:3] + self.state[8:11]

    @property
    def yaw(self) -> float:
        """Yaw of the hand; 0 when the fingers spread along y. For a near-vertical hand q = (0, c, s, 0)."""
        return float(2.0 * np.arctan2(self.state[5], self.state[4]))

    @property
    def width(self) -> float:
        return float(self.state[7])

    @property
    def thing(self) -> np.ndarray:
        return self.privileged[0:3]

    @property
    def thing_yaw(self) -> float:
        return float(self.privileged[3])

    @property
    def goal(self) -> np.ndarray:
        return self.privileged[4:7]

    @property
    def closed(self) -> bool:
        return bool(self.privileged[16] < 0)

    @property
    def lateral(self) -> float:
        """Horizontal distance of the TCP from the object."""
        return float(np.linalg.norm((self.tcp - self.thing)[:2]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """Where to go now: TCP target [3], hand yaw, gripper, speed in action units, factor on the action noise."""

    target: np.ndarray
    gripper: float
    noise: float
    yaw: float = 0.0
    speed: float = 1.0


def _at(xy: np.ndarray, z: float) -> np.ndarray:
    return np.array([xy[0], xy[1], z])


def _seize(view: View, *, hover: float, full: float) -> Move | None:
    """Come from above and close the fingers; ``None`` once they hold something thinner than ``full`` metres."""
    above = float(view.tcp[2] - view.thing[2])
    if view.closed and view.lateral < 0.03 and abs(above) < 0.03:
        if view.width > full:
            return Move(target=view.command, yaw=view.thing_yaw, gripper=CLOSED, noise=0.0)
        return None
    if view.lateral > 0.018:
        return Move(target=_at(view.thing, view.thing[2] + hover), yaw=view.thing_yaw, gripper=OPEN, noise=1.0, speed=0.65)
    ready = view.lateral < 0.01 and above < 0.01
    gripper = CLOSED if ready and view.width > 0.07 else OPEN
    return Move(target=view.thing, yaw=view.thing_yaw, gripper=gripper, noise=0.8 if above > 0.03 else 0.0, speed=0.5)


def lift(view: View) -> Move:
    """Seize the cube and go up."""
    goal = _at(view.command, 0.16)
    return _seize(view, hover=0.075, full=0.056) or Move(target=goal, yaw=view.thing_yaw, gripper=CLOSED, noise=0.4, speed=0.5)


def pick_place(view: View) -> Move:
    """Seize the cube, carry it over the bin, lower it, let go and leave."""
    offset = np.linalg.norm((view.thing - view.goal)[:2])
    if not view.closed and offset < 0.05:
        return Move(target=_at(view.command, 0.15), gripper=OPEN, noise=0.3)
    grasp = _seize(view, hover=0.075, full=0.056)
    if grasp is not None:
        return grasp
    if offset > 0.02:
        height = view.tcp[2]
        # Rise first, drift sideways only once the cube clears the walls.
        across = np.clip((height - 0.055) / 0.03, 0.0, 1.0)
        xy = view.command[:2] + across * (view.goal - view.command)[:2]
        return Move(target=_at(xy, 0.12), gripper=CLOSED, noise=0.4, speed=0.8)
    low = view.tcp[2] < 0.055
    return Move(target=_at(view.goal, 0.045), gripper=OPEN if low else CLOSED, noise=0.3, speed=0.6)


def push(view: View) -> Move:
    """Go behind the cube as seen from the disc, down, and push along the line between them."""
    offset = (view.goal - view.thing)[:2]
    remaining = float(np.linalg.norm(offset))
    if remaining < 0.012:
        return Move(target=_at(view.command, 0.10), gripper=CLOSED, noise=0.0)
    along = offset / max(remaining, 1e-6)
    across = np.array([-along[1], along[0]])
    behind = view.thing[:2] - 0.065 * along
    relative = (view.tcp - view.thing)[:2]
    aside, ahead = float(relative @ across), float(relative @ along)
    yaw = float(np.clip(np.arctan2(along[1], along[0]), -0.7, 0.7))
    if view.tcp[2] > 0.04:
        far = np.linalg.norm(view.tcp[:2] - behind) > 0.02
        return Move(target=_at(behind, 0.09 if far else 0.025), yaw=yaw, gripper=CLOSED, noise=1.0 if far else 0.5, speed=0.75)
    if abs(aside) > 0.03 or ahead > -0.025:
        return Move(target=_at(view.command, 0.10), yaw=yaw, gripper=CLOSED, noise=0.0)
    step = view.command[:2] + along * min(0.03, remaining + 0.004) - across * 0.6 * aside
    return Move(target=_at(step, 0.025), yaw=yaw, gripper=CLOSED, noise=0.35, speed=0.5)


def open_drawer(view: View) -> Move:
    """Seize the handle and pull until the drawer is out."""
    grasp = _seize(view, hover=0.075, full=0.022)
    return grasp or Move(target=view.goal, gripper=CLOSED, noise=0.3, speed=0.6)


def cue_delay_reach(view: View) -> Move:
    """Stay near home until the go signal, then reach the cued cube."""
    if view.privileged[11] > 0.5:
        return Move(target=view.goal, gripper=OPEN, noise=0.6, speed=0.9)
    return Move(target=view.privileged[13:16], gripper=OPEN, noise=0.0, speed=0.3)


EXPERTS: dict[str, Callable[[View], Move]] = {
    "Lift": lift,
    "Push": push,
    "PickPlace": pick_place,
    "OpenDrawer": open_drawer,
    "CueDelayReach": cue_delay_reach,
}


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
    """One expert for one environment. ``act`` returns the executed (noisy) action and the clean label, [7] each.

    The label is what the expert would do in the visited state (DART, Laskey et al. 2017, arXiv 1703.09327).
    """

    def __init__(self, env: gymnasium.Env, noise: float, rng: np.random.Generator) -> None:
        expect(noise >= 0.0, "noise", "a factor >= 0", noise)
        base = env.unwrapped
        self.task: str = base.task.name
        self.scale = base.action_scale.astype(np.float64)
        self._noise = Wander(rng, NOISE_CORRELATION, NOISE_STD * noise)
        self._wander = Wander(rng, 0.9, 0.22)

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
        return view, EXPERTS[self.task](view)

    def _to_action(self, view: View, move: Move) -> np.ndarray:
        """Proportional step towards the target, shortened as a whole so that no axis exceeds the speed."""
        step = GAIN * (move.target - view.command) / self.scale[:3]
        step *= move.speed / max(move.speed, float(np.abs(step).max()))
        turn = np.clip(YAW_GAIN * (move.yaw - view.yaw) / self.scale[5], -0.5, 0.5)
        return np.array([*step, 0.0, 0.0, turn, move.gripper], np.float32)


def make_expert(env: gymnasium.Env, noise: float = 0.0, rng: np.random.Generator | None = None) -> Expert:
    """The expert of ``env``'s task; ``noise`` 1 disturbs the executed actions by about a quarter of an action unit."""
    return Expert(env, noise, rng if rng is not None else np.random.default_rng(0))


def measure(task: str, seeds: range, noise: float) -> tuple[float, np.ndarray]:
    """Success rate and frame counts of the expert on ``seeds``, without images."""
    from sims.rollout import run_episode

    env = gymnasium.make(f"enerverse/{task}-v0", cameras=())
    results = [run_episode(env, make_expert(env, noise, np.random.default_rng(seed)), seed) for seed in seeds]
    env.close()
    return float(np.mean([r.success for r in results])), np.array([r.length for r in results])


def main() -> None:
    """Print the table."""
    import sims  # noqa: F401  registers the environments

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    print(f"{'task':22s} noise  success  steps min/median/max  ({len(seeds)} seeds)")
    for task in (*EXPERTS, "CueDelayReachMarkov"):
        for noise in (0.0, 1.0):
            rate, lengths = measure(task, seeds, noise)
            print(f"{task:22s} {noise:5.1f}  {rate:7.2f}  {lengths.min()}/{int(np.median(lengths))}/{lengths.max()}", flush=True)


if __name__ == "__main__":
    main()
