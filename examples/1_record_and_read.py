"""Record two demonstrations with three calibrated cameras, read one back.

python examples/1_record_and_read.py [folder]
"""

import sys

import gymnasium

import sims  # noqa: F401 - registers the environments
from dataengine.episodes import EpisodeDataset, EpisodeWriter
from dataengine.record import record, writer_arguments
from sims.experts import make_expert


def main(folder: str = "runs/examples/push") -> None:
    env = gymnasium.make("enerverse/Push-v0", image_size=64)
    with EpisodeWriter(folder, **writer_arguments(env)) as writer:
        report = record(env, make_expert(env), writer, episodes=2)
    env.close()
    episode = EpisodeDataset(folder).episode(0)
    print(f"kept {report.kept} of {report.tried} episodes in {folder}")
    print(f"{episode.task!r}: {len(episode)} frames of {', '.join(episode.views)}")
    if episode.cameras is not None:
        print("the top camera stands at", episode.cameras.camera_to_world[0, -1, :3, 3].round(2), "metres")


if __name__ == "__main__":
    main(*sys.argv[1:])
