"""Clips: the window a world model trains on, cut from latent episodes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from enerverse.data.actions import actions_ahead
from enerverse.data.latents import LatentEpisodes
from enerverse.memory import make_memory
from enerverse.views import commanded_path, path_map, ray_map

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One batch of training or evaluation windows.

    memory [B, V, K, C, h, w] with offsets [B, K] (frames before the last, <= 0); future [B, V, M, C, h, w];
    ended [B, M]: 1 where the episode is over and the future frame is the end-of-task latent;
    rays [B, V, 6, h, w]; actions [B, M, A]; path [B, V, M, 4, h, w]; facts [B, S'] of the simulator at the last memory
    frame, where recorded (S' may be 0); texts: B instructions;
    episode, time: [B] which window it is (time = index of the last memory frame).
    """

    memory: Tensor
    offsets: Tensor
    future: Tensor
    ended: Tensor
    rays: Tensor
    actions: Tensor
    path: Tensor
    facts: Tensor
    texts: tuple[str, ...]
    episode: Tensor
    time: Tensor

    def to(self, device: torch.device | str) -> Clip:
        """The same clip with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "texts"}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How windows are cut.

    memory, chunk: K and M. recent: last consecutive frames always in memory. mix: share of training windows
    whose memory is drawn at random, evenly spread, consecutive, or the last frame alone. stillness: weight of
    windows in which nothing moves, relative to an average one; 1 samples uniformly. onset: share of windows
    drawn by how much faster the demonstrator moves after the last frame than just before it: what comes next is
    told there by the instruction and the memory, not by the last frames, and such windows are rare. emphasis: how
    often a kind of task is drawn relative to the others (1), by the first word of its instructions. command: the
    gripper's commanded position is the first three entries of the state plus the three from `command` on;
    action_scale: metres per action unit.
    """

    memory: int = 4
    chunk: int = 8
    recent: int = 2
    mix: tuple[float, float, float, float] = (0.3, 0.5, 0.1, 0.1)
    stillness: float = 0.3
    onset: float = 0.4
    emphasis: dict[str, float] = field(default_factory=dict, hash=False)
    action_scale: tuple[float, float, float] = (0.016, 0.016, 0.016)
    command: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.recent <= self.memory:
            raise ValueError(f"recent: expected 1 to {self.memory} (the memory slots), got {self.recent}")
        if abs(sum(self.mix) - 1) > 1e-6:
            raise ValueError(f"mix: expected four shares that sum to 1, got {self.mix}")
        if not 0 <= self.onset <= 1:
            raise ValueError(f"onset: expected a share from 0 to 1, got {self.onset}")
        for kind, weight in self.emphasis.items():
            if not (isinstance(weight, (int, float)) and 0 < weight < math.inf):
                raise ValueError(f"emphasis[{kind!r}]: expected a finite weight above 0, got {weight!r}")


