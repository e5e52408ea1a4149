"""A world small enough to test everything on: two cameras, 16 px pictures, 4 x 4 latents, 8 frames a chunk."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dataengine.episodes import EpisodeDataset
from enerverse.cli.record import Record, record_task
from enerverse.data import LatentEpisodes
from enerverse.diffusion import make_objective
from enerverse.latents import PatchAutoencoder
from enerverse.model import HashedTextEncoder, VideoUNet
from enerverse.pipelines import EnerVersePipeline
from enerverse.policy import ActionHead, PolicyConfig

VIEWS = ("front", "top")
SIZE, GRID, CHANNELS, STATE = 16, 4, 4, 11


def wake(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values in every parameter, since many layers start at zero and would hide what they do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return module.eval()


def look_at(eye: tuple[float, float, float]) -> np.ndarray:
    """Camera-to-world of a camera at `eye` that looks at the origin, OpenCV axes, float64 [4, 4]."""
    forward = -np.array(eye) / np.linalg.norm(eye)
    right = np.cross(forward, (0.1, 0.0, 1.0))
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    pose[:3, 3] = eye
    return pose


@pytest.fixture(scope="session")
def cameras() -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics [2, 3, 3] of 16 px pictures and poses [2, 4, 4] around the origin."""
    intrinsics = np.array([[18.0, 0.0, 8.0], [0.0, 17.0, 8.0], [0.0, 0.0, 1.0]])
    return np.stack([intrinsics] * 2), np.stack([look_at((0.9, 0.1, 0.5)), look_at((0.1, -0.2, 1.1))])


@pytest.fixture
def make_episodes(cameras: tuple[np.ndarray, np.ndarray]) -> Callable[..., LatentEpisodes]:
    """Latent episodes of given lengths; every latent of a frame holds 100 episode + frame."""

    def make(lengths: tuple[int, ...] = (30, 20), success: tuple[bool, ...] | None = None, **changes: Any):
        frames = sum(lengths)
        generator = torch.Generator().manual_seed(0)
        owner = torch.cat([torch.full((n,), 100.0 * i) for i, n in enumerate(lengths)])
        clock = torch.cat([torch.arange(float(n)) for n in lengths])
        latents = (owner + clock)[:, None, None, None, None].expand(-1, len(VIEWS), CHANNELS, GRID, GRID)
        action = (torch.rand(frames, 7, generator=generator) * 2 - 1).contiguous()
        values: dict[str, Any] = {
            "latents": latents.half().contiguous(),
            "starts": torch.tensor([0, *np.cumsum(lengths).tolist()]),
            "state": 0.2 * torch.randn(frames, STATE, generator=generator),
            "action": action,
            "label": action.clone(),
            "privileged": torch.zeros(frames, 0),
            "intrinsics": torch.from_numpy(cameras[0]).float().expand(len(lengths), -1, -1, -1),
            "camera_to_world": torch.from_numpy(cameras[1]).float().expand(len(lengths), -1, -1, -1),
            "success": torch.tensor(success or (True,) * len(lengths)),
            "tasks": tuple(("lift the cube", "push the block")[i % 2] for i in range(len(lengths))),
            "views": VIEWS,
            "image": (SIZE, SIZE),
            "fps": 10.0,
        }
        return LatentEpisodes(**(values | changes))

    return make


@pytest.fixture
def make_unet() -> Callable[..., VideoUNet]:
    """A small video UNet in which every layer does something."""

    def make(**changes: Any) -> VideoUNet:
        sizes: dict[str, Any] = {
            "channels": CHANNELS, "grid": GRID, "widths": (8, 16), "blocks": (0, 1), "head_width": 8,
            "text_width": 8, "embedding": 16,
        }  # fmt: skip
        torch.manual_seed(0)
        return wake(VideoUNet(**(sizes | changes)))

    return make


@pytest.fixture
def make_autoencoder() -> Callable[..., PatchAutoencoder]:
    """A small patch autoencoder."""

    def make(**changes: Any) -> PatchAutoencoder:
        torch.manual_seed(0)
        sizes = {"patch": 4, "channels": CHANNELS, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
        return PatchAutoencoder(**(sizes | changes)).eval()

    return make


@pytest.fixture
def make_pipe(make_unet: Callable[..., VideoUNet], make_autoencoder: Callable[..., PatchAutoencoder]):
    """An untrained world pipeline in float32; keyword arguments override its settings."""

    def make(unet: VideoUNet | None = None, objective: str = "flow_x0", **changes: Any) -> EnerVersePipeline:
        settings: dict[str, Any] = {
            "views": VIEWS, "image_size": SIZE, "mixed_precision": False, "residual_scale": 0.5,
            "end_threshold": 0.001, "objective": objective,
        }  # fmt: skip
        torch.manual_seed(0)
        parts = (make_autoencoder(), unet or make_unet(), wake(HashedTextEncoder(8, 64)))
        pipe = EnerVersePipeline(*parts, make_objective(objective).scheduler(), **(settings | changes))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def make_head() -> Callable[..., ActionHead]:
    """A small action head in which every layer does something; keyword arguments override its settings."""

    def make(facts: int = 0, **changes: Any) -> ActionHead:
        sizes: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "keypoints": 4, "steps": 2}
        config = PolicyConfig(**(sizes | {"noise_draws": 2} | changes))
        torch.manual_seed(0)
        shape = (len(config.frames), len(VIEWS), 2, 2, 16)
        head = ActionHead.build(config, len(VIEWS), CHANNELS, shape, facts)
        return wake(head)

    return make


@pytest.fixture
def pictures() -> Tensor:
    """Smooth moving pictures [2, 5, 2, 3, 16, 16] in [0, 1]: batch, frames, views."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(20, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    return fine.view(2, 5, len(VIEWS), 3, SIZE, SIZE)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[EpisodeDataset]:
    """Two datasets from the simulator, 32 px: three episodes of Lift and one of CueDelayReach."""
    datasets = []
    for task, count in (("Lift", 3), ("CueDelayReach", 1)):
        root = tmp_path_factory.mktemp("recorded") / task
        record_task(Record(task=task, out=root, episodes=count, image_size=32))
        datasets.append(EpisodeDataset(root))
    return datasets
