"""Train a world model of your own size on a dataset, for a few steps, and imagine with it.

python examples/2_train_a_world_model.py [dataset] [run folder]     (the dataset of example 1)
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataengine.episodes import EpisodeDataset
from enerverse import presets
from enerverse.train import stages
from enerverse.train.loop import TrainConfig


def small_preset(steps: int) -> presets.Preset:
    """A preset is a frozen dataclass: take the nearest one and replace what you want otherwise."""
    return replace(
        presets.tiny(),
        name="example",
        unet=presets.UNetConfig(widths=(32, 64), embedding=64),
        train_autoencoder=TrainConfig(steps=steps, batch=8),
        train_world=TrainConfig(steps=steps, batch=2),
    )


def main(folder: str = "runs/examples/push", out: str = "runs/examples/mine") -> None:
    preset, run, dataset = small_preset(steps=20), Path(out), EpisodeDataset(folder)
    autoencoder = stages.train_autoencoder(dataset, preset, run / "autoencoder", "cpu")
    latents = stages.encode(dataset, autoencoder, preset, run / "latents.safetensors")
    pipe = stages.train_world(latents, autoencoder, preset, run / "world", "cpu")

    episode = dataset.episode(0, views=preset.views)
    assert episode.cameras is not None
    cameras = episode.cameras.at(0)
    future = pipe(episode.stacked_images[:4], episode.task, cameras, num_frames=16, output_type="np")
    error = np.abs(future.frames[0].astype(float) - episode.stacked_images[4:20]).mean() / 255
    print(f"imagined {future.frames.shape[1]} frames of {len(preset.views)} views, mean error {error:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
