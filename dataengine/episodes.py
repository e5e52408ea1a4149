"""Episodes on disk in the LeRobot v3.0 layout: the record, its writer and its reader.

``EpisodeWriter(root, ...)`` appends, ``EpisodeDataset(root)`` reads, ``Episode`` is what is read.
"""

from dataengine.errors import DatasetError, DatasetWriteError
from dataengine.reader import Episode, EpisodeDataset, EpisodeMeta
from dataengine.video import VideoCodec
from dataengine.writer import EpisodeWriter

__all__ = ["DatasetError", "DatasetWriteError", "Episode", "EpisodeDataset", "EpisodeMeta", "EpisodeWriter", "VideoCodec"]
