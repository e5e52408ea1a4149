"""Video files: colour in H.264, metric depth in lossless 12-bit FFV1, written by frame, read by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from dataengine.errors import closest, damaged

T = TypeVar("T")

DEPTH_CODES = 4095  # 12 bits, the range LeRobot's depth schema fixes
FFV1_OPTIONS = {"level": "3", "slices": "1"}  # more slices fail on narrow images
# PyAV converts colours with a thread per core where it has the choice; small images pay for starting them
ONE_THREAD: dict[str, Any] = {"threads": 1} if "threads" in (VideoReformatter.reformat.__doc__ or "") else {}
# On smaller images, what x264 foresees of later frames differs from run to run: one file in a hundred had other bytes.
STEADY_SIDE = 64
COLOUR_CODECS = ("libx264", "libx264rgb", "libx265", "libsvtav1")


@dataclass(frozen=True, kw_only=True)
class VideoCodec:
    """How colour images are compressed.

    The default keeps full chroma resolution (yuv444p) at a quality above 40 dB PSNR on rendered 64-pixel
    images, because a world model learns whatever the codec leaves behind; ``yuv420p`` plays in every browser
    but loses 10 dB on coloured edges. ``codec="libx264rgb", pix_fmt="rgb24", crf=0`` is lossless.

    Attributes:
        codec: an FFmpeg encoder.
        pix_fmt: pixel format of the encoder.
        crf: constant rate factor, 0 (best) to 51.
        preset: speed preset of the encoder.
        gop: frames between two key frames; small, so that reading a window decodes few frames it does not
            need.
    """

    codec: str = "libx264"
    pix_fmt: str = "yuv444p"
    crf: int = 8
    preset: str = "veryfast"
    gop: int = 10

    def __post_init__(self) -> None:
        if self.codec not in COLOUR_CODECS:
            raise ValueError(
                f"codec: expected a colour encoder, got {self.codec!r}; {closest(self.codec, COLOUR_CODECS)}"
            )
        formats = [f.name for f in av.Codec(self.codec, "w").video_formats or []]
        if self.pix_fmt not in formats:
            raise ValueError(
                f"pix_fmt: {self.codec} cannot write {self.pix_fmt!r}; {closest(self.pix_fmt, formats)}"
            )
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf: expected 0 (best) to 51, got {self.crf}")
        if self.gop < 1:
            raise ValueError(f"gop: expected at least 1 frame between key frames, got {self.gop}")

    def options(self, height: int, width: int) -> dict[str, str]:
        """FFmpeg options for such images; no B-frames, so frames leave the encoder in order and every seek is exact."""
        if self.codec == "libsvtav1":
            return {"crf": str(self.crf), "svtav1-params": "pred-struct=1"}
        quiet = (
            {"x265-params": "log-level=none:bframes=0:pools=none:frame-threads=1"}
            if self.codec == "libx265"
            else {}
        )
        steady = {"mbtree": "0"} if "264" in self.codec and min(height, width) < STEADY_SIDE else {}
        return {"crf": str(self.crf), "preset": self.preset, "bf": "0", **quiet, **steady}

    def check_size(self, height: int, width: int) -> None:
        """Raise ``ValueError`` where chroma subsampling cannot hold an odd size."""
        if "420" in self.pix_fmt and (height % 2 or width % 2):
            raise ValueError(
                f"image_size: {self.pix_fmt} needs even sides, got {height} x {width}; use pix_fmt='yuv444p' "
                "or even sides"
            )

    def to_info(self) -> dict[str, Any]:
        """The encoder settings under the names that LeRobot gives them in ``info.json``."""
        values = asdict(self)
        return {
            "video.codec": _codec_name(self.codec),
            "video.pix_fmt": self.pix_fmt,
            "video.g": values["gop"],
            "video.crf": self.crf,
            "video.preset": self.preset,
            "video.encoder": self.codec,
        }


def _codec_name(encoder: str) -> str:
    return {"libx264": "h264", "libx264rgb": "h264", "libx265": "hevc", "libsvtav1": "av1"}[encoder]


@dataclass(frozen=True, kw_only=True)
class DepthCodec:
    """12-bit logarithmic quantisation of metric depth: error is a constant fraction of the depth.

    Code c stands for ``exp(log(near + shift) + c / 4095 * log((far + shift) / (near + shift))) - shift``
    metres, as in LeRobot's depth videos. With the default range, which begins where a camera on the wrist sees its
    own fingers, the error is at most 0.076 % (0.76 mm at 1 m). FFV1 keeps the codes exactly and is ten times faster
    than lossless HEVC.

    Attributes:
        near, far: metres; depth beyond ``far`` (sky, infinity) is stored as ``far``, depth below ``near`` is
            refused.
        shift: metres added before the logarithm; 0 gives a constant relative error.
    """

    near: float = 0.02
    far: float = 10.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if not (self.near + self.shift > 0 and self.near < self.far < math.inf):
            raise ValueError(f"depth_range: expected 0 < near < far in metres, got ({self.near}, {self.far})")

    @property
    def _log_range(self) -> tuple[float, float]:
        return math.log(self.near + self.shift), math.log((self.far + self.shift) / (self.near + self.shift))

    @property
    def max_relative_error(self) -> float:
        """Largest ``|decoded - depth| / depth`` within the range (for ``shift`` 0)."""
        return math.expm1(self._log_range[1] / DEPTH_CODES / 2)

    def encode(self, depth: NDArray[Any]) -> NDArray[np.uint16]:
        """Metres ``[..., H, W]`` to codes 0..4095."""
        start, span = self._log_range
        clipped = np.clip(np.asarray(depth, dtype=np.float64), self.near, self.far)
        return np.rint((np.log(clipped + self.shift) - start) / span * DEPTH_CODES).astype(np.uint16)

    def decode(self, codes: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Codes to metres, float32."""
        start, span = self._log_range
        return (np.exp(start + codes.astype(np.float64) / DEPTH_CODES * span) - self.shift).astype(np.float32)

    @classmethod
    def from_info(cls, feature: Mapping[str, Any]) -> DepthCodec | None:
        """The codec of a depth feature in ``info.json``, None where its range is not written there."""
        info = feature.get("info") or {}
        near, far, shift = (info.get(f"video.{n}", info.get(n)) for n in ("depth_min", "depth_max", "shift"))
        return None if near is None or far is None else cls(near=near, far=far, shift=shift or 0.0)

    def to_info(self) -> dict[str, Any]:
        """The parameters under LeRobot's names for depth videos."""
        return {
            "video.codec": "ffv1",
            "video.pix_fmt": "gray12le",
            "video.encoder": "ffv1",
            "video.depth_min": self.near,
            "video.depth_max": self.far,
            "video.shift": self.shift,
            "video.use_log": True,
        }


