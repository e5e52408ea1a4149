"""What a repaired picture adds to a scene, and how the result is judged by carrying pixels between cameras."""

import dataclasses

import numpy as np
import pytest
import torch

from dataengine.fit import Fit
from dataengine.flywheel import Flywheel, as_views, first_fit, look, reprojection_errors
from dataengine.generators import ConstantFill, fill_depth
from dataengine.growth import behind_empty_space, grown, seen_empty
from dataengine.reconstruct import Reconstruction
from tests.dataengine.scene.conftest import world

SETTINGS = Flywheel(
    start=Reconstruction(complete=False, fit=Fit(steps=12, quiet=True)), refit=Fit(steps=12, quiet=True)
)


def test_space_before_a_surface_is_empty_and_behind_it_is_not_known(few):
    depth = few.depth[0]
    known = depth > 0
    for factor, empty in ((0.8, True), (1.0, False), (1.3, False)):
        points = torch.from_numpy(few.cameras.unproject((factor * depth).numpy())).float()
        own = few.select(["ring_0"]).at(slice(0, 1))
        found = seen_empty(points[0][known[0]], own)
        assert found.float().mean() > 0.99 if empty else found.float().mean() < 0.01


def test_points_in_empty_space_are_pushed_back_to_where_nothing_is_known(few, anchors):
    near = 0.7 * anchors.depth[0]
    points, far, found = behind_empty_space(anchors.cameras, near, few)
    known = found & (near > 0)
    assert known.float().mean() > 0.3
    assert (far >= near)[known].all()
    assert (far > near)[known].any()
    assert not seen_empty(points[known], few).any()
    _, project = few.cameras.project(points[known].double().numpy())
    assert torch.isfinite(torch.from_numpy(project)).all()


def test_nothing_grows_where_a_real_view_saw_that_nothing_is(few, anchors):
    scene = first_fit(few, SETTINGS)
    renders = look(scene, anchors.cameras, len(few))
    repaired = ConstantFill().repair(renders, few, None)
    wrong = dataclasses.replace(repaired, depth=0.6 * fill_depth(renders))
    pseudo = as_views(wrong, anchors.cameras, few, 1.0)
    more = grown(scene, pseudo, renders.alpha, few, 1.5)
    new = new_means(scene, more)
    assert len(new) > 10
    assert not seen_empty(new, few).any()
    blind = grown(scene, pseudo, renders.alpha, dataclasses.replace(few, depth=None), 1.5)
    assert seen_empty(new_means(scene, blind), few).any()  # without depth nobody knows


@pytest.mark.parametrize("moving", [False, True])
def test_a_hole_that_is_seen_empty_at_another_frame_alone_is_not_filled(few, anchors, moving):
    """At the first frame a wall hides everything from the real views, at the last one they see the world behind it."""
    views = dataclasses.replace(few, cameras=on_rails(few.cameras, len(few))) if moving else few
    wall = torch.full_like(few.depth[:-1], 0.4)
    hidden = dataclasses.replace(views, depth=torch.cat([wall, few.depth[-1:]]))
    always = dataclasses.replace(hidden, depth=torch.cat([wall, wall[:1]]))
    depth = torch.where(anchors.depth > 0, 0.8 * anchors.depth, 0.0)
    pseudo = dataclasses.replace(anchors, depth=depth, confidence=torch.ones_like(depth))
    scene, none = first_fit(few, SETTINGS), torch.zeros_like(depth)
    free = new_means(scene, grown(scene, pseudo, none, always, 1.5))
    checked = new_means(scene, grown(scene, pseudo, none, hidden, 1.5))
    last = hidden.at(slice(len(few) - 1, None))
    assert seen_empty(free, last).sum() > 10
    assert len(checked) > 10
    assert not seen_empty(checked, last).any()


def new_means(scene, more):
    return more.params["means"].detach()[len(scene) :]


def on_rails(cameras, frames):
    """The same cameras with poses of every frame, which go a hair's breadth along x."""
    poses = cameras.camera_to_world[None].repeat(frames, 0)
    poses[..., 0, 3] += 1e-3 * np.arange(frames)[:, None]
    lenses = cameras.intrinsics[None].repeat(frames, 0)
    return dataclasses.replace(cameras, camera_to_world=poses, intrinsics=lenses)


def test_a_true_scene_carries_pixels_better_than_one_with_holes_or_wrong_depth(unseen):
    true = world()
    good = reprojection_errors(true, unseen)
    assert good["reprojection"] < 0.03
    holes = world()
    holes.params["opacities"].data[::2] = -10.0
    moved = world()
    moved.params["means"].data[:, 2] -= 0.1
    for scene in (holes, moved):
        bad = reprojection_errors(scene, unseen)
        assert bad["reprojection"] > 1.5 * good["reprojection"]
        assert bad["reprojection_depth"] > 1.5 * good["reprojection_depth"]


def test_one_camera_has_no_other_to_agree_with(unseen):
    assert reprojection_errors(world(), unseen.select(["test_0"])) == {}


def test_carrying_pixels_needs_depth(unseen):
    with pytest.raises(ValueError, match="views: expected depth, to know which cameras see the same surface"):
        reprojection_errors(world(), dataclasses.replace(unseen, depth=None))
