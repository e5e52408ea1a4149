"""Pictures inside parquet files: integer ids as 16-bit PNG, exactly, and colour images of other writers."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

NO_ID = 65535  # stands for id -1, "nothing", in a 16-bit picture


def encode_ids(ids: NDArray[Any]) -> bytes:
    """Ids from -1 to 65534, ``[H, W]``, as PNG."""
    return cv2.imencode(".png", np.where(ids < 0, NO_ID, ids).astype(np.uint16))[1].tobytes()


def decode_ids(png: bytes) -> NDArray[np.int32]:
    """Inverse of :func:`encode_ids`, int32 ``[H, W]``; ``ValueError`` for bytes that are no picture."""
    ids = _decode(png, cv2.IMREAD_UNCHANGED).astype(np.int32)
    return np.where(ids == NO_ID, np.int32(-1), ids)


def decode_image(png: bytes) -> NDArray[np.uint8]:
    """A colour picture, uint8 RGB ``[H, W, 3]``; raises ``ValueError`` for bytes that are no picture."""
    return np.ascontiguousarray(_decode(png, cv2.IMREAD_COLOR)[..., ::-1])


def _decode(png: bytes, flag: int) -> NDArray[Any]:
    picture = cv2.imdecode(np.frombuffer(png, np.uint8), flag) if png else None
    if picture is None:
        raise ValueError("a picture in the parquet file cannot be decoded")
    return picture
