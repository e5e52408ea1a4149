"""The door of the world pipeline: everything a user hands in is checked here and turned into tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataengine.cameras import Cameras

if TYPE_CHECKING:
    from enerverse.pipelines.world import EnerVersePipeline


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Checked inputs: latents [B, V, n, C, h, w], text [B, E], cameras [B, V, ..], rays, and the plan if
    any."""

    latents: Tensor
    texts: list[str]
    text: Tensor
    intrinsics: Tensor
    camera_to_world: Tensor
    rays: Tensor
    grid: tuple[int, int]
    actions: Tensor | None = None
    path: Tensor | None = None

    def plan(self, start: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Actions and path maps of frames start .. start + count, resting past their end; None without
        actions."""
        if self.actions is None or self.path is None:
            return None
        return self.actions[:, start : start + count], self.path[:, :, start : start + count]


def read_images(images: Any, views: tuple[str, ...], size: int) -> Tensor:
    """Frames as float [B, n, V, 3, P, P] in [0, 1]; accepts uint8 channels-last and a missing batch axis."""
    frames = torch.as_tensor(np.asarray(images) if not isinstance(images, Tensor) else images)
    if frames.dtype == torch.uint8:
        if frames.shape[-1] == 3 and frames.shape[-3] != 3:
            frames = frames.movedim(-1, -3)
        frames = frames.float() / 255
    frames = frames[None] if frames.ndim == 5 else frames
    expected = f"[B, n, {len(views)}, 3, {size}, {size}]"
    if frames.ndim != 6 or frames.shape[3] != 3:
        raise ValueError(
            f"images: expected {expected}, got {list(frames.shape)}; stack time, then views {views}"
        )
    if frames.shape[2] != len(views):
        raise ValueError(
            f"images: expected {len(views)} views {views}, got {frames.shape[2]}; give them in this order"
        )
    if tuple(frames.shape[-2:]) != (size, size):
        raise ValueError(
            f"images: expected {size} x {size} pixels, got {frames.shape[-2]} x {frames.shape[-1]}; "
            "resize them"
        )
    if frames.shape[1] < 1:
        raise ValueError(
            "images: expected at least one observed frame, got none; give the frames seen so far"
        )
    if not torch.isfinite(frames).all() or frames.min() < 0 or frames.max() > 1:
        raise ValueError("images: expected finite values in [0, 1], got others; divide 8-bit images by 255")
    return frames.float()


def read_cameras(cameras: Any, views: tuple[str, ...], size: int, batch: int) -> tuple[Tensor, Tensor]:
    """Intrinsics [B, V, 3, 3] and rigid camera-to-world matrices [B, V, 4, 4]."""
    if isinstance(cameras, Cameras):
        missing = [view for view in views if view not in cameras.names]
        if missing:
            raise ValueError(
                f"cameras: expected the views {views}, got {cameras.names} without {missing[0]!r}"
            )
        chosen = cameras.select(views).scaled_to(size, size)
        intrinsics, poses = torch.as_tensor(chosen.intrinsics), torch.as_tensor(chosen.camera_to_world)
    else:
        intrinsics, poses = (torch.as_tensor(np.asarray(part)) for part in cameras)
    intrinsics, poses = intrinsics.float(), poses.float()
    if intrinsics.shape[-3:] != (len(views), 3, 3) or poses.shape[-3:] != (len(views), 4, 4):
        raise ValueError(
            f"cameras: expected intrinsics [{len(views)}, 3, 3] and camera_to_world [{len(views)}, 4, 4], "
            f"got {list(intrinsics.shape)} and {list(poses.shape)}"
        )
    for name, part in (("intrinsics", intrinsics), ("camera_to_world", poses)):
        if part.ndim > 4 or (part.ndim == 4 and len(part) not in (1, batch)):
            raise ValueError(
                f"cameras: expected {name} of one moment for {batch} episodes, got {list(part.shape)}; "
                "give the cameras of the last observed frame"
            )
    _check_intrinsics(intrinsics, views)
    _check_rigid(poses, views)
    return intrinsics.expand(batch, -1, -1, -1), poses.expand(batch, -1, -1, -1)


def _check_intrinsics(intrinsics: Tensor, views: tuple[str, ...]) -> None:
    focal = intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2]
    bad = ~torch.isfinite(intrinsics).all(-1).all(-1) | (focal <= 0).any(-1)
    if bad.any():
        raise ValueError(
            f"cameras: expected finite intrinsics with positive focal lengths in pixels for "
            f"{_first_view(bad, views)!r}, got another matrix"
        )


def _first_view(bad: Tensor, views: tuple[str, ...]) -> str:
    return views[int(bad.reshape(-1, len(views)).any(0).float().argmax())]


def _check_rigid(poses: Tensor, views: tuple[str, ...]) -> None:
    rotation = poses[..., :3, :3]
    error = (rotation.transpose(-1, -2) @ rotation - torch.eye(3)).abs().amax((-1, -2))
    bad = (
        (error > 1e-3)
        | ((torch.linalg.det(rotation) - 1).abs() > 1e-3)
        | ((poses[..., 3, :] - torch.tensor([0.0, 0.0, 0.0, 1.0])).abs() > 1e-3).any(-1)
        | ~torch.isfinite(poses).all(-1).all(-1)
    )
    if bad.any():
        raise ValueError(
            "cameras: expected a rigid camera_to_world (rotation, determinant +1) for "
            f"{_first_view(bad, views)!r}, got another matrix"
        )


def read_actions(actions: Any, name: str, batch: int, steps: int | None, width: int) -> Tensor:
    """Actions [B, T, A] in [-1, 1] as float32."""
    values = torch.as_tensor(np.asarray(actions) if not isinstance(actions, Tensor) else actions).float()
    values = values[None] if values.ndim == 2 else values
    wrong = values.ndim != 3 or values.shape[-1] != width or len(values) != batch
    if wrong or (steps is not None and values.shape[1] < steps):
        raise ValueError(
            f"{name}: expected [{batch}, {steps}, {width}], got {list(values.shape)}; one action per frame"
        )
    if not torch.isfinite(values).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity; check what produced them")
    if values.abs().max() > 1 + 1e-6:
        raise ValueError(
            f"{name}: expected values in [-1, 1], got {float(values.abs().max()):.3g}; normalise or clip them"
        )
    return values


def read_state(state: Any, batch: int, width: int) -> Tensor:
    """Proprioception [B, S] of at least `width` finite entries; B may be left out for one episode."""
    values = torch.as_tensor(np.asarray(state) if not isinstance(state, Tensor) else state).float()
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != batch or values.shape[1] < width:
        raise ValueError(
            f"state: expected [{batch}, S] with S of at least {width}, got {list(values.shape)}; "
            "pass the state of the last observed frame"
        )
    if not torch.isfinite(values).all():
        raise ValueError("state: expected finite values, got NaN or infinity; check the sensors")
    return values


def check_counts(**counts: int) -> None:
    """Raise ValueError, naming it, for a count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


def _read_latents(pipe: EnerVersePipeline, images: Any, views: tuple[str, ...], size: int) -> Tensor:
    """Latents [B, V, n, C, h, w] of pictures; latents [B, n, V, C, h, w] encoded before pass through."""
    encoded = (len(views), pipe.unet.config.channels, pipe.unet.config.grid, pipe.unet.config.grid)
    if isinstance(images, Tensor) and images.ndim == 6 and tuple(images.shape[2:]) == encoded:
        return images.to(pipe.device).float().transpose(1, 2)
    frames = read_images(images, views, size).to(pipe.device)
    return pipe.autoencoder.encode(frames).transpose(1, 2).float()


def read_observation(
    pipe: EnerVersePipeline,
    images: Any,
    instruction: str | list[str],
    cameras: Any,
    actions: Any,
    state: Any,
    num_frames: int,
) -> Observation:
    """Check and encode everything that `EnerVersePipeline` was given."""
    views, size = tuple(pipe.config.views), pipe.config.image_size
    latents = _read_latents(pipe, images, views, size)
    texts = [instruction] * len(latents) if isinstance(instruction, str) else list(instruction)
    if len(texts) != len(latents):
        raise ValueError(f"instruction: expected one per episode ({len(latents)}), got {len(texts)}")
    intrinsics, poses = (part.to(pipe.device) for part in read_cameras(cameras, views, size, len(latents)))
    grid = (latents.shape[-2], latents.shape[-1])
    seen = Observation(
        latents=latents,
        texts=texts,
        text=pipe.text_encoder(texts),
        intrinsics=intrinsics,
        camera_to_world=poses,
        rays=pipe.draw_rays(intrinsics, poses, grid),
        grid=grid,
    )
    if actions is None:
        return seen
    if state is None:
        raise ValueError(
            "state: expected proprioception [B, S] beside actions, got None; pass the last observed state"
        )
    chunk = pipe.unet.config.chunk
    moves = read_actions(actions, "actions", len(latents), num_frames, pipe.unet.config.action_dim).to(
        pipe.device
    )
    resting = torch.zeros_like(moves[:, -1:]).repeat(1, -moves.shape[1] % chunk, 1)
    resting[..., -1] = moves[:, -1:, -1]
    moves = torch.cat([moves, resting], 1)
    body = read_state(state, len(latents), pipe.config.command + 3).to(pipe.device)
    told, path = pipe.draw_plan(seen, moves, body)
    return replace(seen, actions=told, path=path)
