"""New cameras around what others look at."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataengine.cameras import Cameras
from dataengine.captures.geometry import focus
from dataengine.placement import LOWEST, MARGIN, find_up, on_dome, place_cameras, spread
from tests.dataengine.scene.conftest import look_at, ring


def dome(cameras, up=(0.0, 0.0, 1.0), centre=(0.0, 0.0, 0.0)):
    return on_dome(cameras.camera_to_world, np.array(centre), np.array(up))


def test_new_cameras_look_at_the_meeting_point_upright_from_where_others_stand():
    given_ = ring(3, height=0.7)
    placed = place_cameras(given_, 7)
    assert placed.names == tuple(f"view_{i:02d}" for i in range(7))
    pixels, depth = placed.project(np.zeros((1, 3)))
    np.testing.assert_allclose(pixels[:, 0], 12.0, atol=1e-6)  # the middle of the picture
    np.testing.assert_allclose(depth, np.hypot(1.2, 0.7), rtol=1e-9)
    assert (placed.camera_to_world[:, 2, 1] < 0).all()  # y points down
    np.testing.assert_allclose(placed.camera_to_world[:, 2, 0], 0.0, atol=1e-9)  # x is level
    _, elevations, _ = dome(placed)
    assert (elevations > LOWEST).all()
    assert np.ptp(elevations) > 5  # on a dome, not on a circle


def test_every_direction_is_new():
    seen, placed = ring(4, height=0.7), place_cameras(ring(4, height=0.7), 12)
    ways = np.concatenate([c.camera_to_world[:, :3, 3] for c in (seen, placed)])
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    angles = np.degrees(np.arccos(np.clip(ways @ ways.T, -1, 1))) + 360 * np.eye(16)
    assert angles.min() > 5


@settings(max_examples=30, deadline=None)
@given(
    azimuths=st.lists(st.floats(-720, 720), min_size=1, max_size=6),
    count=st.integers(1, 20),
    margin=st.floats(5, 60),
)
def test_turns_halve_gaps_and_stay_on_the_arc(azimuths, count, margin):
    turns = spread(np.array(azimuths), count, margin)
    gaps = (np.array(turns)[:, None] - np.array(azimuths) + 180) % 360 - 180
    known = np.sort(np.unique(np.round(np.array(azimuths) % 360, 6)))
    widest = np.diff(np.append(known, known[0] + 360)).max()
    outside = np.abs(gaps).min(1)
    assert len(np.unique(np.round(turns, 6))) == count
    assert (outside <= max(margin, widest / 2) + 1e-6).all()
    if widest > 2 * margin and len(known) == 1:
        assert (outside <= margin + 1e-6).all()


def test_two_cameras_are_not_gone_round_behind():
    pair = ring(8).select(["ring_0", "ring_1"])  # 0 and 45 degrees
    azimuths, _, _ = dome(place_cameras(pair, 9))
    assert azimuths.min() >= -MARGIN
    assert azimuths.max() <= 45 + MARGIN


@pytest.mark.parametrize("axis", [np.eye(3)[2], np.eye(3)[1], -np.eye(3)[1]])
def test_the_vertical_is_found_in_any_world(axis):
    turn = np.eye(4)
    if axis[2] != 1:  # z to that axis
        turn[:3, :3] = np.stack([np.eye(3)[0], np.cross(axis, np.eye(3)[0]), axis], 1)
    for names in (["ring_0", "ring_1"], ["ring_0", "ring_2"]):  # opposite cameras have one level axis only
        poses = turn @ ring(4).select(names).camera_to_world
        np.testing.assert_allclose(find_up(poses), axis, atol=1e-9)


def test_cameras_above_each_other_are_no_riddle():
    matrix = ring(1).intrinsics
    poses = np.stack([look_at((1.3, 0.0, 0.6)), look_at((0.6, 0.0, 1.4))])
    np.testing.assert_allclose(find_up(poses), (0, 0, 1))
    placed = place_cameras(Cameras(("low", "high"), np.tile(matrix, (2, 1, 1)), poses, 24, 24), 4)
    azimuths, elevations, _ = dome(placed)
    assert (np.abs(azimuths) <= MARGIN).all()
    assert elevations.max() < 80


def test_a_camera_that_moves_is_passed_over():
    still = ring(2)
    both = np.concatenate([still.camera_to_world, [look_at((0.3, 0.1, 0.4), (0.5, 0.5, 0.0))]])
    poses = np.tile(both, (3, 1, 1, 1))
    poses[:, 2, 0, 3] += [0.0, 0.2, 0.4]
    moving = Cameras(("a", "b", "wrist"), np.tile(still.intrinsics[:1], (3, 1, 1)), poses, 24, 24)
    expected = place_cameras(still, 3).camera_to_world
    np.testing.assert_allclose(place_cameras(moving, 3).camera_to_world, expected)


def with_wrist(targets, over=(0.0, 0.0)):
    """One camera that stands still and looks at the origin, and one that passes `over` a place and looks at `targets`,
    each time with another side up."""
    front, count = ring(1, height=0.7), len(targets)
    poses = np.tile(front.camera_to_world, (count, 2, 1, 1))
    for t, target in enumerate(targets):
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]
        poses[t, 1] = look_at((over[0] + 0.1 * t - 0.2, over[1] + 0.05 * t, 0.3), target) @ turn
    lenses = np.tile(front.intrinsics[:1], (count, 2, 1, 1))
    lenses[:, 1, :2, :2] /= 3
    return Cameras(("front", "wrist"), lenses, poses, 24, 24)


def test_beside_one_camera_that_stands_still_a_wrist_says_only_where_to_look():
    both = with_wrist([(0.02 * t - 0.04, 0.01 * t - 0.03, 0.0) for t in range(5)])
    placed = place_cameras(both, 5)
    centre = focus(placed.camera_to_world)
    np.testing.assert_allclose(centre, 0.0, atol=0.05)
    np.testing.assert_allclose(placed.camera_to_world[:, 2, 0], 0.0, atol=1e-9)  # x is level
    assert (placed.camera_to_world[:, 2, 1] < 0).all()
    azimuths, elevations, distances = dome(placed, centre=centre)
    front = both.camera_to_world[0, 0, :3, 3]
    np.testing.assert_allclose(distances, np.linalg.norm(front - centre))  # not as near as the wrist
    assert (np.abs(azimuths) <= MARGIN + 3).all()
    assert (np.abs(elevations - np.degrees(np.arctan2(0.7, 1.2))) < 10).all()
    np.testing.assert_allclose(placed.intrinsics, np.tile(both.intrinsics[0, :1], (5, 1, 1)))


def test_a_wrist_that_looks_elsewhere_is_told():
    away = with_wrist([(3.0 + 0.02 * t, 4.1, 0.0) for t in range(5)], over=(3.0, 4.0))
    with pytest.raises(
        ValueError, match="cameras: expected those that move to look where 'front' looks, got axes"
    ):
        place_cameras(away, 3)


def test_names_go_on_where_others_ended():
    named = ring(2, name="view")  # view_0, view_1
    assert place_cameras(named, 2).names == ("view_02", "view_03")


def test_cameras_that_meet_nowhere_are_refused():
    poses = np.stack([look_at((x, 0.0, 1.0), (x, 1.0, 1.0)) for x in (0.0, 0.3)])
    side = Cameras(("a", "b"), ring(2).intrinsics, poses, 24, 24)
    assert focus(poses) is None
    with pytest.raises(
        ValueError, match="cameras: expected at least two that look at one place from different"
    ):
        place_cameras(side, 2)
    with pytest.raises(ValueError, match="count: expected at least 1 new camera, got 0"):
        place_cameras(ring(2), 0)
