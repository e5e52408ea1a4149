"""COLMAP models as text and binary: there and back, lenses, names in time, damage."""

import struct
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataengine.captures import read_colmap, write_colmap
from dataengine.captures.colmap_files import MODELS, pose_matrix, quaternion


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 1e-3))
def test_quaternions_have_the_scalar_first(q):
    rotation = pose_matrix(q, (0, 0, 0))[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(pose_matrix(quaternion(rotation), (0, 0, 0))[:3, :3], rotation, atol=1e-12)


def test_a_turn_about_z():
    half = np.pi / 8
    rotation = pose_matrix((np.cos(half), 0, 0, np.sin(half)), (0, 0, 0))[:3, :3]
    np.testing.assert_allclose(rotation @ (1, 0, 0), (np.cos(2 * half), np.sin(2 * half), 0), atol=1e-12)


@pytest.mark.parametrize("frames", [1, 3])
def test_there_and_back(tmp_path, make_scene, frames):
    views = make_scene(frames)
    write_colmap(tmp_path, views)
    again, points, colors = read_colmap(tmp_path)
    assert again.names == views.names
    np.testing.assert_allclose(again.cameras.camera_to_world, views.cameras.camera_to_world, atol=1e-12)
    np.testing.assert_allclose(again.cameras.intrinsics, views.cameras.intrinsics)
    assert (again.images - views.images).abs().max() < 0.003
    assert (again.depth, len(again)) == (None, frames)
    assert len(points) == len(colors) > 1000
    assert np.abs(points[:, 2]).max() < 0.4  # the floor and the ball


def test_points_and_colours_of_the_caller(tmp_path, make_scene):
    cloud = np.random.default_rng(0).normal(size=(7, 3)) * 0.1
    place = write_colmap(tmp_path, make_scene(), cloud, np.tile([0.0, 0.5, 1.0], (7, 1)))
    views, points, colors = read_colmap(place, tmp_path / "images", scale=2.0)
    np.testing.assert_array_equal(points, 2 * cloud)
    np.testing.assert_array_equal(colors[0], [0, 128, 255])
    np.testing.assert_allclose(
        views.cameras.camera_to_world[:, :3, 3], 2 * make_scene().cameras.camera_to_world[:, :3, 3]
    )


def test_moving_cameras_and_changing_lenses(tmp_path, make_scene):
    views = make_scene(3, moving=True)
    zoom = np.stack([views.cameras.intrinsics * (1, 1, 1)] * 3)
    zoom[:, 0, 0, 0] += np.arange(3)
    views = replace(views, cameras=replace(views.cameras, intrinsics=zoom))
    again, _, _ = read_colmap(write_colmap(tmp_path, views))
    np.testing.assert_allclose(again.cameras.intrinsics, zoom)
    np.testing.assert_allclose(again.cameras.camera_to_world, views.cameras.camera_to_world, atol=1e-12)


def binary_model(place, views, model="PINHOLE", parameters=None):
    """The three binary files as COLMAP lays them out, keypoints and tracks included."""
    place.mkdir(parents=True, exist_ok=True)
    k = views.cameras.intrinsics[0]
    parameters = parameters or [k[0, 0], k[1, 1], k[0, 2], k[1, 2]]
    number = MODELS[model][0]
    camera = struct.pack("<iiQQ", 7, number, 48, 40) + struct.pack(f"<{len(parameters)}d", *parameters)
    (place / "cameras.bin").write_bytes(struct.pack("<Q", 1) + camera)
    images = struct.pack("<Q", len(views.names))
    for n, name in enumerate(views.names):
        pose = views.cameras.world_to_camera[n]
        images += struct.pack("<i7di", n + 3, *quaternion(pose[:3, :3]), *pose[:3, 3], 7)
        images += f"{name}/000000.png".encode() + b"\0"
        images += struct.pack("<Q", n) + struct.pack("<ddq", 1.5, 2.5, -1) * n
    (place / "images.bin").write_bytes(images)
    points = struct.pack("<Q", 2)
    for n in range(2):
        points += struct.pack("<Q3d3BdQ", 10 + n, 0.1 * n, 0.2, 0.0, 10, 20, 30 + n, 0.5, n + 1)
        points += struct.pack("<ii", 3, 0) * (n + 1)
    (place / "points3D.bin").write_bytes(points)


def test_binary(tmp_path, make_scene):
    views = make_scene()
    text = tmp_path / "text"
    write_colmap(text, views)
    binary_model(tmp_path / "binary", views)
    again, points, colors = read_colmap(tmp_path / "binary", text / "images")
    assert again.names == views.names
    np.testing.assert_allclose(again.cameras.camera_to_world, views.cameras.camera_to_world, atol=1e-12)
    np.testing.assert_allclose(points, [[0, 0.2, 0], [0.1, 0.2, 0]])
    np.testing.assert_array_equal(colors, [[10, 20, 30], [10, 20, 31]])


@pytest.mark.parametrize(
    ("model", "parameters", "expected", "bent"),
    [
        ("SIMPLE_PINHOLE", [52, 23, 21], (52, 52), False),
        ("SIMPLE_RADIAL", [52, 23, 21, -0.2], (52, 52), True),
        ("RADIAL", [52, 23, 21, -0.2, 0.01], (52, 52), True),
        ("OPENCV", [52, 51, 23, 21, -0.2, 0.01, 0.0, 0.0], (52, 51), True),
    ],
)
def test_lenses(tmp_path, make_scene, model, parameters, expected, bent):
    views = make_scene()
    write_colmap(tmp_path, views)
    binary_model(tmp_path / "model", views, model, parameters)
    again, _, _ = read_colmap(tmp_path / "model", tmp_path / "images")
    np.testing.assert_allclose(
        again.cameras.intrinsics[0], [[expected[0], 0, 23], [0, expected[1], 21], [0, 0, 1]]
    )
    moved = (again.images - views.images).abs().max()
    assert moved > 0.2 if bent else moved < 0.003


def test_names_say_whether_there_is_time(tmp_path, make_scene):
    write_colmap(tmp_path, make_scene(3))
    still, _, _ = read_colmap(tmp_path, in_time=False)
    assert (len(still), len(still.names)) == (1, 9)
    assert still.names[0] == "front_000000"
    path = tmp_path / "sparse/0/images.txt"
    lines = path.read_text().split("\n")
    gone = next(n for n, line in enumerate(lines) if line.endswith("left/000001.png"))
    path.write_text("\n".join(lines[:gone] + lines[gone + 2 :]))
    with pytest.raises(
        ValueError,
        match="frames: expected all cameras to have the same moments, got 3 of 'front' and 2 of 'left'",
    ):
        read_colmap(tmp_path)
    assert len(read_colmap(tmp_path, frames="common")[0]) == 2


@pytest.mark.parametrize("file", ["cameras.bin", "images.bin", "points3D.bin"])
def test_cut_off_binary_is_named(tmp_path, make_scene, file):
    views = make_scene()
    write_colmap(tmp_path, views)
    binary_model(tmp_path / "model", views)
    path = tmp_path / "model" / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        ValueError,
        match=f"{file}: expected a whole COLMAP file, got one that cannot be read .*; copy it again",
    ):
        read_colmap(tmp_path / "model", tmp_path / "images")


