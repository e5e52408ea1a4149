"""Bad captures: each fault is named in a sentence, and repaired where the geometry says how."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from dataengine.cameras import Cameras
from dataengine.captures import build_views, check_views, find_problems, flip, repair
from dataengine.captures.geometry import AXES, OPENGL, WORDS, compose_axes, to_opencv
from dataengine.captures.geometry import from_opencv as written


def with_poses(views, poses):
    return replace(views, cameras=replace(views.cameras, camera_to_world=poses))


def kinds(views, **options):
    return [problem.kind for problem in find_problems(views, **options)]


@pytest.mark.parametrize("depth", [True, False])
@pytest.mark.parametrize("names", [("front", "left", "top"), ("front", "left")])
@pytest.mark.parametrize("moving", [False, True])
def test_sound_views_have_no_problem(make_scene, names, depth, moving):
    views = make_scene(3, names, moving=moving)
    views = views if depth else replace(views, depth=None)
    assert find_problems(views) == []
    again, done = repair(views)
    assert (again, done) == (views, [])


@pytest.mark.parametrize("axes", AXES)
def test_conversions_undo_each_other(make_scene, axes):
    poses = make_scene().cameras.camera_to_world
    np.testing.assert_allclose(to_opencv(written(poses, axes), axes), poses, atol=1e-12)
    assert compose_axes(axes, "opencv") == axes


@pytest.mark.parametrize("first", AXES)
@pytest.mark.parametrize("second", AXES)
def test_two_readings_are_one_but_for_a_turn_of_the_world(make_scene, first, second):
    poses = make_scene().cameras.camera_to_world
    twice = to_opencv(to_opencv(poses, first), second)
    once = to_opencv(poses, compose_axes(first, second))
    turns = twice @ np.linalg.inv(once)
    np.testing.assert_allclose(turns, turns[:1].repeat(len(turns), 0), atol=1e-12)


@pytest.mark.parametrize("given", AXES)
@pytest.mark.parametrize("axes", AXES)
def test_repairs_speak_of_the_file_whatever_it_was_read_as(make_scene, given, axes):
    """The poses that come out are those in the file's own world, not in one turned by the first reading."""
    sound = make_scene(2)
    true = sound.cameras.camera_to_world
    read = with_poses(sound, to_opencv(written(true, axes), given))
    again, done = repair(read, given=given)
    np.testing.assert_allclose(again.cameras.camera_to_world, true, atol=1e-9)
    assert done == [f"camera_to_world: read as {WORDS[axes]}, not as {WORDS[given]}"] * (axes != given)
    told, _ = repair(read, axes=axes, given=given)
    np.testing.assert_allclose(told.cameras.camera_to_world, true, atol=1e-9)
    advice = f"looks like {WORDS[axes]}; read them with axes {axes!r}, or repair (--repair)"
    assert [p.sentence.endswith(advice) for p in find_problems(read, axes=given)] == [True] * (axes != given)


@pytest.mark.parametrize("depth", [1.0, 1000.0, None])
@pytest.mark.parametrize("names", [("front", "left", "top"), ("front", "top")])
@pytest.mark.parametrize("axes", AXES[1:])
def test_other_axes_are_named_and_repaired(make_scene, axes, names, depth):
    sound = make_scene(2, names)
    views = with_poses(sound, written(sound.cameras.camera_to_world, axes))
    views = replace(views, depth=None if depth is None else views.depth * depth)
    if depth is None and len(names) == 2 and axes != "opengl":
        assert (
            find_problems(views) == [] or find_problems(views)[0].remedy == "opengl"
        )  # two axes say too little
        return
    found = [p for p in find_problems(views) if p.kind == "axes"]
    words = {
        "opengl": "looks like OpenGL axes (y up, z back); read them with axes 'opengl'",
        "world_to_camera": "looks like world-to-camera matrices; read them with axes 'world_to_camera'",
        "opengl_world_to_camera": "looks like world-to-camera matrices with OpenGL axes (y up, z back); read them with "
        "axes 'opengl_world_to_camera'",
    }
    assert found[0].remedy == axes
    assert found[0].sentence.endswith(words[axes] + ", or repair (--repair)")
    again, done = repair(views)
    np.testing.assert_allclose(again.cameras.camera_to_world, sound.cameras.camera_to_world, atol=1e-9)
    assert done[0].startswith("camera_to_world: read as")
    if depth is not None:
        assert (again.depth / sound.depth.clamp(min=1e-3) - 1)[sound.depth > 0].abs().max() < 1e-5


