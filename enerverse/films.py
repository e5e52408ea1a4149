"""Films to look at: pictures enlarged without smoothing, laid out in a grid and labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

HEADER, MARGIN, GAP = 34, 76, 6  # pixels: strip of column names, strip of row names, space between pictures
PAPER, INK, ABSENT = 255, 40, 224  # grey levels: page, text, where there is no picture
GOOD, BAD = (46, 160, 67), (207, 34, 46)


def comparison(columns: Mapping[str, np.ndarray], rows: Sequence[str], side: int = 192) -> np.ndarray:
    """One film of several: rows are views, columns are versions of the same frames.

    columns: name -> uint8 [T, V, P, P, 3]; shorter ones are grey after their end. rows: V view names.
    side: about how many pixels a picture shall be wide. Returns uint8 [T', H, W, 3] with even sides.
    Raises ValueError when a column has other views or another size than the first.
    """
    first = next(iter(columns.values()))
    for name, frames in columns.items():
        if frames.shape[1:] != first.shape[1:] or frames.shape[1] != len(rows):
            raise ValueError(
                f"columns[{name!r}]: expected {len(rows)} views of {first.shape[2]} pixels, got {frames.shape}"
            )
    scale = max(1, side // first.shape[2])
    pitch = first.shape[2] * scale + GAP
    film = _page(max(map(len, columns.values())), HEADER + pitch * len(rows), MARGIN + pitch * len(columns))
    for column, (name, frames) in enumerate(columns.items()):
        left = MARGIN + column * pitch
        write(film, name, left, HEADER - 12)
        for row in range(len(rows)):
            _paste(film, frames[:, row], HEADER + row * pitch, left, scale)
    for row, name in enumerate(rows):
        write(film, name, 6, HEADER + row * pitch + pitch // 2)
    return film


def mosaic(
    clips: Sequence[np.ndarray], names: Sequence[str], good: Sequence[bool], side: int = 128, across: int = 5
) -> np.ndarray:
    """Many episodes in one film, named above and marked green or red; ended ones hold their last picture.

    clips: uint8 [T, P, P, 3] each. Returns uint8 [T', H, W, 3] with even sides.
    """
    size = clips[0].shape[1] * max(1, side // clips[0].shape[1])
    across = min(across, len(clips))
    down, pitch = -(-len(clips) // across), size + GAP
    film = _page(max(map(len, clips)), down * (pitch + HEADER), GAP + across * pitch)
    for index, (clip, name, fine) in enumerate(zip(clips, names, good, strict=True)):
        top, left = (index // across) * (pitch + HEADER), GAP + (index % across) * pitch
        held = np.concatenate([clip, clip[-1:].repeat(len(film) - len(clip), 0)])
        write(film, name, left, top + HEADER - 12, 0.5)
        _paste(film, held, top + HEADER, left, size // clip.shape[1])
        film[:, top + HEADER - 4 : top + HEADER, left : left + size] = GOOD if fine else BAD
    return film


def write(film: np.ndarray, text: str, left: int, baseline: int, size: float = 0.7) -> None:
    """Write `text` into every frame of `film` [T, H, W, 3], in place."""
    import cv2

    page = np.full_like(film[0], PAPER)
    cv2.putText(
        page, text, (left, baseline), cv2.FONT_HERSHEY_SIMPLEX, size, (INK,) * 3, 1, cv2.LINE_AA
    )  # fmt: skip
    touched = (page < PAPER).any(-1)
    film[:, touched] = page[touched]


def _page(frames: int, height: int, width: int) -> np.ndarray:
    return np.full((frames, height + height % 2, width + width % 2, 3), PAPER, np.uint8)


def _paste(film: np.ndarray, frames: np.ndarray, top: int, left: int, scale: int) -> None:
    large = frames.repeat(scale, 1).repeat(scale, 2)
    height, width = large.shape[1:3]
    film[:, top : top + height, left : left + width] = ABSENT
    film[: len(large), top : top + height, left : left + width] = large
