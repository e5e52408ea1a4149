"""EnerVerse-A: a policy that reads the world model's features and acts, a chunk of actions at a time."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from enerverse.memory import MemoryState, make_memory, push_chunk, read_context, start_memory
from enerverse.pipelines.inputs import read_cameras, read_images
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
        slots = unet.config.memory if unet is not None else 2
        options = {"recent": recent} if memory_policy == "sparse_uniform" else {}
        self._memory = make_memory(memory_policy, slots=slots, **options)
        self.reset()

    def reset(self, key: Hashable | None = None) -> None:
        """Forget one episode, or all of them."""
        if key is not None:
            self._running.pop(key, None)
            return
        self._running: dict[Hashable, _Running] = {}

    def _start(self, key: Hashable) -> _Running:
        """A new episode; its noise depends on the seed and the key, not on which episodes run beside it."""
        seed = zlib.crc32(f"{self.config.seed} {key!r}".encode())
        return _Running(torch.Generator().manual_seed(seed))

    def select_action(
        self, observation: dict[str, Any], info: dict[str, Any], key: Hashable = 0
    ) -> np.ndarray:
        """The next action [A] of one episode."""
        return self.select_actions([observation], [info], [key])[0]

    def select_actions(
        self,
        observations: Sequence[dict[str, Any]],
        infos: Sequence[dict[str, Any]],
        keys: Sequence[Hashable],
    ) -> list[np.ndarray]:
        """The next action [A] of every episode; the network runs once for all that have none left."""
        self._look(observations, keys)
        empty = [i for i, key in enumerate(keys) if not self._running[key].waiting]
        if empty:
            chunks = self._predict(
                [observations[i] for i in empty], [infos[i] for i in empty], [keys[i] for i in empty]
            )
            for i, chunk in zip(empty, chunks.numpy(), strict=True):
                self._running[keys[i]].waiting = list(chunk[: self.head.settings.execute])
        return [self._running[key].waiting.pop(0) for key in keys]

    def predict_action_chunk(
        self, observation: dict[str, Any], info: dict[str, Any], key: Hashable = 0
    ) -> np.ndarray:
        """A whole chunk of actions [M, A] for one episode, without carrying any of it out."""
        self._look([observation], [key])
        return self._predict([observation], [info], [key])[0].numpy()

    @torch.no_grad()
    def _look(self, observations: Sequence[dict[str, Any]], keys: Sequence[Hashable]) -> None:
        """Encode what is seen and remember it."""
        config, views = self.head.settings, tuple(self.config.views)
        for observation in observations:
            _read_state(observation, config.state_dim)
        if not (config.latents or config.pixels or config.world):
            for key in keys:
                self._running.setdefault(key, self._start(key))
            return
        stacked = np.stack([[self._view(obs, view) for view in views] for obs in observations])[:, None]
        frames = read_images(stacked, views, self.config.image_size).to(self.device)
        encoded = self.autoencoder.encode(frames).float() if config.latents or config.world else None
        for row, key in enumerate(keys):
            item = self._running.setdefault(key, self._start(key))
            item.pictures = _last_two(item.pictures, frames[row : row + 1])
            if encoded is not None:
                seen = encoded[row : row + 1]
                item.latents = _last_two(item.latents, seen)
                item.memory = self._remember(item.memory, seen.transpose(1, 2))

    def _remember(self, memory: MemoryState | None, seen: Tensor) -> MemoryState:
        if memory is None:
            return start_memory(self._memory, seen)
        return push_chunk(self._memory, memory, seen)

    def _view(self, observation: dict[str, Any], view: str) -> np.ndarray:
        images = observation.get("images", {})
        if view not in images:
            raise ValueError(
                f"observation: expected an image of the view {view!r}, got {tuple(images)}; add that camera"
            )
        return images[view]

    def _predict(
        self,
        observations: Sequence[dict[str, Any]],
        infos: Sequence[dict[str, Any]],
        keys: Sequence[Hashable],
    ) -> Tensor:
        inputs = self._inputs(observations, infos, keys)
        return self.head.sample(inputs, [self._running[key].generator for key in keys]).cpu()

    @torch.no_grad()
    def _inputs(
        self,
        observations: Sequence[dict[str, Any]],
        infos: Sequence[dict[str, Any]],
        keys: Sequence[Hashable],
    ) -> PolicyInputs:
        config = self.head.settings
        running = [self._running[key] for key in keys]
        texts = tuple(_read_task(info) for info in infos)
        privileged = None
        if config.privileged:
            privileged = torch.stack([torch.as_tensor(info["privileged"]).float() for info in infos])
        return PolicyInputs(
            state=torch.stack([_read_state(obs, config.state_dim) for obs in observations]),
            texts=texts,
            latents=_join([item.latents for item in running]) if config.latents else None,
            world=self._world(running, infos, texts) if config.world else None,
            pixels=_join([item.pictures for item in running]) if config.pixels else None,
            privileged=privileged,
        ).to(self.device)

    def _world(
        self, running: list[_Running], infos: Sequence[dict[str, Any]], texts: tuple[str, ...]
    ) -> Tensor:
        contexts = [read_context(self._memory, item.memory) for item in running if item.memory is not None]
        memory = torch.cat([frames for frames, _ in contexts])
        offsets = torch.stack([offset for _, offset in contexts])
        views, size = tuple(self.config.views), self.config.image_size
        cameras = [_read_info_cameras(info, views, size) for info in infos]
        intrinsics, poses = (torch.cat(part).to(self.device) for part in zip(*cameras, strict=True))
        rays = ray_map(intrinsics, poses, (size, size), (memory.shape[-2], memory.shape[-1]))
        text = self.text_encoder(list(texts))
        return read_features(self.unet, memory, offsets, rays, text, self.head.settings.frames)


def _last_two(before: Tensor | None, now: Tensor) -> Tensor:
    """The last two frames [1, 2, ...]; the first frame of an episode counts twice."""
    return torch.cat([now if before is None else before[:, -1:], now], 1)


def _join(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


def _read_task(info: dict[str, Any]) -> str:
    if "task" not in info:
        raise ValueError(f"info['task']: expected the instruction, got the keys {tuple(info)}")
    return str(info["task"])


def _read_state(observation: dict[str, Any], width: int) -> Tensor:
    if "state" not in observation:
        raise ValueError(f"observation['state']: expected [{width}], got the keys {tuple(observation)}")
    state = torch.as_tensor(np.asarray(observation["state"])).float()
    if state.shape != (width,):
        raise ValueError(f"observation['state']: expected [{width}], got {list(state.shape)}")
    if not torch.isfinite(state).all():
        raise ValueError(
            "observation['state']: expected finite values, got NaN or infinity; check the sensors"
        )
    return state


def _read_info_cameras(info: dict[str, Any], views: tuple[str, ...], size: int) -> tuple[Tensor, Tensor]:
    if "cameras" not in info or any(view not in info["cameras"] for view in views):
        raise ValueError(f"info['cameras']: expected the views {views}, got {tuple(info.get('cameras', ()))}")
    chosen = [info["cameras"][view] for view in views]
    pair = (np.stack([c["intrinsics"] for c in chosen]), np.stack([c["camera_to_world"] for c in chosen]))
    return read_cameras(pair, views, size, 1)
