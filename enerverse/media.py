"""Pixels to bytes that a browser shows: PNG pictures and H.264 videos."""

from __future__ import annotations

import io
import math
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream

_BT709 = 1  # the code for BT.709 in each of the three colour fields of H.264


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode pixels uint8 `[H, W, 3]` as PNG and return the bytes.

    Raises ValueError for other shapes or types.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels: expected uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter type, 0 for none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def encode_mp4(frames: np.ndarray, fps: float, scale: int = 2) -> bytes:
    """Encode frames uint8 `[T, H, W, 3]` as H.264 in MP4 and return the bytes.

    Frames are doubled in size without smoothing: H.264 as browsers play it stores colour at half size and
    needs even sides, so small frames would lose their colour edges. With `scale=1` they are taken as they
    are and need even sides.
    Raises ValueError for other shapes or types, odd sides, or a rate that is not positive.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames: expected uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if scale * frames.shape[1] % 2 or scale * frames.shape[2] % 2:
        raise ValueError(f"frames: expected even sides at scale {scale}, got {list(frames.shape[1:3])}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps: expected a positive number of frames per second, got {fps}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = _add_h264(container, scale * frames.shape[2], scale * frames.shape[1], fps)
        for pixels in frames:
            large = np.ascontiguousarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1))
            frame = av.VideoFrame.from_ndarray(large, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _add_h264(container: OutputContainer, width: int, height: int, fps: float) -> VideoStream:
    options = {"crf": "16", "preset": "medium"}
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.thread_count = 1  # the same frames give the same bytes
    context.colorspace = context.color_primaries = context.color_trc = context.color_range = _BT709
    return stream


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
