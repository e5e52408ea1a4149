"""A small world that cameras can look at: a coloured floor, and a block that slides and turns on it."""

import numpy as np
import pytest
import torch

from dataengine.bodies import Bodies
from dataengine.cameras import Cameras
from dataengine.episodes import EpisodeDataset, EpisodeWriter
from dataengine.gaussians import Gaussians
from dataengine.made import body_vectors
from dataengine.motion import Rigid
from dataengine.scene import Scene
from dataengine.views import Views

FRAMES = 4


def look_at(position, target=(0.0, 0.0, 0.0)):
    """camera_to_world [4, 4], OpenCV axes."""
    position = np.asarray(position, float)
    forward = np.asarray(target, float) - position
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    pose[:3, 3] = position
    return pose


def ring(n, side=24, *, height=1.0, phase=0.0, name="ring"):
    angles = 2 * np.pi * np.arange(n) / n + phase
    poses = [look_at((1.2 * np.cos(a), 1.2 * np.sin(a), height)) for a in angles]
    matrix = [[1.2 * side, 0, side / 2], [0, 1.2 * side, side / 2], [0, 0, 1]]
    return Cameras([f"{name}_{i}" for i in range(n)], [matrix] * n, poses, side, side)


def poses(frames=FRAMES):
    """[T, 1, 4, 4]: along x, turning about z."""
    found = torch.eye(4).repeat(frames, 1, 1, 1)
    for t in range(frames):
        angle = torch.tensor(0.3 * t)
        found[t, 0, :2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
        found[t, 0, 0, 3] = 0.1 * t
    return found


def world(frames=FRAMES):
    """The true scene."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(-0.5, 0.5, 15)
    floor = torch.stack([*torch.meshgrid(grid, grid, indexing="ij"), torch.zeros(15, 15)], -1).view(-1, 3)
    block = 0.12 * (torch.rand(60, 3, generator=generator) - 0.5) + torch.tensor([0.0, 0.0, 0.07])
    points = torch.cat([floor, block])
    colors = torch.rand(len(points), 3, generator=generator) * 0.3 + 0.3
    colors[len(floor) :, 0] = 0.95
    body = torch.cat([torch.zeros(len(floor)), torch.ones(len(block))]).long()
    size = torch.cat([torch.full((len(floor),), 0.04), torch.full((len(block),), 0.02)])
    gaussians = Gaussians.from_points(points, colors, size, body=body, opacity=0.95)
    return Scene(gaussians, Rigid(poses(frames)), frames)


@torch.no_grad()
def capture(cameras, scene=None, *, depth=True):
    """What `cameras` see of the world, with the ids of bodies."""
    scene = scene or world()
    frames = [scene.render(cameras, t) for t in range(scene.frames)]
    flagged = []
    for t in range(scene.frames):
        at = scene.at(t)
        mark = at.replace(
            harmonics=torch.where(at.body[:, None, None] > 0, 2.0, -2.0).expand_as(at.harmonics)
        )
        flagged.append(
            Scene(mark, type(scene.motion).__mro__[1](), 1).render(cameras, 0).images[..., 0] > 0.4
        )
    return Views(
        cameras=cameras,
        images=torch.stack([f.images for f in frames]).clamp(0, 1),
        depth=torch.stack([torch.where(f.alpha > 0.5, f.depth, 0.0) for f in frames]) if depth else None,
        body_ids=torch.stack(flagged).long(),
        bodies=Bodies(("block",), poses(scene.frames).numpy()),
    )


@pytest.fixture(scope="session")
def seen():
    return capture(ring(4))


@pytest.fixture(scope="session")
def unseen():
    return capture(ring(3, height=0.8, phase=0.4, name="test"))


def save_dataset(root, episodes, *, poses=None, cameras=True, depth_scale=1.0, ids=True):
    """Write views as a dataset, one episode each; `poses` changes how camera poses are written."""
    first = episodes[0]
    size = (first.cameras.height, first.cameras.width)
    deep = first.depth is not None
    with EpisodeWriter(
        root, fps=first.fps, views=first.names, image_size=size, state_dim=3, action_dim=2, depth=deep, cameras=cameras,
        bodies=("block",) if ids else (), body_ids=ids, extra={"action.clean": 2, "privileged": 4},
        depth_range=(0.02 * depth_scale, 10 * depth_scale),
    ) as writer:  # fmt: skip
        for index, views in enumerate(episodes):
            add_frames(writer, index, views, poses or (lambda pose: pose), cameras, depth_scale, ids)
            writer.save_episode(success=index != 1, seed=7 + index)
    return EpisodeDataset(root)


def add_frames(writer, index, views, poses, cameras, depth_scale, ids):
    rows = np.random.default_rng(index).normal(size=(len(views), 11)).astype(np.float32)
    for t in range(len(views)):

        def by_view(pixels, t=t):
            return dict(zip(views.names, pixels[t].numpy(), strict=True))

        lenses = {
            name: {
                "intrinsics": views.cameras.intrinsics[v],
                "camera_to_world": poses(views.cameras.camera_to_world[v]),
            }
            for v, name in enumerate(views.names)
        }
        body = body_vectors(views.bodies)[t, 0] if ids else None
        writer.add_frame(
            images=by_view((views.images * 255).round().byte()),
            state=rows[t, :3], action=rows[t, 3:5], task=f"push the block {index}",
            cameras=lenses if cameras else None,
            depth=by_view(views.depth.clamp_min(0.02) * depth_scale) if views.depth is not None else None,
            bodies={"block": body} if ids else None,
            body_ids=by_view(views.body_ids) if ids else None,
            extra={"action.clean": rows[t, 5:7], "privileged": rows[t, 7:]},
        )  # fmt: skip


@pytest.fixture(scope="session")
def few(seen):
    return seen.select(["ring_0", "ring_1"])


@pytest.fixture(scope="session")
def anchors():
    return capture(ring(2, phase=3.5, name="anchor"))
