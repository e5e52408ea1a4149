import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataengine.cameras import Cameras


def rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    axis = axis / np.linalg.norm(axis)
    cross = np.cross(np.eye(3), axis)
    return np.eye(3) - np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def two_cameras(width: int = 6, height: int = 4) -> Cameras:
    poses = np.stack([np.eye(4)] * 2)
    poses[1, :3, :3] = rotation(np.array([1.0, 2.0, -1.0]), 0.7)
    poses[1, :3, 3] = (0.3, -0.2, 0.5)
    matrix = np.array([[5.0, 0, width / 2], [0, 5.5, height / 2], [0, 0, 1]])
    return Cameras(("front", "top"), np.stack([matrix, matrix * [[1.1], [1.1], [1]]]), poses, width, height)


def test_projection_of_known_point():
    cameras = two_cameras().select(["front"])
    pixels, depth = cameras.project(np.array([[0.2, -0.1, 2.0]]))
    np.testing.assert_allclose(pixels[0, 0], [5.0 * 0.1 + 3, 5.5 * -0.05 + 2])
    np.testing.assert_allclose(depth, [[2.0]])


def test_centre_of_first_pixel_is_half():
    """OpenCV axes, centres at +0.5: the first pixel's ray goes through (0.5, 0.5)."""
    cameras = two_cameras().select(["front"])
    points = cameras.unproject(np.ones((1, 4, 6)))
    np.testing.assert_allclose(points[0, 0, 0], [(0.5 - 3) / 5.0, (0.5 - 2) / 5.5, 1.0])


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 9),
    height=st.integers(1, 9),
    angle=st.floats(-3, 3),
    axis=st.lists(st.floats(-1, 1), min_size=3, max_size=3).filter(lambda a: np.linalg.norm(a) > 0.1),
    frames=st.integers(0, 3),
)
def test_unproject_inverts_project(width, height, angle, axis, frames):
    pose = np.eye(4)
    pose[:3, :3] = rotation(np.array(axis), angle)
    pose[:3, 3] = axis
    lead = (frames, 1) if frames else (1,)
    matrix = np.array([[width * 1.3, 0, width * 0.4], [0, height * 0.9, height * 0.6], [0, 0, 1]])
    poses = np.broadcast_to(pose, (*lead, 4, 4))
    cameras = Cameras(("a",), matrix[None], poses, width, height)
    depth = np.linspace(0.5, 3, width * height).reshape(height, width)
    points = cameras.unproject(np.broadcast_to(depth, (*lead, height, width)))
    first = points.reshape(-1, height * width, 3)[0]
    pixels, seen = cameras.project(first)
    column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    np.testing.assert_allclose(
        pixels.reshape(-1, height * width, 2)[0], np.stack([column, row], -1).reshape(-1, 2)
    )
    np.testing.assert_allclose(seen.reshape(-1, height * width)[0], depth.ravel())


def test_scaling_keeps_rays():
    """Resizing scales pixels about the corner: the same point lands at scaled coordinates, exactly."""
    cameras = two_cameras()
    points = np.array([[0.1, 0.2, 1.5], [-0.3, 0.1, 2.5]])
    small, _ = cameras.project(points)
    large, _ = cameras.scaled_to(18, 8).project(points)
    np.testing.assert_allclose(large, small * [3, 2])


def test_json_round_trip_is_exact():
    cameras = two_cameras()
    again = Cameras.from_json(cameras.to_json())
    assert again.names == cameras.names
    assert (again.width, again.height) == (6, 4)
    np.testing.assert_array_equal(again.intrinsics, cameras.intrinsics)
    np.testing.assert_array_equal(again.camera_to_world, cameras.camera_to_world)


def test_json_unknown_key_names_the_closest():
    text = two_cameras().to_json().replace('"intrinsics"', '"intrinsic"')
    with pytest.raises(ValueError, match=r"unknown key 'intrinsic'; did you mean 'intrinsics'\?"):
        Cameras.from_json(text)


def test_moving_cameras_by_frame():
    still = two_cameras()
    moving = Cameras(still.names, still.intrinsics, np.stack([still.camera_to_world] * 5), 6, 4)
    assert still.frames is None
    assert moving.frames == 5
    assert moving.at(slice(1, 3)).frames == 2
    assert moving.at(2).frames is None
    assert moving.select(["top"]).camera_to_world.shape == (5, 1, 4, 4)
    np.testing.assert_allclose(
        moving.world_to_camera @ moving.camera_to_world, np.broadcast_to(np.eye(4), (5, 2, 4, 4)), atol=1e-12
    )


def left_handed(pose):
    pose[0, 0, 0] = -1


def scaled(pose):
    pose[0, :3, :3] *= 1.01


def transposed(pose):
    pose[1] = pose[1].T.copy()


def not_finite(pose):
    pose[0, 1, 3] = np.nan


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            left_handed,
            r"camera_to_world: expected a right-handed rotation \(det \+1\), got a left-handed one",
        ),
        (scaled, r"camera_to_world: expected an orthonormal rotation, got R R\^T off by 0\.02"),
        (transposed, "camera_to_world: expected a last row of 0 0 0 1, got .* is the matrix transposed?"),
        (not_finite, "camera_to_world: expected finite numbers, got NaN or infinity"),
    ],
)
def test_bad_poses_say_what_is_wrong(spoil, sentence):
    good = two_cameras()
    pose = good.camera_to_world.copy()
    spoil(pose)
    with pytest.raises(ValueError, match=sentence):
        Cameras(good.names, good.intrinsics, pose, 6, 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"names": ("a", "a")}, "names: expected distinct view names"),
        ({"names": ("a",)}, r"intrinsics: expected shape \[1, 3, 3\] or \[T, 1, 3, 3\], got \[2, 3, 3\]"),
        ({"names": ("a", "b/c")}, "names: expected view names without / and .*, got 'b/c'; rename the view"),
        ({"names": ("a", "..")}, "names: expected view names without"),
        ({"width": 0}, "width, height: expected at least 1 pixel, got 0 x 4"),
        (
            {"intrinsics": np.stack([np.eye(3) * [[-1], [1], [1]]] * 2)},
            "intrinsics: expected positive focal lengths",
        ),
        (
            {"intrinsics": np.ones((2, 3, 3))},
            r"intrinsics: expected \[\[fx, 0, cx\], \[0, fy, cy\], \[0, 0, 1\]\]",
        ),
        (
            {
                "intrinsics": np.stack([np.eye(3)] * 4).reshape(2, 2, 3, 3),
                "camera_to_world": np.stack([np.eye(4)] * 6).reshape(3, 2, 4, 4),
            },
            "intrinsics: expected 3 frames like camera_to_world, got 2",
        ),
    ],
)
def test_bad_fields_say_what_is_wrong(change, sentence):
    good = two_cameras()
    fields = {
        "names": good.names,
        "intrinsics": good.intrinsics,
        "camera_to_world": good.camera_to_world,
        "width": 6,
        "height": 4,
    }
    with pytest.raises(ValueError, match=sentence):
        Cameras(**(fields | change))


def test_bad_arguments_of_methods():
    cameras = two_cameras()
    with pytest.raises(ValueError, match=r"got 'frnt'; did you mean 'front'\?"):
        cameras.select(["frnt"])
    with pytest.raises(ValueError, match=r"points: expected \[N, 3\] metres in the world, got \[3\]"):
        cameras.project(np.zeros(3))
    with pytest.raises(ValueError, match=r"depth: expected \[\.\.\., 2, 4, 6\] metres, got \[2, 6, 4\]"):
        cameras.unproject(np.ones((2, 6, 4)))