def test_nothing_is_said_where_poses_say_nothing(make_scene, aim):
    """Two parallel cameras, one camera alone, cameras in one place."""
    sound = replace(make_scene(1, ("front", "left")), depth=None)
    pose = sound.cameras.camera_to_world[0]
    for shift in (0.0, 0.1):
        second = pose.copy()
        second[:3, 3] += shift * pose[:3, 0]
        assert find_problems(with_poses(sound, np.stack([pose, second]))) == []
    assert find_problems(make_scene(1, ("front",)), least=1) == []


def test_depth_settles_cameras_that_look_outwards(make_scene):
    """From the poses alone an outward pair looks like OpenGL axes; depth that two views share says otherwise."""
    sound = make_scene(1, ("front", "left", "top"))
    poses = sound.cameras.camera_to_world @ OPENGL
    assert kinds(with_poses(replace(sound, depth=None), poses)) == ["axes"]
    assert kinds(with_poses(sound, poses)) == ["axes"]
    assert kinds(sound) == []


def test_too_few_views(make_scene):
    with pytest.raises(
        ValueError, match="^views: expected at least 2 cameras, got 1; add views of the same frames$"
    ):
        check_views(make_scene(1, ("front",)))


def test_numbers_that_are_not_finite(make_scene):
    views = make_scene(2)
    images, depth = views.images.clone(), views.depth.clone()
    images[1, 2, 3, 4] = float("nan")
    depth[0, 1, :5] = float("inf")
    bad = replace(views, images=images, depth=depth)
    sentences = [str(p) for p in find_problems(bad) if p.kind == "finite"]
    assert sentences == [
        "images: expected finite numbers, got NaN or infinity in 1 pictures, first in view 'top', frame 1; repair "
        "(--repair) sets them to unknown",
        "depth: expected finite numbers, got NaN or infinity in 1 pictures, first in view 'left', frame 0; repair "
        "(--repair) sets them to unknown",
    ]
    again, done = repair(bad)
    assert find_problems(again) == []
    assert again.confidence.sum() == again.confidence.numel() - 1
    assert (again.depth[0, 1, :5] == 0).all()
    assert len(done) == 2
    with pytest.raises(
        ValueError, match="depth: expected metres above 0 somewhere, got none; leave depth out"
    ):
        check_views(replace(views, depth=torch.zeros_like(views.depth)))


def test_empty_masks(make_scene):
    views = make_scene(3)
    mask = torch.ones_like(views.depth)
    mask[2, 1] = 0
    sentence = "confidence: expected masks that keep some pixels, got 1 that keep none, first in view 'left', frame 2"
    with pytest.raises(ValueError, match=sentence):
        check_views(replace(views, confidence=mask))
    with pytest.raises(ValueError, match=sentence):  # nothing can put that right
        repair(replace(views, confidence=mask))


@pytest.mark.parametrize("whole", [True, False])
def test_depth_in_millimetres(make_scene, whole):
    views = make_scene(2)
    depth = views.depth * 1000
    bad = replace(views, depth=depth.round() if whole else depth)
    found = find_problems(bad)
    assert [p.remedy for p in found] == [1e-3]
    assert re.fullmatch(
        r"depth: expected metres, got a median of 1\d\d\d.*looks like millimetres; read it with depth scale 0\.001, or "
        r"repair \(--repair\)",
        str(found[0]),
    )
    again, done = repair(bad)
    assert (again.depth - views.depth).abs().max() < 1e-3
    assert done == ["depth: multiplied by 0.001"]


def test_whole_numbers_of_one_camera_are_millimetres(make_scene):
    views = make_scene(1, ("front",))
    assert kinds(replace(views, depth=(views.depth * 1000).round()), least=1) == ["depth"]


