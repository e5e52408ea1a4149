"""Training the policy: behaviour cloning of action chunks on frozen latents and world-model features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from enerverse.config import to_json
from enerverse.data import ClipConfig, LatentEpisodes
from enerverse.data.actions import actions_ahead
from enerverse.files import fingerprint, load_tensors, prepare_run, save_tensors
from enerverse.memory import make_memory
from enerverse.pipelines import EnerVersePipeline, EnerVersePolicy
from enerverse.policy import ActionHead, PolicyConfig, PolicyInputs, read_features
from enerverse.presets import Preset
from enerverse.train.loop import train
from enerverse.views import ray_map


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Decision points: rows [W] of the frames at which a chunk starts, their episode [W] and first frame
    [W]."""

    rows: Tensor
    episode: Tensor
    start: Tensor

    def __len__(self) -> int:
        return len(self.rows)


def cut_windows(episodes: LatentEpisodes, stillness: float = 0.05, every: int = 2) -> Windows:
    """Every `every`-th frame with an action after it (neighbouring frames are nearly the same decision); of frames at
    which the arm rests every fourth."""
    rows, owner, first = [], [], []
    for index in range(len(episodes)):
        span = episodes.span(index)
        length = span.stop - span.start - 1
        moving = episodes.label[span.start : span.start + length, :6].abs().amax(1) > stillness
        soon = torch.nn.functional.max_pool1d(moving.float()[None, None], 9, 1, 4)[0, 0] > 0
        times = torch.arange(length)
        keep = torch.where(soon, (times + index) % every == 0, times % 4 == 0)
        keep[0] = True  # every episode begins with a decision
        rows.append(times[keep] + span.start)
        owner.append(torch.full((int(keep.sum()),), index))
        first.append(torch.full((int(keep.sum()),), span.start))
    return Windows(rows=torch.cat(rows), episode=torch.cat(owner), start=torch.cat(first))


def extract_features(
    pipe: EnerVersePipeline,
    episodes: LatentEpisodes,
    windows: Windows,
    frames: tuple[int, ...],
    path: Path,
    batch: int = 32,
) -> Tensor:
    """World-model features float16 [W, F, V, h', w', D] of every window, cached at `path`; a cache of another
    model, of other frames or of other windows is made anew."""
    key = f"{fingerprint(pipe.unet)} {frames} {len(windows)} {int(windows.rows.sum())}"
    if path.exists():
        tensors, words = load_tensors(path)
        if words.get("key") == key:
            return tensors["features"]
    memory = make_memory("sparse_uniform", slots=pipe.unet.config.memory, recent=pipe.config.recent)
    parts = []
    grid = (episodes.latents.shape[-2], episodes.latents.shape[-1])
    for rows in tqdm(torch.arange(len(windows)).split(batch), desc="features", disable=None):
        now = (windows.rows[rows] - windows.start[rows]).tolist()
        chosen = torch.tensor([memory.select(list(range(time + 1)), time) for time in now])
        context = episodes.latents[windows.start[rows, None] + chosen].float().transpose(1, 2)
        offsets = chosen - torch.tensor(now)[:, None]
        owner = windows.episode[rows]
        rays = ray_map(episodes.intrinsics[owner], episodes.camera_to_world[owner], episodes.image, grid)
        with torch.no_grad():
            text = pipe.text_encoder([episodes.tasks[int(index)] for index in owner])
        features = read_features(
            pipe.unet, context.to(pipe.device), offsets.to(pipe.device), rays.to(pipe.device), text, frames
        )
        parts.append(features.half().cpu())
    features = torch.cat(parts)
    save_tensors(path, {"features": features}, {"key": key})
    return features


