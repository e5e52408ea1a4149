"""A small synthetic scene and a writer for it, shared by the dataset tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from dataengine.episodes import EpisodeWriter

VIEWS = ("front", "top")
SIZE = (48, 64)


def rendered_image(t: int, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """A checker floor, a shaded wall, a moving ball, as a simulator might draw them; uint8 [H, W, 3]."""
    row, column = np.mgrid[:height, :width]
    image = np.where(((column // 8 + row // 8) % 2)[..., None], (200, 180, 150), (90, 80, 100)).astype(
        np.uint8
    )
    image[: height // 3] = np.stack([120 + row, 160 + row, 210 - row], -1)[: height // 3]
    cv2.circle(
        image, ((10 + 2 * t) % width, 2 * height // 3), max(1, height // 7), (220, 30, 40), -1, cv2.LINE_AA
    )
    return image


def pose(angle: float) -> np.ndarray:
    """A camera that turns about the vertical while it moves, float64 [4, 4]."""
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, 3] = (0.1 * angle, 0.3, 1.2)
    return matrix


INTRINSICS = np.array([[70.0, 0.0, 32.0], [0.0, 71.0, 24.0], [0.0, 0.0, 1.0]])


def frame(t: int, *, full: bool = False) -> dict[str, Any]:
    """Keyword arguments of ``add_frame`` at time t; ``full`` adds every optional modality."""
    values: dict[str, Any] = {
        "images": {v: rendered_image(t + 3 * i) for i, v in enumerate(VIEWS)},
        "state": np.linspace(-1, 1, 5) * (t + 1) / 7,
        "action": np.full(3, 0.1 * t),
        "task": "lift the cube",
    }
    if full:
        cameras = {
            v: {"intrinsics": INTRINSICS, "camera_to_world": pose(0.1 * t + i)} for i, v in enumerate(VIEWS)
        }
        values |= {
            "cameras": cameras,
            "depth": {v: (0.3 + values["images"][v][..., 0] / 100).astype(np.float32) for v in VIEWS},
            "segmentation": {v: values["images"][v][..., 1].astype(np.int32) - 31 for v in VIEWS},
            "extra": {"action.clean": np.full(3, 0.2), "privileged": np.arange(2) + t},
        }
    return values


@pytest.fixture
def open_writer(tmp_path: Path) -> Callable[..., EpisodeWriter]:
    """A writer on ``tmp_path / "dataset"`` for the frames above; keyword arguments override."""

    def open_it(root: Path | None = None, *, full: bool = False, **changes: Any) -> EpisodeWriter:
        arguments: dict[str, Any] = {
            "fps": 10,
            "views": VIEWS,
            "image_size": SIZE,
            "state_dim": 5,
            "action_dim": 3,
        }
        if full:
            arguments |= {"depth": True, "segmentation": True, "extra": {"action.clean": 3, "privileged": 2}}
        return EpisodeWriter(root or tmp_path / "dataset", **(arguments | changes))

    return open_it


@pytest.fixture
def make_frame() -> Callable[..., dict[str, Any]]:
    return frame


@pytest.fixture
def dataset_root(open_writer: Callable[..., EpisodeWriter], tmp_path: Path) -> Path:
    """Three finished episodes of 5, 6 and 7 frames with the minimal features."""
    with open_writer() as writer:
        for episode in range(3):
            for t in range(5 + episode):
                writer.add_frame(**frame(t))
            writer.save_episode(success=episode != 1, seed=40 + episode)
    return tmp_path / "dataset"


@pytest.fixture(scope="package")
def cluster() -> Iterator[Any]:
    """One local cluster of two processors for all tests that ask for it: starting one takes seconds."""
    from dataengine.parallel.cluster import connected

    with connected(2, None) as ray:
        yield ray