class ClipSampler:
    """Windows of `episodes`, a pure function of (seed, step): resuming needs no saved data position."""

    def __init__(self, episodes: LatentEpisodes, config: ClipConfig, *, batch: int = 8, seed: int = 0):
        _check_widths(episodes, config)
        self.episodes, self.config, self.batch_size, self.seed = episodes, config, batch, seed
        self.grid = (episodes.latents.shape[-2], episodes.latents.shape[-1])
        self._windows, self._weights = self._weigh_windows()

    def _weigh_windows(self) -> tuple[np.ndarray, np.ndarray]:
        """All (episode, last memory frame) pairs, and the running sum of how often each is drawn: by motion and by the
        onset of commanded motion, every kind of task as the config says."""
        indices = range(len(self.episodes))
        ahead = np.concatenate([self._motion(index) for index in indices])
        onset = np.concatenate([self._onset(index) for index in indices])
        lengths = [self.episodes.length(index) for index in indices]
        rows = np.stack([np.repeat(indices, lengths), np.concatenate([np.arange(n) for n in lengths])], 1)
        kinds = np.array([_task_kind(task) for task in self.episodes.tasks])[rows[:, 0]]
        if absent := sorted(set(self.config.emphasis) - set(kinds.tolist())):
            log.info("emphasis: no task begins with %s; there are %s", absent, np.unique(kinds).tolist())
        weights = self.config.stillness + (1 - self.config.stillness) * ahead / max(ahead.mean(), 1e-8)
        for kind in np.unique(kinds):
            group = kinds == kind
            plain, sudden = _shares(weights[group]), _shares(onset[group])
            share = self.config.onset if onset[group].any() else 0.0
            weights[group] = self.config.emphasis.get(kind, 1.0) * ((1 - share) * plain + share * sudden)
        return rows, np.cumsum(_shares(weights))

    def _motion(self, episode: int) -> np.ndarray:
        """Change of the latents over the next half chunk, for every frame [T] of an episode."""
        frames = self.episodes.latents[self.episodes.span(episode)].float()
        later = torch.arange(len(frames)).add(self.config.chunk // 2).clamp_max(len(frames) - 1)
        return (frames[later] - frames).square().mean((1, 2, 3, 4)).sqrt().numpy()

    def _onset(self, episode: int) -> np.ndarray:
        """By how much faster the arm is told to move over the next half chunk than over the last one, squared [T]."""
        half, commands = self.config.chunk // 2, self.episodes.label[self.episodes.span(episode)].numpy()
        speed = np.linalg.norm(
            commands[:-1, :-1], axis=1
        )  # without the gripper; nothing follows the last frame
        means = sliding_window_view(np.pad(speed, (half, half + 1)), half).mean(1)
        return np.clip(means[half : half + len(commands)] - means[: len(commands)], 0, None) ** 2

    def batch(self, step: int) -> Clip:
        """The training batch of `step`."""
        rng = np.random.default_rng((self.seed, step))
        rows = self._windows[
            np.searchsorted(self._weights, rng.random(self.batch_size)).clip(max=len(self._weights) - 1)
        ]
        memories = [self._draw_memory(int(time), rng) for _, time in rows]
        return self.gather(rows[:, 0], rows[:, 1], memories)

    def _draw_memory(self, now: int, rng: np.random.Generator) -> list[int]:
        slots, recent = self.config.memory, self.config.recent
        kind = rng.choice(4, p=self.config.mix)
        if kind != 0:
            name = ("sparse_uniform", "dense", "none")[kind - 1]
            options = {"recent": recent} if kind == 1 else {}
            return make_memory(name, slots=slots, **options).select(list(range(now + 1)), now)
        past = np.arange(max(0, now - recent + 1))
        count = min(len(past), slots - recent)
        chosen = sorted(rng.choice(past, count, replace=False).tolist())
        tail = [max(0, now - lag) for lag in reversed(range(recent))]
        return [(chosen or [tail[0]])[0]] * (slots - recent - count) + chosen + tail

    def gather(self, episode: np.ndarray, time: np.ndarray, memories: list[list[int]]) -> Clip:
        """The clip of given windows: last memory frame `time` [B] of `episode` [B], memory frames by
        index."""
        data, config = self.episodes, self.config
        starts = data.starts[torch.from_numpy(np.asarray(episode))]
        ends = data.starts[torch.from_numpy(np.asarray(episode)) + 1]
        now = starts + torch.from_numpy(np.asarray(time))
        ahead = now[:, None] + torch.arange(1, config.chunk + 1)
        over = ahead >= ends[:, None]
        rows = torch.minimum(ahead, ends[:, None] - 1)
        ended = over & data.success[torch.from_numpy(np.asarray(episode))][:, None]
        memory_rows = starts[:, None] + torch.tensor(memories)
        future = data.latents[rows].float().transpose(1, 2)
        future = (
            future * (~ended)[:, None, :, None, None, None]
        )  # the end-of-task latent is zero: the mean picture
        actions = actions_ahead(data.action, ahead - 1, ends)
        rays, path = self.draw_path(np.asarray(episode), data.state[now], actions)
        return Clip(
            memory=data.latents[memory_rows].float().transpose(1, 2),
            offsets=memory_rows - now[:, None],
            future=future,
            ended=ended.float(),
            rays=rays,
            actions=actions,
            path=path,
            facts=data.privileged[now],
            texts=tuple(data.tasks[int(index)] for index in episode),
            episode=torch.from_numpy(np.asarray(episode)),
            time=torch.from_numpy(np.asarray(time)),
        )

    def draw_path(self, episode: np.ndarray, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Ray maps [B, V, 6, h, w] and path maps [B, V, M, 4, h, w] of `actions` [B, M, A] from `state` [B,
        S]."""
        index = torch.from_numpy(np.asarray(episode))
        intrinsics, poses = self.episodes.intrinsics[index], self.episodes.camera_to_world[index]
        rays = ray_map(intrinsics, poses, self.episodes.image, self.grid)
        path = commanded_path(
            gripper_start(state, self.config), actions, torch.tensor(self.config.action_scale)
        )
        return rays, path_map(path, actions[..., -1], intrinsics, poses, self.episodes.image, self.grid)


def _check_widths(episodes: LatentEpisodes, config: ClipConfig) -> None:
    """Raise ValueError where state or action are too narrow to hold the path that a gripper is sent along."""
    state, action = episodes.state.shape[1], episodes.action.shape[1]
    if state < config.command + 3:
        raise ValueError(
            f"dataset: expected a state of at least {config.command + 3} numbers, the gripper's tracking error (m) from "
            f"entry {config.command} on, got {state}; add it or set ClipConfig.command"
        )
    if action < 4:
        raise ValueError(
            f"dataset: expected actions of at least 4 numbers, translation first and the gripper last, got {action}; "
            "bring them into this order"
        )


def _shares(weights: np.ndarray) -> np.ndarray:
    """`weights` scaled to sum to 1; equal shares where all are 0."""
    total = weights.sum()
    return weights / total if total > 0 else np.full_like(weights, 1 / max(1, len(weights)))


def gripper_start(state: Tensor, config: ClipConfig) -> Tensor:
    """Commanded gripper position [B, 3] in metres of proprioception `state` [B, S]: measured plus tracking
    error."""
    return state[:, :3] + state[:, config.command : config.command + 3]


def _task_kind(task: str) -> str:
    """Instructions that differ only in a colour or side are one task: the verb names it."""
    return (task.split() or [""])[0]
