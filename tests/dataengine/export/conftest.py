"""Gaussians of any degree and a short scene in which one body and a few loose ones move."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dataengine import rotations
from dataengine.cameras import Cameras
from dataengine.gaussians import Gaussians
from dataengine.motion import Rigid


def random_gaussians(n: int = 50, degree: int = 0, seed: int = 0) -> Gaussians:
    draw = torch.Generator().manual_seed(seed)
    size = (degree + 1) ** 2
    return Gaussians(
        means=torch.randn(n, 3, generator=draw),
        quats=torch.randn(n, 4, generator=draw),
        scales=torch.randn(n, 3, generator=draw) * 0.4 - 3.5,
        opacities=torch.randn(n, generator=draw) * 2,
        harmonics=torch.randn(n, size, 3, generator=draw) * 0.4,
        body=torch.zeros(n, dtype=torch.long),
    )


def moving_scene(
    n: int = 60, frames: int = 5, degree: int = 0, *, rigid: float = 0.3, loose: float = 0.2
) -> list[Gaussians]:
    """The first Gaussians, in turns, belong to two bodies and to nothing; the rest stand still."""
    body = torch.zeros(n, dtype=torch.long)
    bodies, free = int(rigid * n), int(loose * n)
    body[:bodies] = 1 + torch.arange(bodies) % 2
    body[bodies : bodies + free] = -1
    body = body[torch.randperm(n, generator=torch.Generator().manual_seed(3))]
    first = random_gaussians(n, degree).replace(body=body)
    poses = torch.eye(4).repeat(frames, 2, 1, 1)
    for t in range(frames):
        turn = torch.tensor([[0.0, 0.1 * t, 0.3 * t], [0.2 * t, 0.0, -0.1 * t]])
        poses[t, :, :3, :3] = rotations.to_matrix(rotations.from_vector(turn))
        poses[t, :, :3, 3] = torch.tensor([[0.1 * t, 0.0, 0.2], [0.0, -0.05 * t, 0.0]])
    model = Rigid(poses)
    shots = []
    for t in range(frames):
        shot = model(first, {}, t).detach()
        wave = 0.1 * t * torch.sin(first.means.flip(1)) * (body == -1)[:, None]
        own = {name: value.clone() for name, value in shot.parameters().items()}  # frames share no memory
        shots.append(shot.replace(**own | {"means": shot.means + wave}))
    return shots


def two_cameras(frames: int | None = None) -> Cameras:
    """Pictures of 64 x 48 pixels, from in front and from the side, with different focal lengths in x and y."""
    front, side = np.eye(4), np.eye(4)
    front[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]  # x right, z up, looks along y
    front[:3, 3] = (0.1, -4.0, 0.2)
    side[:3, :3] = [[0, 0, -1], [1, 0, 0], [0, -1, 0]]  # looks along -x
    side[:3, 3] = (4.5, 0.0, 0.0)
    poses = np.stack([front, side])
    if frames is not None:
        poses = np.repeat(poses[None], frames, 0)
        poses[:, :, 2, 3] += 0.05 * np.arange(frames)[:, None]
    lens = np.array([[60.0, 0, 33], [0, 62, 23], [0, 0, 1]])
    return Cameras(("front", "side"), np.stack([lens, lens]), poses, 64, 48)


@pytest.fixture
def gaussians() -> Callable[..., Gaussians]:
    return random_gaussians


@pytest.fixture
def scene() -> Callable[..., list[Gaussians]]:
    return moving_scene


@pytest.fixture
def cameras() -> Callable[..., Cameras]:
    return two_cameras


@pytest.fixture
def same() -> Callable[..., bool]:
    """Whether two hold the same numbers, bit for bit."""

    def compare(first: Gaussians, second: Gaussians) -> bool:
        parts = [first.parameters() | {"body": first.body}, second.parameters() | {"body": second.body}]
        return all(parts[0][name].equal(parts[1][name]) for name in parts[0])

    return compare
