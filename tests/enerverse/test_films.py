"""Films: layout, what is grey, what is held, even sides."""

import numpy as np
import pytest

from enerverse.films import ABSENT, BAD, GAP, GOOD, HEADER, MARGIN, comparison, mosaic
from enerverse.media import encode_mp4


def clip(frames: int, views: int = 2, size: int = 5, level: int = 90) -> np.ndarray:
    return np.full((frames, views, size, size, 3), level, np.uint8)


def test_comparison_puts_every_picture_in_its_cell():
    film = comparison({"truth": clip(2, level=10), "other": clip(4, level=200)}, ("front", "top"), side=20)
    pitch = 20 + GAP
    assert len(film) == 4
    for row in range(2):
        top = HEADER + row * pitch
        assert (film[1, top : top + 20, MARGIN : MARGIN + 20] == 10).all()
        assert (film[3, top : top + 20, MARGIN : MARGIN + 20] == ABSENT).all()
        assert (film[3, top : top + 20, MARGIN + pitch : MARGIN + pitch + 20] == 200).all()
    assert (film[0, :HEADER] < 255).any()
    assert (film[0, :, :MARGIN] < 255).any()


def test_comparison_refuses_other_views():
    with pytest.raises(ValueError, match=r"columns\['b'\]: expected 2 views of 5 pixels"):
        comparison({"a": clip(1), "b": clip(1, views=3)}, ("front", "top"))


def test_mosaic_holds_the_last_picture_and_marks_the_outcome():
    clips = [clip(3, views=1, level=30)[:, 0], clip(1, views=1, level=60)[:, 0]]
    film = mosaic(clips, ["a", "b"], [True, False], side=10)
    assert len(film) == 3
    second = GAP + 10 + GAP
    assert (film[2, HEADER : HEADER + 10, second : second + 10] == 60).all()
    assert (film[0, HEADER - 2, GAP : GAP + 10] == GOOD).all()
    assert (film[0, HEADER - 2, second : second + 10] == BAD).all()


@pytest.mark.parametrize("size", [5, 6, 7])
def test_films_can_be_encoded_as_they_are(size):
    film = comparison({"a": clip(2, size=size)}, ("front", "top"), side=size)
    assert encode_mp4(film, 10.0, scale=1)[4:8] == b"ftyp"
    film = mosaic([clip(2, views=1, size=size)[:, 0]] * 3, ["a", "b", "c"], [True] * 3, side=size, across=2)
    assert encode_mp4(film, 10.0, scale=1)[4:8] == b"ftyp"


def test_odd_sides_are_refused_at_their_own_size():
    with pytest.raises(ValueError, match="expected even sides at scale 1, got \\[5, 6\\]"):
        encode_mp4(np.zeros((1, 5, 6, 3), np.uint8), 10.0, scale=1)
