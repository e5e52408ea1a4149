"""Digests of what a result is made from, so that a folder is never gone on with from other data."""

from __future__ import annotations

import hashlib
import io
import zlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dataengine.cameras import Cameras
    from dataengine.episodes import EpisodeDataset
    from dataengine.generators import Generator
    from dataengine.views import Views

DIGITS = 16


def digest(*parts: Any) -> str:
    """16 hexadecimal digits for tensors, arrays, bytes and whatever prints alike when it is alike."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.shape}".encode())
            found.update(np.ascontiguousarray(part).data)
        else:
            found.update(part if isinstance(part, bytes) else repr(part).encode())
        found.update(b"|")
    return found.hexdigest()[:DIGITS]


def digest_cameras(cameras: Cameras) -> str:
    """Of names, sizes, intrinsics and poses."""
    return digest(cameras.names, cameras.width, cameras.height, cameras.intrinsics, cameras.camera_to_world)


def digest_views(views: Views) -> str:
    """Of everything that a fit sees."""
    poses = None if views.bodies is None else views.bodies.poses
    tensors = (views.images, views.depth, views.body_ids, views.confidence)
    return digest(digest_cameras(views.cameras), poses, *tensors)


def digest_episode(dataset: EpisodeDataset, index: int, cameras: Cameras | None) -> str:
    """Of the task, the numbers in every frame of an episode, its video files, and `cameras`, as they are read. No picture
    is decoded."""
    meta = dataset.meta(index)
    sums = meta.checksums or {key: _sum(dataset.video_path(meta, key)) for key in meta.videos}
    seen = None if cameras is None else digest_cameras(cameras)
    rows = dataset.rows(meta)
    plain = pa.Table.from_pydict(rows.to_pydict(), schema=rows.schema.remove_metadata())
    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, plain.schema) as writer:
        writer.write_table(plain)
    return digest(meta.length, meta.tasks, sorted(sums.items()), seen, stream.getvalue())


def _sum(path: Path) -> int:
    """CRC-32 of a file, which may hold many episodes: read once as long as it stays the same."""
    told = path.stat()
    return _sum_of(path, told.st_size, told.st_mtime_ns)


@lru_cache(maxsize=256)
def _sum_of(path: Path, size: int, changed: int) -> int:
    total = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            total = zlib.crc32(part, total)
    return total


def digest_generator(generator: Generator | None) -> str | None:
    """Of the weights of a generator that is a network, or what it says of itself by an attribute `digest`; else None."""
    if isinstance(generator, nn.Module):
        return digest_weights(generator)
    return getattr(generator, "digest", None)


def digest_weights(module: nn.Module) -> str:
    """Of all parameters and buffers of a network."""
    return digest(*(part for item in sorted(module.state_dict().items()) for part in item))