class PolicyTask:
    """Action chunks at random decision points; a pure function of the step."""

    def __init__(
        self,
        head: ActionHead,
        episodes: LatentEpisodes,
        windows: Windows,
        *,
        features: Tensor | None = None,
        images: Tensor | None = None,
        batch: int = 64,
        seed: int = 0,
    ):
        self.module, self.episodes, self.windows = head, episodes, windows
        self.features, self.images, self.batch_size, self.seed = features, images, batch, seed

    def actions_at(self, rows: Tensor, episode: Tensor) -> Tensor:
        """Labels [B, M, A] from `rows` on; past the end the arm rests and the gripper keeps its command."""
        ahead = rows[:, None] + torch.arange(self.module.settings.chunk)
        return actions_ahead(self.episodes.label, ahead, self.episodes.starts[episode + 1])

    def inputs_at(self, index: Tensor) -> PolicyInputs:
        """Inputs of the decision points `index`."""
        config, data = self.module.settings, self.episodes
        rows, episode = self.windows.rows[index], self.windows.episode[index]
        before = torch.maximum(rows - 1, self.windows.start[index])
        pair = torch.stack([before, rows], 1)
        return PolicyInputs(
            state=data.state[rows],
            texts=tuple(data.tasks[int(i)] for i in episode),
            latents=data.latents[pair].float() if config.latents else None,
            world=self.features[index].float() if self.features is not None and config.world else None,
            pixels=self.images[pair].float() / 255 if config.pixels and self.images is not None else None,
            privileged=data.privileged[rows] if config.privileged else None,
        )

    def batch(self, step: int) -> tuple[PolicyInputs, Tensor, Tensor | None]:
        rng = np.random.default_rng((self.seed, step))
        index = torch.from_numpy(rng.integers(len(self.windows), size=self.batch_size))
        rows = self.windows.rows[index]
        facts = self.episodes.privileged[rows] if self.module.locator is not None else None
        return self.inputs_at(index), self.actions_at(rows, self.windows.episode[index]), facts

    def loss(
        self, batch: tuple[PolicyInputs, Tensor, Tensor | None], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        device = next(self.module.parameters()).device
        inputs, actions, facts = batch
        facts = None if facts is None else facts.to(device)
        return self.module.loss(inputs.to(device), actions.to(device), generator, facts)


def train_policy(
    episodes: LatentEpisodes,
    pipe: EnerVersePipeline,
    preset: Preset,
    run: Path,
    *,
    config: PolicyConfig | None = None,
    images: Tensor | None = None,
    feature_cache: Path | None = None,
    device: str | None = None,
) -> EnerVersePolicy:
    """Train an action head in `run` and save the whole policy in `run/policy`.

    config: default the preset's; the widths of state and actions are those of the data. Raises ValueError when the
    folder belongs to another config.
    """
    config = replace(
        config or preset.policy, action_dim=episodes.label.shape[1], state_dim=episodes.state.shape[1]
    )
    prepare_run(run, to_json(replace(preset, policy=config)))
    torch.manual_seed(preset.train_policy.seed)
    windows = cut_windows(episodes)
    features = None
    if config.world:
        cache = feature_cache or run / "features.safetensors"
        features = extract_features(pipe, episodes, windows, config.frames, cache)
    shape = tuple(features.shape[1:]) if features is not None else None
    head = ActionHead.build(
        config, len(preset.views), preset.autoencoder.channels, shape, episodes.privileged.shape[1]
    ).to(device or "cpu")
    body = episodes.state if not config.privileged else torch.cat([episodes.state, episodes.privileged], 1)
    head.set_statistics(body, episodes.label, episodes.privileged)
    task = PolicyTask(
        head, episodes, windows, features=features, images=images,
        batch=preset.train_policy.batch, seed=preset.train_policy.seed,
    )  # fmt: skip
    train(task, preset.train_policy, run, name="policy", device=device)
    policy = assemble_policy(pipe, head.eval(), pipe.clip_config)
    policy.save_pretrained(run / "policy")
    return policy


def assemble_policy(pipe: EnerVersePipeline, head: ActionHead, clips: ClipConfig) -> EnerVersePolicy:
    """A policy of a trained head and the parts of the world model that it reads."""
    uses_world = head.settings.world is not None
    return EnerVersePolicy(
        pipe.autoencoder,
        pipe.unet if uses_world else None,
        pipe.text_encoder if uses_world else None,
        head,
        views=tuple(pipe.config.views),
        image_size=pipe.config.image_size,
        recent=clips.recent,
    )
