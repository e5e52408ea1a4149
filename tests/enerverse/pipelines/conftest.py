"""A small policy, and what an environment would show it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from enerverse.pipelines import EnerVersePolicy

VIEWS = ("front", "top")


@pytest.fixture
def make_policy(make_unet, make_autoencoder, make_head, make_pipe):
    """A policy of untrained parts; keyword arguments override the settings of its head."""

    def make(settings: dict[str, Any] | None = None, **changes: Any) -> EnerVersePolicy:
        head, world = make_head(**changes), changes.get("world", "tokens") is not None
        text = make_pipe().text_encoder if world else None
        parts = (make_autoencoder(), make_unet() if world else None, text, head)
        return EnerVersePolicy(*parts, views=VIEWS, image_size=16, **(settings or {}))

    return make


@pytest.fixture
def watch(pictures, cameras):
    """What an environment shows at step `t` of episode `row`: an observation and its info."""
    eight_bit = (pictures * 255).byte().permute(0, 1, 2, 4, 5, 3).numpy()
    poses = {
        view: {"intrinsics": cameras[0][i], "camera_to_world": cameras[1][i]} for i, view in enumerate(VIEWS)
    }

    def look(t: int, row: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
        images = {view: eight_bit[row, t % 5, i] for i, view in enumerate(VIEWS)}
        state = np.sin(np.arange(11) + t + 10 * row)
        return {"images": images, "state": state}, {"task": f"task {row}", "cameras": poses}

    return look


@pytest.fixture
def play(watch) -> Callable[..., np.ndarray]:
    """The actions [T, A] of a policy over the first `steps` steps of episode `row`."""

    def run(policy: EnerVersePolicy, steps: int, row: int = 0, key: Any = 0) -> np.ndarray:
        return np.stack([policy.select_action(*watch(t, row), key) for t in range(steps)])

    return run