@pytest.mark.parametrize("factor", [0.25, 1.4, 6.0])
def test_depth_and_poses_of_different_scale(make_scene, factor):
    views = make_scene(2)
    bad = replace(views, depth=views.depth / factor)
    found = find_problems(bad)
    assert [p.kind for p in found] == ["depth"]
    assert found[0].remedy == pytest.approx(factor, rel=0.03)
    assert "depth: expected the scale of the poses, got one that fits them times" in str(found[0])
    again, _ = repair(bad)
    assert (again.depth / views.depth.clamp(min=1e-3))[views.depth > 0].mean() == pytest.approx(1, rel=0.03)
    exact, _ = repair(bad, depth_scale=factor)
    assert (exact.depth - views.depth).abs().max() < 1e-5


@pytest.mark.parametrize("depth", [True, False])
def test_a_view_that_sees_nothing_of_the_others(make_scene, aim, depth):
    views = make_scene(1)
    poses = views.cameras.camera_to_world.copy()
    poses[2] = aim((8.0, 8.0, 1.0), (20.0, 20.0, 0.9))
    bad = with_poses(views if depth else replace(views, depth=None), poses)
    with pytest.raises(
        ValueError,
        match=r"views: expected views that overlap in one chain, got \['top'\] that see nothing",
    ):
        check_views(bad)


@pytest.mark.parametrize("turn", range(6))
def test_a_pair_that_shares_nothing_is_not_taken_for_wrong_axes(make_scene, aim, turn):
    views = make_scene(1)
    pair = views.select(views.names[:2])
    poses = pair.cameras.camera_to_world.copy()
    away = np.array([np.cos(turn), np.sin(turn), 0.3])
    poses[1] = aim(tuple(6 * away), tuple(20 * away))
    assert {problem.kind for problem in find_problems(with_poses(pair, poses))} == {"blind"}


def arrays(views):
    """What a user with numpy arrays holds."""
    names = views.names
    return {
        "images": {
            n: (views.images[:, v].numpy() * 255).round().astype(np.uint8) for v, n in enumerate(names)
        },
        "intrinsics": {n: views.cameras.intrinsics[v] for v, n in enumerate(names)},
        "poses": {n: views.cameras.camera_to_world[v] for v, n in enumerate(names)},
        "depth": {n: views.depth[:, v].numpy() for v, n in enumerate(names)},
    }


def test_views_from_arrays(make_scene):
    views = make_scene(3)
    again = build_views(**arrays(views), masks={n: np.ones((3, 40, 48)) for n in views.names}, fps=30)
    assert (again.images - views.images).abs().max() < 0.003
    assert torch.equal(again.depth, views.depth)
    assert (again.fps, float(again.confidence.min()), again.cameras.frames) == (30, 1.0, None)
    given = arrays(views)
    given["poses"] = {n: written(p, "opengl") for n, p in given["poses"].items()}
    given["poses"]["left"] = np.stack([given["poses"]["left"]] * 3)
    moving = build_views(**given, axes="auto", depth_scale=1.0)
    np.testing.assert_allclose(moving.cameras.camera_to_world[1], views.cameras.camera_to_world, atol=1e-12)


@pytest.mark.parametrize(
    ("axis", "guess"),
    [("x", "y"), ("y", "y"), ("z", "z")],
)
def test_left_handed_poses_name_the_axis(make_scene, axis, guess):
    """x and y look the same to a rig; y, the likelier one, is named."""
    views = make_scene(1)
    given = arrays(views)
    given["poses"] = {n: flip(axis, p) for n, p in given["poses"].items()}
    sentence = (
        r"poses\['front'\]: expected a right-handed pose \(det \+1\), got a left-handed one \(det -1\), as 3 of 3 "
        "are; flip its " + guess
    )
    with pytest.raises(ValueError, match=sentence):
        build_views(**given)
    again = build_views(**given, flip_axis=axis)
    np.testing.assert_allclose(again.cameras.camera_to_world, views.cameras.camera_to_world, atol=1e-12)
    with pytest.raises(ValueError, match="axis: expected 'x', 'y' or 'z', got 'w'"):
        build_views(**given, flip_axis="w")


