"""Captures of others in, ours out: nerfstudio, COLMAP, arrays; what is wrong with them; cameras brought to one clock.

Everything here speaks :class:`dataengine.views.Views`. LeRobot datasets, v2 and v3, are read by
:class:`dataengine.episodes.EpisodeDataset`.
"""

from dataengine.captures.check import (
    Problem,
    build_views,
    check_views,
    find_conventions,
    find_problems,
    repair,
)
from dataengine.captures.colmap import read_colmap, write_colmap
from dataengine.captures.shots import flip
from dataengine.captures.sync import Offsets, align, estimate_offsets
from dataengine.captures.transforms import read_transforms, write_transforms

__all__ = [
    "Offsets",
    "Problem",
    "align",
    "build_views",
    "check_views",
    "estimate_offsets",
    "find_conventions",
    "find_problems",
    "flip",
    "read_colmap",
    "read_transforms",
    "repair",
    "write_colmap",
    "write_transforms",
]