def test_bad_models(tmp_path, make_scene):
    views = make_scene()
    with pytest.raises(
        FileNotFoundError,
        match=r"expected cameras and images as \.bin or \.txt here, in sparse/0 or in sparse",
    ):
        read_colmap(tmp_path)
    write_colmap(tmp_path, views)
    binary_model(tmp_path / "model", views, "OPENCV_FISHEYE", [52, 51, 23, 21, 0, 0, 0, 0])
    with pytest.raises(
        ValueError, match=r"cameras\.bin: expected a camera model among SIMPLE_PINHOLE, .* got OPENCV_FISHEYE"
    ):
        read_colmap(tmp_path / "model", tmp_path / "images")
    text = tmp_path / "sparse/0/cameras.txt"
    good = text.read_text()
    text.write_text(good.replace("PINHOLE 48 40", "PINHOLE 48 forty"))
    with pytest.raises(ValueError, match=r"cameras\.txt: expected a whole COLMAP file"):
        read_colmap(tmp_path)
    text.write_text("\n".join(good.split("\n")[:2]))
    with pytest.raises(
        ValueError,
        match=r"left/000000\.png: expected a camera among \[1\], got 2; take cameras and images of one",
    ):
        read_colmap(tmp_path)
    text.write_text(good)
    (tmp_path / "images/left/000000.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"left/000000\.png: expected a picture that the capture names"
    ):
        read_colmap(tmp_path)
    with pytest.raises(ValueError, match="scale: expected metres per unit above 0, got 0"):
        read_colmap(tmp_path, scale=0)
    (tmp_path / "sparse/0/images.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="expected at least one registered image, got none"):
        read_colmap(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("cameras", "PINHOLE 48", "PINHOLE 0", r"cameras\.txt: expected pictures of at least 1 pixel, .* of 0 x 40"),
        ("cameras", "52.0", "-52.0", r"cameras\.txt: expected .* focal lengths above 0"),
        ("cameras", "52.0", "nan", r"cameras\.txt: expected .* finite numbers, got PINHOLE"),
        ("images", "QUATERNION", "0 0 0 0", r"images\.txt: expected a quaternion that is not 0, .* of 'front/000000.png'"),
        ("images", "QUATERNION", "inf 0 0 0", r"images\.txt: expected a quaternion that is not 0"),
        ("images", "QUATERNION", "one 0 0 0", r"images\.txt: expected numbers, got 'one 0 0 0"),
        ("images", "front/", "fr\0nt/", r"images\.txt: expected a quaternion that is not 0, a translation and a name"),
        ("points3D", " 0 0 255", " 0 0 256", r"points3D\.txt: expected three finite numbers and three bytes as point 0"),
        ("points3D", " 0 0 255 0", "", r"points3D\.txt: expected three finite numbers and three bytes as point 0"),
        ("points3D", "0.25", "nan", r"points3D\.txt: expected three finite numbers and three bytes as point 0"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_named(tmp_path, make_scene, file, old, new, sentence):
    place = write_colmap(tmp_path, make_scene(), np.full((2, 3), 0.25), np.tile([0, 0, 255], (2, 1)))
    path = place / f"{file}.txt"
    text = path.read_text()
    if old == "QUATERNION":
        old = " ".join(text.splitlines()[2].split()[1:5])
    assert old in text
    path.write_text(text.replace(old, new, 1 if file != "points3D" else -1))
    with pytest.raises(ValueError, match=sentence):
        read_colmap(tmp_path)


@pytest.mark.parametrize("suffix", [".txt", ".bin"])
@pytest.mark.parametrize("file", ["cameras", "images", "points3D"])
def test_whatever_is_damaged_comes_out_as_views_or_a_sentence(tmp_path, make_scene, suffix, file):
    views = make_scene(1, ("front", "left")).scaled_to(12, 10)
    place = write_colmap(tmp_path, views, np.zeros((12, 3)))
    if suffix == ".bin":
        binary_model(place, views)
    path = place / f"{file}{suffix}"
    good, draw = path.read_bytes(), np.random.default_rng(0)
    odd = [b"", b"nan", b" x ", b" 0 ", b"\0" * 8, b"\xff" * 8, b"\n", struct.pack("<d", np.inf), b"9" * 400]
    for _ in range(60):
        start = int(draw.integers(len(good)))
        end = start + int(draw.choice([1, 4, 8, len(good)]))
        path.write_bytes(good[:start] + odd[draw.integers(len(odd))] + good[end:])
        assert "expected" in outcome(tmp_path)


def outcome(folder):
    """The sentence with which a model is refused; the words expected of one that is read."""
    try:
        return f"expected {read_colmap(folder)[0].names}"
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def test_points_of_another_model_are_noticed(tmp_path, make_scene):
    write_colmap(tmp_path, make_scene(), np.full((20, 3), 50.0))
    with pytest.raises(
        ValueError,
        match="points3D: expected most points before the cameras, got 100% of 20 outside all pictures",
    ):
        read_colmap(tmp_path)
    with pytest.raises(
        ValueError, match=r"points, colors: expected \[N, 3\] each, got \[20, 2\] and \[20, 2\]"
    ):
        write_colmap(tmp_path, make_scene(), np.zeros((20, 2)))
    with pytest.raises(ValueError, match="points: expected finite metres, got NaN or infinity"):
        write_colmap(tmp_path, make_scene(), np.full((2, 3), np.nan))


def test_camera_to_world_in_the_model_is_noticed(tmp_path, make_scene):
    views = replace(make_scene(), depth=None)
    wrong = replace(views.cameras, camera_to_world=views.cameras.world_to_camera)
    write_colmap(tmp_path, replace(views, cameras=wrong))
    with pytest.raises(
        ValueError,
        match="expected world-to-camera matrices, .* looks like OpenCV axes .*; read them with axes 'opencv'",
    ):
        read_colmap(tmp_path)
    again, _, _ = read_colmap(tmp_path, axes="opencv")
    np.testing.assert_allclose(again.cameras.camera_to_world, views.cameras.camera_to_world, atol=1e-12)


def test_grey_pictures(tmp_path, make_scene):
    views = make_scene()
    write_colmap(tmp_path, views)
    path = tmp_path / "images/front/000000.png"
    cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_GRAYSCALE))
    image = read_colmap(tmp_path)[0].images[0, 0]
    assert torch.equal(image[..., 0], image[..., 2])