BAD = {
    "frames": (
        lambda a: a["images"].update(left=a["images"]["left"][:2]),
        "images: expected all views to have the same number of frames, got 3 of 'front' and 2 of 'left'; cut",
    ),
    "missing": (
        lambda a: a["poses"].pop("top"),
        r"poses: expected the views \['front', 'left', 'top'\], missing 'top'",
    ),
    "nan": (
        lambda a: a["poses"].update(left=np.full((4, 4), np.nan)),
        r"poses\['left'\]: expected a pose of 4 x 4 finite numbers, got NaN or infinity",
    ),
    "scale": (
        lambda a: a["poses"].update(top=2 * np.eye(4)),
        r"poses\['top'\]: expected a rigid pose .*, got R R\^T off by 3",
    ),
    "size": (
        lambda a: a["images"].update(top=a["images"]["top"][:, :20]),
        "images: expected pictures of one size, got .*resize them and scale the intrinsics",
    ),
    "none": (lambda a: a["images"].clear(), "images: expected at least one view, got none"),
    "axes": (lambda a: a.update(axes="blender"), "axes: expected one of opencv, opengl, .* got 'blender'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays(make_scene, name):
    given = arrays(make_scene(3))
    change, sentence = BAD[name]
    change(given)
    with pytest.raises(ValueError, match=sentence):
        build_views(**given)


def test_longer_streams_are_cut_on_request(make_scene):
    given = arrays(make_scene(3))
    given["images"]["left"] = given["images"]["left"][:2]
    given["depth"]["left"] = given["depth"]["left"][:2]
    assert len(build_views(**given, frames="common")) == 2


def test_bad_repairs(make_scene):
    with pytest.raises(
        ValueError,
        match="depth_scale: expected a factor above 0, got -1; 0.001 turns millimetres into metres",
    ):
        repair(make_scene(), depth_scale=-1)
    with pytest.raises(ValueError, match="axes: expected one of .*, auto, got 'gl'"):
        repair(make_scene(), axes="gl")


def test_recorded_cameras_are_sound(make_scene):
    """The anchors of the simulator, one of them in another convention."""
    poses = np.stack(
        [written(make_scene().cameras.camera_to_world[n], "opengl" if n == 2 else "opencv") for n in range(3)]
    )
    views = with_poses(make_scene(), poses)
    assert kinds(views) == [
        "blind"
    ]  # one camera of another mind is not a convention: it sees nothing of the others
    assert isinstance(views.cameras, Cameras)


@pytest.mark.parametrize("metres", [3.0, 30.0, 100.0, 1000.0])
@pytest.mark.parametrize("across", [(1, 0, 0), (1, 1, 1)])
def test_cameras_far_apart_share_nothing_under_any_reading(make_scene, metres, across):
    """Scaled far enough, the depth of any cameras that look alike agrees somewhere: that is no proof, and no repair."""
    views = make_scene(2)
    poses = views.cameras.camera_to_world.copy()
    poses[:, :3, 3] += metres * np.arange(len(poses))[:, None] * np.array(across)
    with pytest.raises(ValueError, match="views: expected views that overlap in one chain"):
        repair(with_poses(views, poses))


def test_two_groups_that_share_nothing_are_not_one_capture(make_scene):
    views = make_scene(1)
    poses = views.cameras.camera_to_world.copy()
    far = poses + np.array([[0, 0, 0, 100.0], *np.zeros((3, 4))])
    both = replace(
        views,
        cameras=Cameras(
            [*views.names, *(f"far_{name}" for name in views.names)],
            np.tile(views.cameras.intrinsics, (2, 1, 1)), np.concatenate([poses, far]),
            views.cameras.width, views.cameras.height,
        ),
        images=torch.cat([views.images] * 2, 1), depth=torch.cat([views.depth] * 2, 1), body_ids=None, provenance=None,
    )  # fmt: skip
    found = find_problems(both)
    assert [problem.kind for problem in found] == ["blind"]
    assert found[0].remedy == [f"far_{name}" for name in views.names]