class _CheckedFile:
    """The file FFmpeg writes to; remembers the refusal of a write, which FFmpeg may report late or not at
    all.
    """

    def __init__(self, path: Path):
        self.name = str(path)
        self.refusal: OSError | None = None
        self._file = open(path, "wb")  # noqa: SIM115 - closed by its owner

    def write(self, data: bytes) -> int:
        return self._checked(self._file.write, data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._checked(self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._checked(self._file.close)

    def _checked(self, call: Callable[..., T], *arguments: Any) -> T:
        try:
            return call(*arguments)
        except OSError as error:
            self.refusal = self.refusal or error
            raise


class VideoEncoder:
    """One video file that grows with every :meth:`add`; only the encoder's short look-ahead is in memory.

    A full disk raises the ``OSError`` of the file system, from :meth:`add` or :meth:`close`.
    """

    def __init__(self, path: Path, *, fps: float, height: int, width: int, codec: VideoCodec | DepthCodec):
        self.path, self.codec, self.frames = path, codec, 0
        self._file = _CheckedFile(path)
        self._container: Any = av.open(self._file, "w", format="mp4")
        colour = isinstance(codec, VideoCodec)
        rate = _rational(fps)
        self._stream: Any = self._container.add_stream(codec.codec if colour else "ffv1", rate=rate)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = codec.pix_fmt if colour else "gray12le"
        self._stream.options = codec.options(height, width) if colour else FFV1_OPTIONS
        self._stream.gop_size = codec.gop if colour else 1
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.time_base = 1 / rate

    def add(self, image: NDArray[Any]) -> None:
        """Append a colour image uint8 ``[H, W, 3]`` or a depth map in metres ``[H, W]``."""
        frame = self._colour(image) if isinstance(self.codec, VideoCodec) else self._depth(image)
        frame.pts = self.frames
        self._encode(frame)
        self.frames += 1

    def _encode(self, frame: VideoFrame | None) -> None:
        with self._refusals():
            self._container.mux(self._stream.encode(frame))

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Whatever FFmpeg makes of a refused write, raise the refusal itself."""
        try:
            yield
        except FFmpegError:
            if self._file.refusal is None:
                raise
        if self._file.refusal is not None:
            raise self._file.refusal

    def _colour(self, image: NDArray[np.uint8]) -> VideoFrame:
        return VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")

    def _depth(self, depth: NDArray[Any]) -> VideoFrame:
        assert isinstance(self.codec, DepthCodec)
        frame = VideoFrame(self._stream.width, self._stream.height, "gray12le")
        codes = self.codec.encode(depth)
        rows, columns = codes.shape
        plane = np.frombuffer(memoryview(frame.planes[0]), np.uint16).reshape(rows, -1)  # padded on the right
        plane[:, :columns] = codes
        return frame

    def close(self) -> None:
        """Flush the encoder and the file; raises ``OSError`` where the disk refuses."""
        self._encode(None)
        with self._refusals():
            self._container.close()
            self._file.close()

    def abort(self) -> None:
        """Close without caring for the content and remove the file; never raises."""
        for close in (self._container.close, self._file.close):
            try:
                close()
            except (OSError, ValueError, FFmpegError):
                continue  # a full disk refuses the trailer too; the file goes anyway
        self.path.unlink(missing_ok=True)


def _rational(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def read_window(
    path: Path, *, fps: float, first: int, count: int, episode: int, depth: DepthCodec | None = None
) -> NDArray[Any]:
    """Decode frames ``first .. first + count`` of a video file, counted from the start of the file.

    Args:
        fps: frames per second of the dataset; frame n of the file lies at n / fps seconds.
        episode: only for the error text.
        depth: the codec of a depth video; None for colour.

    Returns:
        uint8 ``[count, H, W, 3]``, or float32 ``[count, H, W]`` metres for depth.

    Raises:
        DatasetError: the file is missing, truncated or holds fewer frames; names the file, the episode and
            the frame.
    """
    found: dict[int, NDArray[Any]] = {}
    try:
        with av.open(str(path)) as container:
            _collect(container, found, fps, first, count, depth)
    except (OSError, ValueError, IndexError) as cause:  # every FFmpeg error is one of these
        raise damaged(path, episode, len(found), cause) from cause
    missing = [n for n in range(count) if n not in found]
    if missing:
        raise damaged(path, episode, missing[0], f"frame {first + missing[0]} of the file is not there")
    return np.stack([found[n] for n in range(count)])


def _collect(
    container: Any, found: dict[int, Any], fps: float, first: int, count: int, depth: DepthCodec | None
) -> None:
    stream = container.streams.video[0]
    stream.codec_context.options = {"err_detect": "explode"}  # damage is an error, not a guess
    stream.codec_context.thread_count = 1  # small images: threads cost more than they give
    if first > 0:
        # half a frame late, so that rounding of the timestamp cannot land one key frame too early or too late
        container.seek(round((first + 0.5) / fps / stream.time_base), stream=stream)
    reformatter = VideoReformatter()  # one for all frames: setting it up costs ten times its work
    for frame in container.decode(stream):
        n = round(float(frame.pts * frame.time_base) * fps) - first
        if n >= count:
            return
        if frame.is_corrupt:
            return  # FFmpeg would go on with grey blocks
        if n >= 0:
            found[n] = _pixels(frame, depth, reformatter)
        if len(found) == count:
            return


def _pixels(frame: VideoFrame, depth: DepthCodec | None, reformatter: VideoReformatter) -> NDArray[Any]:
    if depth is None:
        return reformatter.reformat(frame, format="rgb24", **ONE_THREAD).to_ndarray()
    plane = np.frombuffer(memoryview(frame.planes[0]), np.uint16).reshape(frame.height, -1)[:, : frame.width]
    return depth.decode(plane)


def count_frames(path: Path) -> int:
    """Number of video packets in a file, without decoding them; raises what FFmpeg raises."""
    with av.open(str(path)) as container:
        return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
