"""Episodes on disk in the LeRobot v3.0 layout: the record, its writer and its reader.

``EpisodeWriter(root, ...)`` appends, ``EpisodeDataset(root)`` reads, ``Episode`` is what is read.
"""

from dataengine.bodies import Bodies
from dataengine.errors import DatasetError, DatasetWriteError
from dataengine.lerobot.layout import PROVENANCE_LEGEND
from dataengine.lerobot.metadata import EpisodeMeta
from dataengine.lerobot.reader import Episode, EpisodeDataset
from dataengine.lerobot.video import VideoCodec
from dataengine.lerobot.writer import EpisodeWriter

__all__ = [
    "PROVENANCE_LEGEND",
    "Bodies",
    "DatasetError",
    "DatasetWriteError",
    "Episode",
    "EpisodeDataset",
    "EpisodeMeta",
    "EpisodeWriter",
    "VideoCodec",
]
