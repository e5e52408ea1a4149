"""The world model as a generator of the data engine: rendered views, half noised, imagined again beside the real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dataengine.cameras import Cameras
from dataengine.digests import digest, digest_generator, digest_weights
from dataengine.generators import ConstantFill, Generator, Renders, Repaired
from dataengine.views import Views, join_cameras
from enerverse.diffusion import denoise, draw_noise, make_objective, scheduler_times
from enerverse.memory import push_chunk, read_context, start_memory
from enerverse.model import Conditions

if TYPE_CHECKING:
    from enerverse.pipelines.world import EnerVersePipeline


class WorldRepairer:
    """SDEdit (arXiv 2108.01073) with a world model, view by view beside the real views nearest to it.

    Renders are mended roughly by another generator first, for a world model continues what it is shown and would keep
    holes. From the second frame on they are then noised to a share of the way and denoised chunk by chunk, conditioned on
    the frames before, on the cameras' rays and, through attention over views, on the real pictures of the same frames,
    which stand clean beside them at every noise level (as in RePaint, arXiv 2201.09865).

    Args:
        pipeline: the world model; it should have been trained on cameras all around, not on three places alone.
        first: what mends the renders before.
        strength: share of the noise, 0 (nothing is changed) to 1 (imagined anew).
        steps: of the whole walk from pure noise, of which `strength` are taken.
        seed: of the noise.
    """

    name = "world"

    def __init__(
        self,
        pipeline: EnerVersePipeline,
        first: Generator | None = None,
        *,
        strength: float = 0.2,
        steps: int = 10,
        seed: int = 0,
    ):
        if not 0 <= strength <= 1 or steps < 1:
            raise ValueError(
                f"strength, steps: expected a share from 0 to 1 and at least 1 step, got {strength} and {steps}"
            )
        self.pipeline, self.first = pipeline, first or ConstantFill()
        self.strength, self.steps, self.seed = strength, steps, seed

    @property
    def digest(self) -> str:
        """Tells this one from others of the same name."""
        first = (self.first.name, digest_generator(self.first))
        weights = [digest_weights(part) for part in (self.pipeline.unet, self.pipeline.autoencoder)]
        return digest(*first, *weights, self.strength, self.steps, self.seed)

    @torch.no_grad()
    def repair(self, renders: Renders, references: Views, anchors: Views | None) -> Repaired:
        """Repair `renders`; depth and confidence are those of the generator before."""
        mended = self.first.repair(renders, references, anchors)
        taken = round(self.strength * self.steps)
        if taken == 0 or len(mended.images) < 2:
            return mended
        if renders.cameras is None:
            raise ValueError(
                "renders: expected their cameras, got none; make them with dataengine.flywheel.look"
            )
        cameras = renders.cameras
        images = mended.images.clone()
        for view in range(images.shape[1]):
            own = cameras.select([cameras.names[view]])
            beside = nearest(own, references.cameras, max(1, len(self.pipeline.config.views) - 1))
            shown = torch.cat([references.select(beside).images, images[:, view : view + 1]], 1)
            joined = join_cameras(references.cameras.select(beside), own)
            images[:, view] = self._imagine(shown, joined, taken)[:, -1]
        return replace(mended, images=images)

    def _imagine(self, shown: Tensor, cameras: Cameras, taken: int) -> Tensor:
        """Pictures ``[T, V, H, W, 3]`` with the last view imagined again from the second frame on."""
        pipe, size = self.pipeline, self.pipeline.config.image_size
        small = _resize(shown, (size, size)).to(pipe.device)
        latents = pipe.autoencoder.encode(small.movedim(-1, -3)[None]).transpose(1, 2).float()
        sized = cameras.scaled_to(size, size).at(0)
        intrinsics, poses = (
            torch.from_numpy(x).float()[None].to(pipe.device)
            for x in (sized.intrinsics, sized.camera_to_world)
        )
        rays = pipe.draw_rays(intrinsics, poses, (latents.shape[-2], latents.shape[-1]))
        policy, done = pipe.make_memory(), latents[:, :, :1]
        past = start_memory(policy, done)
        text = pipe.text_encoder([""])
        for start in range(1, latents.shape[2], pipe.unet.config.chunk):
            target = latents[:, :, start : start + pipe.unet.config.chunk]
            chunk = self._chunk(target, read_context(policy, past), rays, text * 0, taken)
            past = push_chunk(policy, past, chunk)
            done = torch.cat([done, chunk], 2)
        # What the autoencoder cannot hold stays: the pictures get the difference between the decoded latents alone.
        before, after = (
            pipe.autoencoder.decode(x[0, -1:].transpose(0, 1)).cpu().movedim(-3, -1) for x in (latents, done)
        )
        difference = _resize(after - before, (shown.shape[2], shown.shape[3]))[1:, 0]
        repaired = shown.clone()
        repaired[1:, -1] = (repaired[1:, -1] + difference).clamp(0, 1)
        return repaired

    def _chunk(
        self, target: Tensor, context: tuple[Tensor, Tensor], rays: Tensor, text: Tensor, taken: int
    ) -> Tensor:
        """Latents ``[1, V, m, C, h, w]`` of a chunk; all views but the last stay as in `target`."""
        pipe, frames = self.pipeline, target.shape[2]
        memory, offsets = context
        target = torch.cat(
            [target, target[:, :, -1:].expand(-1, -1, pipe.unet.config.chunk - frames, -1, -1, -1)], 2
        )
        reference = memory[:, :, -1:] if pipe.config.residual else torch.zeros_like(memory[:, :, -1:])
        clean = (target - reference) / pipe.config.residual_scale
        objective = make_objective(pipe.config.objective)
        times = scheduler_times(pipe.scheduler, self.steps, target.device)
        noise = draw_noise(tuple(target.shape), torch.Generator().manual_seed(self.seed)).to(target)
        told = Conditions(memory, offsets[None], rays, text)
        begin = self.steps - taken

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            with torch.autocast(pipe.device.type, torch.bfloat16, enabled=pipe.config.mixed_precision):
                return pipe.unet(noisy, time, told).float()

        def keep_real(index: int, time: Tensor, sample: Tensor) -> Tensor:
            last = index + 1 == len(times)
            real = clean if last else objective.corrupt(clean, noise, times[index + 1].expand(1).float())
            return torch.cat([real[:, :-1], sample[:, -1:]], 1)

        noisy = objective.corrupt(clean, noise, times[begin].expand(1).float())
        found = denoise(predict, noisy, objective, pipe.scheduler, self.steps, keep_real, start=begin)
        return (found * pipe.config.residual_scale + reference)[:, :, :frames]


def nearest(camera: Cameras, others: Cameras, count: int) -> list[str]:
    """Names of the `count` cameras that look in the directions nearest to that of `camera`, at the first frame."""
    own, axes = (x.at(0).camera_to_world[:, :3, 2] for x in (camera, others))
    order = (-axes @ own[0]).argsort(kind="stable")
    return [others.names[index] for index in order[:count]]


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures ``[T, V, H, W, 3]`` at `size`."""
    if tuple(images.shape[2:4]) == size:
        return images
    flat = images.flatten(0, 1).movedim(-1, 1)
    scaled = F.interpolate(flat, size=size, mode="bilinear", antialias=True, align_corners=False)
    return scaled.movedim(1, -1).unflatten(0, images.shape[:2])
