"""From datasets on disk to training windows."""

from enerverse.data.clips import Clip, ClipConfig, ClipSampler, gripper_start
from enerverse.data.latents import (
    Datasets,
    LatentEpisodes,
    encode_dataset,
    encode_images,
    group_views,
    read_images,
)

__all__ = [
    "Clip",
    "ClipConfig",
    "ClipSampler",
    "Datasets",
    "LatentEpisodes",
    "encode_dataset",
    "encode_images",
    "gripper_start",
    "group_views",
    "read_images",
]
