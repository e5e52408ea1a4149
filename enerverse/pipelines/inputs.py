"""The door of the world pipeline: everything a user hands in is checked here and turned into tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from enerverse.data.actions import at_rest
from enerverse.data.clips import gripper_start
from enerverse.pipelines.arrays import as_tensor, check_counts, check_generator, check_guidance
from enerverse.pipelines.cameras import read_cameras

if TYPE_CHECKING:
    from enerverse.pipelines.world import EnerVersePipeline


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Checked inputs: latents [B, V, n, C, h, w], text [B, E], cameras [B, V, ..], rays; the plan, where actions were
    given; the gripper's commanded position [B, 3], where the model is to plan from it."""

    latents: Tensor
    texts: list[str]
    text: Tensor
    intrinsics: Tensor
    camera_to_world: Tensor
    rays: Tensor
    grid: tuple[int, int]
    actions: Tensor | None = None
    path: Tensor | None = None
    gripper: Tensor | None = None

    def plan(self, start: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Actions and path maps of frames start .. start + count, resting past their end; None without
        actions."""
        if self.actions is None or self.path is None:
            return None
        return self.actions[:, start : start + count], self.path[:, :, start : start + count]


def check_options(
    output_type: Any, num_frames: Any, num_inference_steps: Any, guidance_scale: Any, generator: Any
) -> None:
    """Raise ValueError, naming it, for an option of the world pipeline that is none."""
    if output_type not in ("pt", "np", "latent"):
        raise ValueError(
            f"output_type: expected 'pt', 'np' or 'latent', got {output_type!r}; choose one of them"
        )
    check_counts(num_frames=num_frames, num_inference_steps=num_inference_steps)
    check_guidance(guidance_scale)
    check_generator(generator)


def read_images(images: Any, views: tuple[str, ...], size: int) -> Tensor:
    """Frames as float [B, n, V, 3, P, P] in [0, 1]; accepts uint8 channels-last and a missing batch axis."""
    expected = f"[B, n, {len(views)}, 3, {size}, {size}]"
    frames = as_tensor(images, "images", expected)
    if frames.dtype == torch.uint8:
        if frames.ndim > 2 and frames.shape[-1] == 3 and frames.shape[-3] != 3:
            frames = frames.movedim(-1, -3)
        frames = frames.float() / 255
    elif frames.ndim > 4 and frames.shape[-1] == 3 and frames.shape[-3] != 3:
        raise ValueError(
            f"images: expected {expected}, got {frames.dtype} {list(frames.shape)}; pass uint8 pictures, or move the "
            "channels before the pixels and scale to [0, 1]"
        )
    frames = frames[None] if frames.ndim == 5 else frames
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


def read_actions(actions: Any, name: str, batch: int, steps: int | None, width: int) -> Tensor:
    """Actions [B, T, A] in [-1, 1] as float32."""
    values = as_tensor(actions, name, f"[{batch}, {steps}, {width}]").float()
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
    values = as_tensor(state, "state", f"[{batch}, S]").float()
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or len(values) != batch or values.shape[1] < width:
        raise ValueError(
            f"state: expected [{batch}, S] with S of at least {width}, got {list(values.shape)}; "
            "pass the state of the last observed frame"
        )
    if not torch.isfinite(values).all():
        raise ValueError("state: expected finite values, got NaN or infinity; check the sensors")
    return values


def check_plan(pipe: EnerVersePipeline) -> None:
    """ValueError where the world model has no plan, and so cannot choose actions."""
    if pipe.unet.plan is None:
        raise ValueError(
            "plan: expected a world model that plans actions (UNetConfig.plan_tokens above 0), got one without a plan; "
            "give the actions, or leave the state out and imagine from the instruction alone"
        )


def _read_latents(pipe: EnerVersePipeline, images: Any, views: tuple[str, ...], size: int) -> Tensor:
    """Latents [B, V, n, C, h, w] of pictures; latents [B, n, V, C, h, w] encoded before pass through."""
    encoded = (len(views), pipe.unet.config.channels, pipe.unet.config.grid, pipe.unet.config.grid)
    if isinstance(images, Tensor) and images.ndim == 6 and tuple(images.shape[2:]) == encoded:
        return images.to(pipe.device).float().transpose(1, 2)
    frames = read_images(images, views, size).to(pipe.device)
    return pipe.autoencoder.encode(frames).transpose(1, 2).float()


def read_instruction(instruction: Any, count: int) -> list[str]:
    """One text per episode; a single one stands for all."""
    texts = [instruction] if isinstance(instruction, str) else instruction
    wrong = (
        [text for text in texts if not isinstance(text, str)] if isinstance(texts, (list, tuple)) else [texts]
    )
    if wrong:
        raise ValueError(
            f"instruction: expected text, or a list of one per episode, got {type(wrong[0]).__name__}; say what "
            "the robot shall do"
        )
    texts = list(texts) * (count if isinstance(instruction, str) else 1)
    if len(texts) != count:
        raise ValueError(
            f"instruction: expected one per episode ({count}), got {len(texts)}; one text stands for all"
        )
    return texts


def read_observation(
    pipe: EnerVersePipeline,
    images: Any,
    instruction: Any,
    cameras: Any,
    actions: Any,
    state: Any,
    num_frames: int,
) -> Observation:
    """Check and encode everything that `EnerVersePipeline` was given."""
    views, size = tuple(pipe.config.views), pipe.config.image_size
    latents = _read_latents(pipe, images, views, size)
    texts = read_instruction(instruction, len(latents))
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
    return seen if actions is None and state is None else _add_body(pipe, seen, actions, state, num_frames)


def _add_body(
    pipe: EnerVersePipeline, seen: Observation, actions: Any, state: Any, num_frames: int
) -> Observation:
    """The observation with actions, resting until the last chunk ends, and the path that they trace; without actions,
    with the gripper's position to plan from."""
    if state is None:
        raise ValueError(
            "state: expected proprioception [B, S] beside actions, got None; pass the last observed state"
        )
    count, width = len(seen.texts), pipe.unet.config.action_dim
    body = read_state(state, count, pipe.config.command + 3).to(pipe.device)
    gripper = gripper_start(body, pipe.clip_config)
    if actions is None:
        check_plan(pipe)
        return replace(seen, gripper=gripper)
    moves = read_actions(actions, "actions", count, num_frames, width)
    spare = -moves.shape[1] % pipe.unet.config.chunk
    moves = torch.cat([moves, at_rest(moves[:, -1:]).repeat(1, spare, 1)], 1).to(pipe.device)
    return replace(seen, actions=moves, path=pipe.draw_path(seen, moves, gripper)[1])
