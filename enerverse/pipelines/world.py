"""EnerVerse-G: imagine several camera views chunk by chunk, with sparse memory, for as long as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from enerverse.data.clips import ClipConfig
from enerverse.diffusion import Generators, denoise, draw_noise, make_objective
from enerverse.memory import MemoryPolicy, MemoryState, make_memory, push_chunk, read_context, start_memory
from enerverse.model import Conditions
from enerverse.pipelines.inputs import Observation, check_options, check_plan, read_observation
from enerverse.pipelines.saving import SavedPipeline
from enerverse.views import commanded_path, path_map, ray_map
from sparse_core import share_masks


@dataclass(frozen=True)
class Imagination:
    """What the pipeline returns: frames after the last observed one.

    frames [B, T, V, 3, P, P] in [0, 1] (or uint8 arrays [B, T, V, P, P, 3], or latents [B, V, T, C, h, w]);
    ended [B]: number of frames before the end-of-task frame, -1 where the task was not seen to end; memory:
    what was seen up to the last frame returned, to go on from with `imagine_chunk`; actions [B, T, A]: those that
    lead through the frames, given or planned by the model, None where it imagined without.
    """

    frames: Any
    ended: Tensor
    memory: MemoryState
    actions: Tensor | None = None


class EnerVersePipeline(SavedPipeline):
    """World model as a diffusers pipeline: autoencoder, video UNet, instruction encoder, scheduler."""

    def __init__(
        self,
        autoencoder: Any,
        unet: Any,
        text_encoder: Any,
        scheduler: Any,
        views: tuple[str, ...] = ("front", "left", "top"),
        image_size: int = 64,
        fps: float = 10.0,
        objective: str = "flow_x0",
        residual: bool = True,
        residual_scale: float = 1.0,
        memory_policy: str = "sparse_uniform",
        recent: int = 2,
        end_threshold: float = 0.13,
        action_scale: tuple[float, ...] = (0.016, 0.016, 0.016),
        command: int = 8,
        mixed_precision: bool = True,
    ):
        super().__init__()
        self.register_modules(
            autoencoder=autoencoder, unet=unet, text_encoder=text_encoder, scheduler=scheduler
        )
        self.register_to_config(
            views=tuple(views),
            image_size=image_size,
            fps=fps,
            objective=objective,
            residual=residual,
            residual_scale=residual_scale,
            memory_policy=memory_policy,
            recent=recent,
            end_threshold=end_threshold,
            action_scale=tuple(action_scale),
            command=command,
            mixed_precision=mixed_precision,
        )

    @property
    def clip_config(self) -> ClipConfig:
        """The window this model was trained on."""
        return ClipConfig(
            memory=self.unet.config.memory,
            chunk=self.unet.config.chunk,
            recent=self.config.recent,
            action_scale=tuple(self.config.action_scale),
            command=self.config.command,
        )

    def make_memory(self, name: str | None = None) -> MemoryPolicy:
        """The memory policy `name` (default: the checkpoint's) with this model's number of slots."""
        name = str(name or self.config.memory_policy)
        options = {
            "sparse_uniform": {"recent": self.config.recent},
            "fifo": {"chunk": self.unet.config.chunk},
        }
        return make_memory(name, slots=self.unet.config.memory, **options.get(name, {}))

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        instruction: str | list[str],
        cameras: Any,
        *,
        num_frames: int = 8,
        actions: Any = None,
        state: Any = None,
        memory: str | None = None,
        num_inference_steps: int = 5,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        output_type: str = "pt",
        stop_at_end: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
    ) -> Imagination:
        """Imagine `num_frames` frames after the observed ones, chunk by chunk.

        images: observed frames [B, n, V, 3, P, P] in [0, 1], uint8 [B, n, V, P, P, 3] (B may be left out) or latents
        [B, n, V, C, h, w]; cameras: `info["cameras"]`, `dataengine.cameras.Cameras` or a pair of intrinsics [V, 3, 3]
        and camera_to_world [V, 4, 4]; actions [B, num_frames, A] in [-1, 1] with proprioception `state` [B, S] at the
        last observed frame turn imagination into simulation; with the state alone the model plans the actions itself,
        chunk by chunk, and simulates those (guidance reaches the pictures, not the plan); generator: one, or a list of
        one per episode. Raises ValueError, in one sentence, for wrong shapes, values or names."""
        check_options(output_type, num_frames, num_inference_steps, guidance_scale, generator)
        policy, size = self.make_memory(memory), self.unet.config.chunk
        seen = read_observation(self, images, instruction, cameras, actions, state, num_frames)
        past, chunks, moves = start_memory(policy, seen.latents), [], []
        ended = torch.full((len(seen.texts),), -1)
        for start in self.progress_bar(range(0, num_frames, size)):
            told, seen = self._choose_moves(seen, past, policy, start, generator)
            chunk, past = self.imagine_chunk(
                past, policy, seen.rays, seen.text, told, num_inference_steps, guidance_scale,
                generator, callback_on_step_end, num_frames - start,
            )  # fmt: skip
            ended = torch.where(ended < 0, self.find_end(chunk, start), ended)
            chunks.append(chunk)
            moves += [] if told is None else [told[0][:, : chunk.shape[2]]]
            if stop_at_end and bool((ended >= 0).all()):
                break
        frames = self.read_out(torch.cat(chunks, 2), output_type)
        return Imagination(frames, ended, past, torch.cat(moves, 1) if moves else None)

    @torch.no_grad()
    def imagine_chunk(
        self,
        past: MemoryState,
        policy: MemoryPolicy,
        rays: Tensor,
        text: Tensor,
        plan: tuple[Tensor, Tensor] | None = None,
        steps: int = 5,
        guidance: float = 1.0,
        generator: Generators = None,
        on_step: Callable[..., dict[str, Tensor]] | None = None,
        keep: int | None = None,
    ) -> tuple[Tensor, MemoryState]:
        """One chunk of M frames [B, V, M, C, h, w], or its first `keep` where those are fewer, and the memory that has
        seen them. Cost does not depend on the past."""
        context, offsets = read_context(policy, past)
        actions, path = plan if plan is not None else (None, None)
        told = Conditions(context, offsets[None], rays, text, actions, path)
        free = Conditions(context, offsets[None], rays, torch.zeros_like(text), actions, path)
        shape = (*context.shape[:2], self.unet.config.chunk, *context.shape[3:])
        noise = draw_noise(shape, generator).to(context)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.mixed_precision):
                prediction = self.unet(noisy, time, told).float()
                if guidance == 1.0:
                    return prediction
                base = self.unet(noisy, time, free).float()
            return base + guidance * (prediction - base)

        def report(index: int, time: Tensor, sample: Tensor) -> Tensor:
            shared.step = index + 1
            changed = on_step(self, index, time, {"latents": sample}) if on_step is not None else None
            return changed.pop("latents", sample) if changed else sample

        with share_masks(self.unet.config.mask_steps, self.unet.config.dense_steps) as shared:
            clean = denoise(
                predict, noise, make_objective(self.config.objective), self.scheduler, steps, report
            )
        reference = context[:, :, -1:] if self.config.residual else 0.0
        chunk = (clean * self.config.residual_scale + reference)[:, :, :keep]
        return chunk, push_chunk(policy, past, chunk)

    @torch.no_grad()
    def plan_actions(
        self,
        past: MemoryState,
        policy: MemoryPolicy,
        rays: Tensor,
        text: Tensor,
        generator: Generators = None,
    ) -> Tensor:
        """The actions [B, M, A] in [-1, 1] that the UNet's plan would take next, from one pass down at pure noise."""
        check_plan(self)
        context, offsets = read_context(policy, past)
        shape = (*context.shape[:2], self.unet.config.chunk, *context.shape[3:])
        noise, time = (
            draw_noise(shape, generator).to(context),
            torch.ones(len(context), device=context.device),
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.mixed_precision):
            tokens, _ = self.unet.plan(
                self.unet.features(noise, time, Conditions(context, offsets[None], rays, text))
            )
            return self.unet.plan.actions(tokens).float().clamp(-1, 1)

    def _choose_moves(
        self, seen: Observation, past: MemoryState, policy: MemoryPolicy, start: int, generator: Generators
    ) -> tuple[tuple[Tensor, Tensor] | None, Observation]:
        """Actions and path maps of the chunk at `start`, told or planned, None without either; and the observation, in
        which the gripper has gone where the plan sends it."""
        if seen.gripper is None:
            return seen.plan(start, self.unet.config.chunk), seen
        actions = self.plan_actions(past, policy, seen.rays, seen.text, generator)
        path, pictures = self.draw_path(seen, actions, seen.gripper)
        return (actions, pictures), replace(seen, gripper=path[:, -1])

    @torch.no_grad()
    def stream(
        self,
        images: Any,
        instruction: str | list[str],
        cameras: Any,
        *,
        state: Any = None,
        memory: str | None = None,
        num_inference_steps: int = 5,
        guidance_scale: float = 1.0,
        generator: Generators = None,
    ) -> Iterator[Tensor]:
        """Chunks of frames [B, M, V, 3, P, P], without end and in constant memory; with proprioception `state` [B, S] by
        actions that the model plans."""
        check_options("pt", 1, num_inference_steps, guidance_scale, generator)
        policy = self.make_memory(memory)
        seen = read_observation(self, images, instruction, cameras, None, state, 0)
        past = start_memory(policy, seen.latents)
        while True:
            told, seen = self._choose_moves(seen, past, policy, 0, generator)
            chunk, past = self.imagine_chunk(
                past, policy, seen.rays, seen.text, told, num_inference_steps, guidance_scale, generator
            )
            yield self.read_out(chunk, "pt")

    def find_end(self, chunk: Tensor, start: int = 0) -> Tensor:
        """First frame [B] (counted from `start`) whose latents lie within `end_threshold` (mean L1) of the
        end-of-task latent, zero; -1 where none does.
        """
        near = chunk.abs().mean((1, 3, 4, 5)) < self.config.end_threshold
        first = near.float().argmax(1) + start
        return torch.where(near.any(1), first, -1).cpu()

    def read_out(self, latents: Tensor, output_type: str = "pt") -> Any:
        """Frames of latents [B, V, T, C, h, w] in the form that `output_type` names."""
        if output_type == "latent":
            return latents
        frames = torch.stack([self.autoencoder.decode(episode) for episode in latents.transpose(1, 2)])
        if output_type == "pt":
            return frames
        return (frames.permute(0, 1, 2, 4, 5, 3) * 255).round().byte().cpu().numpy()

    def draw_path(self, seen: Observation, actions: Tensor, gripper: Tensor) -> tuple[Tensor, Tensor]:
        """The positions [B, T, 3] that actions [B, T, A] send the gripper to from the commanded position `gripper`
        [B, 3], and the path maps [B, V, T, 4, h, w] of them."""
        scale = torch.tensor(self.config.action_scale, device=actions.device)
        path = commanded_path(gripper, actions, scale)
        size = (self.config.image_size, self.config.image_size)
        return path, path_map(path, actions[..., -1], seen.intrinsics, seen.camera_to_world, size, seen.grid)

    def draw_rays(self, intrinsics: Tensor, camera_to_world: Tensor, grid: tuple[int, int]) -> Tensor:
        """Ray maps [B, V, 6, h, w] of the cameras at latent resolution."""
        size = (self.config.image_size, self.config.image_size)
        return ray_map(intrinsics, camera_to_world, size, grid)

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """Diffusers' progress bar, silent for a single chunk."""
        config = getattr(self, "_progress_bar_config", {})
        quiet = iterable is not None and len(iterable) < 3
        return tqdm(iterable, total=total, **{"disable": quiet or None, **config})
