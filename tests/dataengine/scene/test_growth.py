"""What a repaired picture adds to a scene, and how the result is judged by carrying pixels between cameras."""

import dataclasses

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
        own = few.select(["ring_0"])
        found = seen_empty(points[0][known[0]], own, 0)
        assert found.float().mean() > 0.99 if empty else found.float().mean() < 0.01


def test_points_in_empty_space_are_pushed_back_to_where_nothing_is_known(few, anchors):
    near = 0.7 * anchors.depth[0]
    points, far, found = behind_empty_space(anchors.cameras, near, few, 0)
    known = found & (near > 0)
    assert known.float().mean() > 0.3
    assert (far >= near)[known].all()
    assert (far > near)[known].any()
    assert not seen_empty(points[known], few, 0).any()
    _, project = few.cameras.project(points[known].double().numpy())
    assert torch.isfinite(torch.from_numpy(project)).all()


def test_nothing_grows_where_a_real_view_saw_that_nothing_is(few, anchors):
    scene = first_fit(few, SETTINGS)
    renders = look(scene, anchors.cameras, len(few))
    repaired = ConstantFill().repair(renders, few, None)
    wrong = dataclasses.replace(repaired, depth=0.6 * fill_depth(renders))
    pseudo = as_views(wrong, anchors.cameras, few, 1.0)
    more = grown(scene, pseudo, renders.alpha, few, 1.5)
    new = more.params["means"].detach()[len(scene) :]
    assert len(new) > 10
    assert not seen_empty(new, few, 0).any()
    blind = grown(scene, pseudo, renders.alpha, dataclasses.replace(few, depth=None), 1.5)
    assert seen_empty(
        blind.params["means"].detach()[len(scene) :], few, 0
    ).any()  # without depth nobody knows


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
