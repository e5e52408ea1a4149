"""Let the policy act in MuJoCo, one environment, one action at a time.

python examples/4_act.py [checkpoint or run folder]     (default: the shipped checkpoint)
"""

import sys

import gymnasium

import sims  # noqa: F401 - registers the environments
from enerverse.loading import load_policy


def main(checkpoint: str | None = None) -> None:
    policy = load_policy(checkpoint)
    config = policy.config
    env = gymnasium.make("enerverse/Lift-v0", cameras=config.views, image_size=config.image_size)
    observation, info = env.reset(seed=1000)
    finished, steps = False, 0
    while not finished:
        observation, _, terminated, truncated, info = env.step(policy.select_action(observation, info))
        finished, steps = terminated or truncated, steps + 1
    env.close()
    print(f"{info['task']!r}: {'solved' if info['is_success'] else 'not solved'} after {steps} steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
