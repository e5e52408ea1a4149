"""EnerVerse-A: a policy that reads the world model's features and acts, a chunk of actions at a time."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from enerverse.diffusion import Generators
from enerverse.memory import MemoryState, make_memory, push_chunk, read_context, start_memory
from enerverse.pipelines.arrays import check_counts, check_generator
from enerverse.pipelines.observations import Shown, check_episodes, read_shown
from enerverse.pipelines.saving import SavedPipeline
from enerverse.policy import PolicyInputs, read_features
from enerverse.views import ray_map


@dataclass
class _Running:
    """What the policy holds for one running episode."""

    generator: torch.Generator
    memory: MemoryState | None = None
    latents: Tensor | None = None
    pictures: Tensor | None = None
    waiting: list[np.ndarray] = field(default_factory=list)


class EnerVersePolicy(SavedPipeline):
    """Autoencoder, world-model backbone and action head behind `select_action`.

    An observation is the environments' dictionary: `images` {view: uint8 [P, P, 3]}, `state` [S]; the
    instruction and the cameras come from `info` ("task", "cameras"). Episodes are told apart by a key, so one
    policy can drive many environments in lock-step with one network call.
    """

    _optional_components: ClassVar[list[str]] = ["autoencoder", "unet", "text_encoder"]

    def __init__(
        self,
        autoencoder: Any,
        unet: Any,
        text_encoder: Any,
        head: Any,
        views: tuple[str, ...] = ("front", "left", "top"),
        image_size: int = 64,
        recent: int = 2,
        memory_policy: str = "sparse_uniform",
        seed: int = 0,
        world: str | None = None,
        shared: tuple[str, ...] = (),
    ):
        super().__init__()
        self.register_modules(autoencoder=autoencoder, unet=unet, text_encoder=text_encoder, head=head)
        self.register_to_config(
            views=tuple(views),
            image_size=image_size,
            recent=recent,
            memory_policy=memory_policy,
            seed=seed,
            world=world,
            shared=tuple(shared),
        )
        slots = unet.config.memory if unet is not None else max(2, recent)
        options = {"recent": recent} if memory_policy == "sparse_uniform" else {}
        self._memory = make_memory(memory_policy, slots=slots, **options)
        self.reset()

    def reset(self, key: Hashable | None = None) -> None:
        """Forget one episode, or all of them."""
        if key is not None:
            self._running.pop(key, None)
            return
        self._running: dict[Hashable, _Running] = {}

    def _find(self, key: Hashable) -> _Running:
        """A copy of what is held for an episode, so that a refused call leaves the original as it was.

        The noise of a new episode depends on the seed and the key, not on which episodes run beside it.
        """
        if key in self._running:
            item = self._running[key]
            return replace(item, generator=item.generator.clone_state(), waiting=list(item.waiting))
        seed = zlib.crc32(f"{self.config.seed} {key!r}".encode())
        return _Running(torch.Generator().manual_seed(seed))

    def select_action(
        self,
        observation: dict[str, Any],
        info: dict[str, Any],
        key: Hashable = 0,
        *,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
    ) -> np.ndarray:
        """The next action [A] of one episode; see `select_actions`."""
        options: Any = {"generator": generator, "num_inference_steps": num_inference_steps}
        return self.select_actions([observation], [info], [key], **options)[0]

    def select_actions(
        self,
        observations: Sequence[dict[str, Any]],
        infos: Sequence[dict[str, Any]],
        keys: Sequence[Hashable],
        *,
        generator: Generators = None,
        num_inference_steps: int | None = None,
    ) -> list[np.ndarray]:
        """The next action [A] of every episode; the network runs once for all that have none left.

        Every frame shown counts once, whether or not it is decided on. generator: one, or a list of one per key, in
        place of the episodes' own noise; num_inference_steps: default what the policy was trained with. Raises
        ValueError, in one sentence, for bad input, of which nothing is remembered.
        """
        _check_options(generator, num_inference_steps, len(keys))
        shown = self._read(observations, infos, keys)
        after = self._look(shown, [self._find(key) for key in keys])
        empty = [i for i, item in enumerate(after) if not item.waiting]
        if empty:
            given = [generator[i] for i in empty] if isinstance(generator, list) else generator
            chosen = [shown[i] for i in empty], [after[i] for i in empty]
            chunks = self._predict(*chosen, given, num_inference_steps)
            for i, chunk in zip(empty, chunks, strict=True):
                after[i].waiting = list(chunk[: self.head.settings.execute])
        self._running.update(zip(keys, after, strict=True))
        return [item.waiting.pop(0) for item in after]

    def predict_action_chunk(
        self,
        observation: dict[str, Any],
        info: dict[str, Any],
        key: Hashable = 0,
        *,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
    ) -> np.ndarray:
        """The chunk of actions [M, A] that one episode would decide on now.

        It reads what `select_action` has remembered of the episode and changes nothing of it: the frame is not
        counted and no noise is used up, so asking twice gives the same chunk, and `select_action` goes on as if
        nobody had asked. Options and errors as there.
        """
        _check_options(generator, num_inference_steps, 1)
        shown = self._read([observation], [info], [key])
        after = self._look(shown, [self._find(key)])
        return self._predict(shown, after, generator, num_inference_steps)[0]

    def _read(
        self, observations: Sequence[Any], infos: Sequence[Any], keys: Sequence[Hashable]
    ) -> list[Shown]:
        check_episodes(observations, infos, keys)
        settings = (self.head.settings, tuple(self.config.views), self.config.image_size)
        return [read_shown(*pair, *settings) for pair in zip(observations, infos, strict=True)]

    @torch.no_grad()
    def _look(self, shown: list[Shown], before: list[_Running]) -> list[_Running]:
        """The episodes after they have seen what is shown; the encoder runs once for all."""
        pictures = [item.pictures for item in shown if item.pictures is not None]
        if not pictures:
            return before
        config, frames = self.head.settings, torch.cat(pictures).to(self.device)
        encoded = self.autoencoder.encode(frames).float() if config.latents or config.world else None
        for row, item in enumerate(before):
            item.pictures = _last_two(item.pictures, frames[row : row + 1])
            if encoded is not None:
                seen = encoded[row : row + 1]
                item.latents = _last_two(item.latents, seen)
                item.memory = self._remember(item.memory, seen.transpose(1, 2))
        return before

    def _remember(self, memory: MemoryState | None, seen: Tensor) -> MemoryState:
        if memory is None:
            return start_memory(self._memory, seen)
        return push_chunk(self._memory, memory, seen)

    @torch.no_grad()
    def _predict(
        self, shown: list[Shown], running: list[_Running], generator: Generators, steps: int | None
    ) -> np.ndarray:
        """Chunks of actions [N, M, A], drawn with the episodes' own noise where no generator is given."""
        config, texts = self.head.settings, tuple(item.task for item in shown)
        inputs = PolicyInputs(
            state=torch.stack([item.state for item in shown]),
            texts=texts,
            latents=_join([item.latents for item in running]) if config.latents else None,
            world=self._world(shown, running, texts) if config.world else None,
            pixels=_join([item.pictures for item in running]) if config.pixels else None,
            privileged=_join([item.privileged for item in shown]) if config.privileged else None,
        ).to(self.device)
        noise = [item.generator for item in running] if generator is None else generator
        return self.head.sample(inputs, noise, steps).cpu().numpy()

    def _world(self, shown: list[Shown], running: list[_Running], texts: tuple[str, ...]) -> Tensor:
        """World-model features of the remembered frames."""
        contexts = [read_context(self._memory, item.memory) for item in running if item.memory is not None]
        memory = torch.cat([frames for frames, _ in contexts])
        offsets = torch.stack([offset for _, offset in contexts])
        size = self.config.image_size
        cameras = [item.cameras for item in shown if item.cameras is not None]
        intrinsics, poses = (torch.cat(part).to(self.device) for part in zip(*cameras, strict=True))
        rays = ray_map(intrinsics, poses, (size, size), (memory.shape[-2], memory.shape[-1]))
        text = self.text_encoder(list(texts))
        return read_features(self.unet, memory, offsets, rays, text, self.head.settings.frames)


def _check_options(generator: Any, steps: Any, count: int) -> None:
    check_generator(generator)
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"generator: expected one per key ({count}), got {len(generator)}; give one each")
    if steps is not None:
        check_counts(num_inference_steps=steps)


def _last_two(before: Tensor | None, now: Tensor) -> Tensor:
    """The last two frames [1, 2, ...]; the first frame of an episode counts twice."""
    return torch.cat([now if before is None else before[:, -1:], now], 1)


def _join(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])
