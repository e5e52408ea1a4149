"""The door of the policy: what environments show, checked whole before anything of it is remembered."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enerverse.pipelines.arrays import as_tensor
from enerverse.pipelines.cameras import read_cameras
from enerverse.pipelines.inputs import read_images
from enerverse.policy import PolicyConfig


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What one environment shows: state [S], its instruction and, where the policy uses them, pictures
    [1, 1, V, 3, P, P] in [0, 1], intrinsics [1, V, 3, 3] with camera_to_world [1, V, 4, 4], privileged [1, S']."""

    state: Tensor
    task: str
    pictures: Tensor | None = None
    cameras: tuple[Tensor, Tensor] | None = None
    privileged: Tensor | None = None


def check_episodes(observations: Sequence[Any], infos: Sequence[Any], keys: Sequence[Hashable]) -> None:
    """Raise ValueError unless there is one observation and one info per key, and no key twice."""
    if not len(keys):
        raise ValueError("keys: expected at least one episode, got none; give one key per environment")
    for name, values in (("observations", observations), ("infos", infos)):
        if len(values) != len(keys):
            raise ValueError(f"{name}: expected one per key ({len(keys)}), got {len(values)}; give one each")
    twice = [key for index, key in enumerate(keys) if key in keys[:index]]
    if twice:
        raise ValueError(
            f"keys: expected every key once, got {twice[0]!r} twice; give each environment its own"
        )


def read_shown(observation: Any, info: Any, config: PolicyConfig, views: tuple[str, ...], size: int) -> Shown:
    """Check what a policy of `config` reads of one observation and its info; ValueError in one sentence."""
    for name, value in (("observation", observation), ("info", info)):
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{name}: expected a mapping, got {type(value).__name__}; pass what env.reset and env.step return"
            )
    sees = config.latents or config.pixels or config.world
    return Shown(
        state=_read_vector(observation, "observation", "state", config.state_dim),
        task=_read_task(info),
        pictures=_read_pictures(observation, views, size) if sees else None,
        cameras=_read_cameras(info, views, size) if config.world else None,
        privileged=_read_vector(info, "info", "privileged", config.privileged)[None]
        if config.privileged
        else None,
    )


def _read_vector(values: Mapping[str, Any], name: str, key: str, width: int) -> Tensor:
    place = f"{name}[{key!r}]"
    if key not in values:
        raise ValueError(
            f"{place}: expected [{width}], got the keys {tuple(values)}; pass on what the environment returned"
        )
    vector = as_tensor(values[key], place, f"[{width}]").float()
    if vector.shape != (width,):
        raise ValueError(
            f"{place}: expected [{width}], got {list(vector.shape)}; use the environment that the policy was "
            "trained for"
        )
    if not torch.isfinite(vector).all():
        raise ValueError(f"{place}: expected finite values, got NaN or infinity; check the sensors")
    return vector


def _read_task(info: Mapping[str, Any]) -> str:
    if "task" not in info:
        raise ValueError(
            f"info['task']: expected the instruction, got the keys {tuple(info)}; add it, as in "
            "info | {'task': 'lift the red cube'}"
        )
    return str(info["task"])


def _read_pictures(observation: Mapping[str, Any], views: tuple[str, ...], size: int) -> Tensor:
    images = observation.get("images", {})
    missing = [view for view in views if view not in images]
    if missing:
        raise ValueError(
            f"observation: expected an image of the view {missing[0]!r}, got {tuple(images)}; add that camera"
        )
    shapes = {view: np.shape(images[view]) for view in views}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"observation['images']: expected views of one size, got {shapes}; make the environment with "
            f"image_size={size}"
        )
    return read_images(np.stack([images[view] for view in views])[None, None], views, size)


def _read_cameras(info: Mapping[str, Any], views: tuple[str, ...], size: int) -> tuple[Tensor, Tensor]:
    cameras = info.get("cameras", {})
    if isinstance(cameras, Mapping) and any(view not in cameras for view in views):
        raise ValueError(
            f"info['cameras']: expected the views {views}, got {tuple(cameras)}; make the environment with "
            f"cameras={views}"
        )
    return read_cameras(cameras, views, size, 1, "info['cameras']")
