"""Rigid bodies found in depth: at any scale of a scene, in memory that grows with it, in no more parts than allowed."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataengine.gaussians import LOOSE
from dataengine.initialize import nearest
from dataengine.tracking import Tracking, _contacts, track_bodies


@pytest.fixture(scope="module")
def blind(seen):
    return dataclasses.replace(seen, bodies=None, body_ids=None)


def enlarged(views, factor):
    poses = views.cameras.camera_to_world.copy()
    poses[..., :3, 3] *= factor
    cameras = dataclasses.replace(views.cameras, camera_to_world=poses)
    return dataclasses.replace(views, cameras=cameras, depth=factor * views.depth)


@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_a_world_of_another_size_holds_the_same_bodies(blind, seen, factor, monkeypatch):
    """Given what moves, which is judged by centimetres of depth."""
    monkeypatch.setattr("dataengine.tracking.moving_pixels", lambda views: seen.body_ids > 0)
    tracks, other = track_bodies(blind), track_bodies(enlarged(blind, factor))
    assert torch.equal(other.labels, tracks.labels)
    torch.testing.assert_close(other.poses[..., :3, 3] / factor, tracks.poses[..., :3, 3])
    assert tracks.poses[-1, :, 0, 3] - tracks.poses[0, :, 0, 3] > 0.25  # it went 0.3


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


def test_contacts_are_those_of_all_pairs_in_memory_that_grows_with_the_points():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2000, 3, generator=generator) * torch.tensor([1.0, 1.0, 0.0])
    part = (3 * points[:, 0]).long()
    gap = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    gap[part[:, None] == part] = torch.inf
    point = (gap.amin(-1) < 0.03).nonzero().squeeze(-1)
    expected = torch.stack([point, part[point], part[gap.argmin(-1)[point]]], -1)
    with Largest() as largest:
        found = _contacts(points, part, 0.03)
    assert len(found) > 100
    assert torch.equal(found, expected)
    assert largest.numbers < 20 * len(points)
    assert _contacts(points, torch.zeros_like(part), 0.03).shape == (0, 3)


def test_the_nearest_are_those_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    these, those = (torch.rand(n, 6, generator=generator) for n in (50, 300))
    wanted = torch.cdist(these, those).topk(4, largest=False)
    index, gap = nearest(these, those, 4)
    assert torch.equal(index, wanted.indices)
    torch.testing.assert_close(gap, wanted.values)
    assert torch.equal(nearest(these, those)[0], index[:, 0])


def test_no_more_parts_than_allowed_cover_everything_that_moves(blind):
    small = Tracking(part=0.02, same=0.0)  # parts of a few points, of which none become one
    many, few = (track_bodies(blind, dataclasses.replace(small, most=n)) for n in (128, 3))
    assert many.poses.shape[1] > 3
    assert 1 <= few.poses.shape[1] <= 3
    first = few.labels[0]
    assert (first[first != 0] != LOOSE).all()


def test_pixels_that_move_without_depth_belong_to_no_body(blind):
    """A pixel that moves at the first frame and whose depth nobody knows; cameras that move are judged by colour."""
    poses = blind.cameras.camera_to_world[None].repeat(len(blind), 0)
    poses[-1, :, 0, 3] += 1e-3
    lenses = blind.cameras.intrinsics[None].repeat(len(blind), 0)
    moving = dataclasses.replace(blind.cameras, camera_to_world=poses, intrinsics=lenses)
    depth = blind.depth.clone()
    depth[:, :, 8:16, 8:16] = 0.0
    tracks = track_bodies(dataclasses.replace(blind, cameras=moving, depth=depth))
    hidden = tracks.labels[:, :, 8:16, 8:16]
    assert (hidden == LOOSE).any()
    assert (hidden <= 0).all()
