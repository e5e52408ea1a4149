"""Imagine how a scene goes on, first from the instruction alone, then given actions of your own.

python examples/3_imagine.py [checkpoint or run folder]     (default: the shipped checkpoint)
"""

import sys

import gymnasium
import numpy as np

import sims  # noqa: F401 - registers the environments
from enerverse.loading import load_world


def main(checkpoint: str | None = None) -> None:
    pipe = load_world(checkpoint)
    views = pipe.config.views
    env = gymnasium.make("enerverse/Lift-v0", cameras=views, image_size=pipe.config.image_size)
    observation, info = env.reset(seed=7)
    env.close()
    images = np.stack([[observation["images"][view] for view in views]])  # [frames seen, V, P, P, 3]

    free = pipe(images, info["task"], info["cameras"], num_frames=16)
    print(f"{info['task']!r}: frames {list(free.frames.shape)}, end of the task at {free.ended.tolist()}")

    left = np.zeros((16, 7), np.float32)
    left[:, 1] = 0.8  # towards +y, in units of 1.6 cm per frame
    plan = {"actions": left, "state": observation["state"]}
    told = pipe(images, info["task"], info["cameras"], num_frames=16, **plan)
    print(f"the two futures differ by {float((told.frames - free.frames).abs().mean()):.3f} per pixel")


if __name__ == "__main__":
    main(*sys.argv[1:])
