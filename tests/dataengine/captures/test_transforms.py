"""transforms.json: there and back, what others write, and what is refused."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from dataengine.captures import read_transforms, write_transforms
from dataengine.captures.geometry import OPENGL


def same_cameras(a, b):
    assert a.names == b.names
    np.testing.assert_allclose(a.camera_to_world, b.camera_to_world, atol=1e-12)
    np.testing.assert_allclose(a.intrinsics, b.intrinsics, atol=1e-12)


@pytest.mark.parametrize("moving", [False, True])
def test_there_and_back(tmp_path, make_scene, moving):
    views = make_scene(3, moving=moving)
    views = replace(
        views,
        confidence=(views.depth > 0).float(),
        provenance=torch.tensor([[0, 1, 2]] * 3),
        fps=12.5,
    )
    write_transforms(tmp_path, views)
    again = read_transforms(tmp_path)
    same_cameras(again.cameras, views.cameras)
    assert again.fps == 12.5
    assert (again.images - views.images).abs().max() <= 0.5 / 255 + 1e-6
    assert (again.depth - views.depth).abs().max() <= 0.5e-3 + 1e-6
    assert torch.equal(again.confidence, views.confidence)
    assert torch.equal(again.body_ids, views.body_ids)
    assert torch.equal(again.provenance, views.provenance)


def test_one_frame_is_a_still_capture(tmp_path, make_scene):
    views = make_scene()
    write_transforms(tmp_path, views)
    assert "time" not in json.loads((tmp_path / "transforms.json").read_text())["frames"][0]
    same_cameras(read_transforms(tmp_path / "transforms.json").cameras, views.cameras)


def edit(folder, change, frame=None):
    path = folder / "transforms.json"
    values = json.loads(path.read_text())
    change(values if frame is None else values["frames"][frame])
    path.write_text(json.dumps(values))


def test_matrix_is_flipped_once(tmp_path, make_scene):
    """The matrix on disk is OpenGL: its third column points away from the scene."""
    views = make_scene()
    write_transforms(tmp_path, views)
    matrix = np.array(json.loads((tmp_path / "transforms.json").read_text())["frames"][0]["transform_matrix"])
    np.testing.assert_allclose(matrix, views.cameras.camera_to_world[0] @ OPENGL)
    assert matrix[:3, 2] @ matrix[:3, 3] > 0


def test_as_others_write_it(tmp_path, make_scene):
    """Shared intrinsics as an angle, files without suffix, no camera names, transparent pictures, float depth."""
    views = make_scene(4)
    write_transforms(tmp_path, views)
    values = json.loads((tmp_path / "transforms.json").read_text())
    for entry in values["frames"]:
        for key in ("camera", "fl_x", "fl_y", "cx", "cy", "w", "h", "segmentation_path", "provenance"):
            entry.pop(key, None)
        depth = cv2.imread(str(tmp_path / entry["depth_file_path"]), cv2.IMREAD_UNCHANGED) / 1000
        suffix = ".npy" if "front" in entry["file_path"] else ".tiff"
        entry["depth_file_path"] = entry["depth_file_path"].replace(".png", suffix)
        target = tmp_path / entry["depth_file_path"]
        np.save(target, depth[..., None]) if suffix == ".npy" else cv2.imwrite(
            str(target), depth.astype(np.float32)
        )
        entry["file_path"] = "./" + entry["file_path"].removesuffix(".png")
    del values["fps"]
    values["camera_angle_x"] = 2 * np.arctan(24 / 52)
    for entry in values["frames"]:
        entry["time"] *= 100  # seconds at 0.1 frames per second
    (tmp_path / "transforms.json").write_text(json.dumps(values))
    again = read_transforms(tmp_path, check=False)
    assert again.names == views.names
    assert len(again) == 4
    assert again.fps == pytest.approx(0.1)
    np.testing.assert_allclose(again.cameras.intrinsics[0], [[52, 0, 24], [0, 52, 20], [0, 0, 1]])
    assert (again.depth - views.depth).abs().max() < 1e-3
    picture = cv2.imread(str(tmp_path / "images/front/000000.png"))
    clear = np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])
    cv2.imwrite(str(tmp_path / "images/front/000000.png"), clear)
    assert read_transforms(tmp_path, check=False).images[0, 0].min() == 1.0


@pytest.mark.parametrize(
    "pattern", ["images/{camera}_{t:04d}.png", "{camera}/frame_{t:05d}.png", "all/{n:04d}.png"]
)
def test_cameras_are_told_apart_by_folder_name_or_pose(tmp_path, make_scene, pattern):
    views = make_scene(3)
    write_transforms(tmp_path, views)
    values = json.loads((tmp_path / "transforms.json").read_text())
    for n, entry in enumerate(values["frames"]):
        source = tmp_path / entry["file_path"]
        entry["file_path"] = pattern.format(camera=entry.pop("camera"), t=n // 3, n=n)
        (tmp_path / entry["file_path"]).parent.mkdir(exist_ok=True)
        (tmp_path / entry["file_path"]).write_bytes(source.read_bytes())
    (tmp_path / "transforms.json").write_text(json.dumps(values))
    again = read_transforms(tmp_path)
    names = views.names if "camera" in pattern else ("camera_000", "camera_001", "camera_002")
    assert again.names == names
    np.testing.assert_allclose(again.cameras.camera_to_world, views.cameras.camera_to_world, atol=1e-12)
    assert (again.images - views.images).abs().max() < 0.003


def test_one_moving_camera(tmp_path, make_scene):
    views = make_scene(3, names=("top",), moving=True)
    write_transforms(tmp_path, views)
    edit(tmp_path, lambda v: [f.pop("camera") for f in v["frames"]])
    again = read_transforms(tmp_path)
    assert (len(again), len(again.names), again.cameras.frames) == (3, 1, 3)


def test_smaller_pictures_than_the_file_says(tmp_path, make_scene):
    views = make_scene()
    write_transforms(tmp_path, views)
    for path in (tmp_path / "images").glob("*/*.png"):
        cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (24, 20), interpolation=cv2.INTER_AREA))
    again = read_transforms(tmp_path)
    np.testing.assert_allclose(again.cameras.intrinsics, views.cameras.scaled_to(24, 20).intrinsics)
    assert again.depth.shape == (1, 3, 20, 24)


def test_lens_distortion_is_taken_out(tmp_path, make_scene):
    """Points of the undistorted picture lie where a pinhole puts them: a distorted dot comes back to its place."""
    views = make_scene(names=("front",))
    distortion = {"k1": -0.3, "k2": 0.1, "p1": 0.02, "p2": -0.01}
    matrix = views.cameras.intrinsics[0].copy()
    where = np.array([35.5, 12.5])  # the centre of pixel (12, 35)
    ray = np.append((where - matrix[:2, 2]) / matrix[(0, 1), (0, 1)], 1.0)
    bent = cv2.projectPoints(
        ray[None],
        np.zeros(3),
        np.zeros(3),
        matrix,
        np.array([distortion[k] for k in ("k1", "k2", "p1", "p2")]),
    )[0].reshape(2)
    u, v = np.meshgrid(np.arange(48) + 0.5, np.arange(40) + 0.5)
    dot = np.exp(-((u - bent[0]) ** 2 + (v - bent[1]) ** 2) / 8)[..., None].repeat(3, -1)
    write_transforms(
        tmp_path, replace(views, images=torch.from_numpy(dot.astype(np.float32))[None, None], depth=None)
    )
    edit(tmp_path, lambda values: values.update(distortion))
    again = read_transforms(tmp_path)
    picture = again.images[0, 0, ..., 0].numpy()
    mass = picture * (picture > 0.2)
    found = np.array([(u * mass).sum(), (v * mass).sum()]) / mass.sum()
    assert np.abs(bent - where).max() > 0.4
    assert np.abs(found - where).max() < 0.2
    edit(tmp_path, lambda values: values.update(k1=0.4, k2=0.0, p1=0.0, p2=0.0))
    border = read_transforms(tmp_path).confidence[0, 0]
    assert border[0, 0] == 0  # nothing was seen there
    assert border[20, 24] == 1


def spoil(**values):
    return lambda entry: entry.update(values)


BAD = {
    "fisheye": (
        spoil(camera_model="OPENCV_FISHEYE"),
        None,
        r"images.front.000000\.png: expected a camera_model among OPENCV, .*",
    ),
    "k4": (
        spoil(k4=0.1),
        None,
        "expected distortion in k1, k2, k3, p1, p2, got k4 too; undistort the pictures first",
    ),
    "focal": (
        lambda e: [e.pop("fl_x"), e.pop("fl_y")],
        1,
        r"left.000000\.png: expected fl_x or camera_angle_x, found neither; write the focal length",
    ),
    "file_path": (
        spoil(file_path=""),
        2,
        r"transforms\.json: expected file_path in frame 2, got none; remove the frame",
    ),
    "frames by name": (
        spoil(frames={"a": {}}),
        None,
        r"transforms\.json: expected a list 'frames' with at least one picture, got dict; is it a transforms.json",
    ),
    "no object": (
        lambda v: v["frames"].__setitem__(4, "left.png"),
        None,
        r"transforms\.json: expected an object as frame 4, got str; remove it or describe its picture",
    ),
    "no text": (
        spoil(file_path=3),
        1,
        r"transforms\.json, frame 1: expected the name of a file as file_path, got 3",
    ),
    "depth": (spoil(depth_file_path=[1]), 1, "frame 1, .*name of a file as depth_file_path"),
    "word": (
        spoil(fl_x="52"),
        1,
        r"transforms\.json, frame 1, images.left.000000\.png: expected a focal length in pixels above 0 as fl_x, "
        "got '52'; correct it",
    ),
    "zero": (
        spoil(fl_x=0),
        2,
        "frame 2, .*: expected a focal length in pixels above 0 as fl_x, got 0; correct it",
    ),
    "negative": (
        spoil(fl_y=-52.0),
        2,
        "frame 2, .*: expected a focal length in pixels above 0 as fl_y, got -52.0",
    ),
    "no number": (spoil(cx=float("nan")), 5, "frame 5, .*: expected a finite number as cx, got nan"),
    "wide": (
        lambda e: [e.pop("fl_x"), e.pop("fl_y"), e.update(camera_angle_x=3.5)],
        0,
        "frame 0, .*: expected an angle in radians between 0 and pi as camera_angle_x, got 3.5",
    ),
    "side": (spoil(w=0), 0, "frame 0, .*: expected a number of pixels as w, got 0"),
    "bend": (spoil(k1=[0.1]), None, r"frame 0, .*: expected a finite number as k1, got \[0.1\]"),
    "when": (spoil(time="now"), 3, "frame 3, .*: expected a time in seconds as time, got 'now'"),
    "fps": (spoil(fps=0), None, r"transforms\.json: expected a number above 0 as fps, got 0; correct it"),
    "unit": (
        spoil(integer_depth_scale="mm"),
        None,
        r"transforms\.json: expected a number above 0 as integer_depth_scale, got 'mm'; correct it",
    ),
    "no matrix": (
        spoil(transform_matrix=None),
        4,
        "frame 4, .*left.000001.png: expected 4 rows of 4 numbers as transform_matrix, got None; correct it",
    ),
    "words": (
        spoil(transform_matrix=[["1", 0, 0, 0]] * 4),
        1,
        "frame 1, .*: expected 4 rows of 4 numbers as transform_",
    ),
    "ragged": (
        spoil(transform_matrix=[[1, 0, 0, 0], [0, 1]]),
        1,
        "frame 1, .*: expected 4 rows of 4 finite numbers as transform_matrix, got",
    ),
    "no frames": (spoil(frames=[]), None, "expected a list 'frames' with at least one picture, got none"),
    "nan": (
        lambda e: e["transform_matrix"][0].__setitem__(3, float("nan")),
        0,
        r"transforms\.json, frame 0, .*front.000000\.png: expected a pose of 4 x 4 finite numbers, got NaN or infinity; "
        "leave this picture out",
    ),
    "shape": (
        spoil(transform_matrix=[[1, 0, 0, 0]]),
        0,
        r"expected a pose of 4 x 4 finite numbers, got the shape \[1, 4\]",
    ),
    "scaled": (
        lambda e: e.update(transform_matrix=(np.array(e["transform_matrix"]) * 2).tolist()),
        0,
        "expected a rigid pose with a last row of 0 0 0 1, got R R.T off by 3",
    ),
    "mirrored": (
        lambda e: e.update(
            transform_matrix=(np.array(e["transform_matrix"]) @ np.diag([-1.0, 1, 1, 1])).tolist()
        ),
        0,
        "expected a right-handed pose .det .1., got a left-handed one .det -1., as 1 of 6 are; flip its [xyz] axis, .*: "
        "change the signs of that column of its camera-to-world matrix",
    ),
    "cropped": (
        spoil(w=80),
        0,
        "expected 80 x 40 pixels as its camera says, got 48 x 40; cropping changes a camera",
    ),
    "time": (spoil(time=None), 3, "expected a time as other frames have, got none; give every frame one"),
    "twice": (
        spoil(time=0.1),
        0,
        r"front.000001\.png: expected one picture of camera 'front' at 0\.1, got .*000000\.png too",
    ),
    "unequal": (
        lambda v: v["frames"].pop(),
        None,
        "frames: expected all cameras to have the same moments, got 2 of 'front' and 1 of 'top' with 1 shared; cut to "
        r"those with frames 'common' \(--common-frames\)",
    ),
    "provenance": (
        spoil(provenance="seen"),
        0,
        "expected a provenance among observed, rendered, generated, got 'seen'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_a_sentence(tmp_path, make_scene, name):
    write_transforms(tmp_path, make_scene(2))
    change, frame, sentence = BAD[name]
    edit(tmp_path, change, frame)
    with pytest.raises(ValueError, match=sentence):
        read_transforms(tmp_path)


ODD = [None, "", "x", 0, -1, 1e308, float("nan"), float("inf"), 10**400, True, [], {}, [[None] * 4] * 4, "a\0b", "/", "..",
       1e-320, "images", "depth/front/000000.png", "transforms.json"]  # fmt: skip


@pytest.mark.parametrize("key", ["file_path", "depth_file_path", "mask_path", "segmentation_path", "transform_matrix", "w",
    "fl_x", "camera_angle_x", "cx", "k1", "time", "camera", "camera_model", "provenance", "fps", "depth_unit_scale_factor",
    "frames"])  # fmt: skip
def test_whatever_a_file_says_comes_out_as_views_or_a_sentence(tmp_path, make_scene, key):
    views = make_scene(1, ("front", "left")).scaled_to(12, 10)
    path = write_transforms(tmp_path, replace(views, confidence=torch.ones_like(views.depth)))
    good = path.read_text()
    for value in ODD:
        for everywhere in (False, True):
            values = json.loads(good)
            for entry in values["frames"]:
                entry.update({key: value} if everywhere or entry is values["frames"][1] else {})
                if key == "camera_angle_x":
                    entry.pop("fl_x")
                    entry.pop("fl_y")
            path.write_text(json.dumps(values | ({key: value} if everywhere else {})))
            assert "expected" in outcome(tmp_path), value


def outcome(folder):
    """The sentence with which a capture is refused; the words expected of one that is read."""
    try:
        return f"expected {read_transforms(folder).names}"
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def test_damaged_depth_and_ids_are_named(tmp_path, make_scene):
    write_transforms(tmp_path, make_scene())
    depth = tmp_path / "depth.npy"
    edit(tmp_path, spoil(depth_file_path="depth.npy"), 1)
    np.save(tmp_path / "whole.npy", np.ones((40, 48)))
    whole = (tmp_path / "whole.npy").read_bytes()
    for content in (
        b"",
        whole[:9],
        whole[:-9],
        b"PK\3\4" + bytes(60),
        whole.replace(b"(40, 48)", b"(9**9,4)"),
    ):
        depth.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"depth\.npy: expected an array that numpy saved, got a file that cannot"
        ):
            read_transforms(tmp_path)
    np.save(depth, np.full((40, 48), "far"))
    with pytest.raises(ValueError, match=r"depth\.npy: expected depth as one channel"):
        read_transforms(tmp_path)
    edit(tmp_path, spoil(depth_file_path="", segmentation_path="images/left/000000.png"), 1)
    with pytest.raises(
        ValueError, match=r"left/000000\.png: expected ids as one channel, got a picture in colour"
    ):
        read_transforms(tmp_path)
    edit(tmp_path, spoil(segmentation_path="", mask_path="mask.tiff"), 1)
    cv2.imwrite(str(tmp_path / "mask.tiff"), np.full((40, 48), 7, np.float32))
    with pytest.raises(ValueError, match=r"mask\.tiff: expected a mask of 8 or 16 bits, got float32"):
        read_transforms(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path, make_scene):
    with pytest.raises(FileNotFoundError, match=r"transforms\.json: expected a transforms\.json, found none"):
        read_transforms(tmp_path)
    write_transforms(tmp_path, make_scene(2))
    depth, image = tmp_path / "depth/left/000001.png", tmp_path / "images/left/000001.png"
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"left/000001\.png: expected a picture that the capture names, found none"
    ):
        read_transforms(tmp_path)
    image.write_bytes(content[:60])
    with pytest.raises(
        ValueError, match=r"left/000001\.png: expected a picture, got a file that OpenCV cannot decode"
    ):
        read_transforms(tmp_path)
    image.write_bytes(content)
    depth.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"left/000001\.png: expected depth as one channel of 16-bit integers or floats, got uint8",
    ):
        read_transforms(tmp_path)
    (tmp_path / "transforms.json").write_text("{")
    with pytest.raises(ValueError, match=r"transforms\.json: expected JSON, got broken text"):
        read_transforms(tmp_path)
    with pytest.raises(
        ValueError, match="axes: expected one of opencv, opengl, world_to_camera, .*, auto, got 'blender'"
    ):
        read_transforms(tmp_path, axes="blender")


def test_pictures_of_two_sizes_are_refused(tmp_path, make_scene):
    write_transforms(tmp_path, make_scene())
    path = tmp_path / "images/left/000000.png"
    cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (96, 80)))
    with pytest.raises(
        ValueError, match=r"left.000000\.png: expected 48 x 40 pixels like .*front.*, got 96 x 80; resize"
    ):
        read_transforms(tmp_path)


def test_common_frames_on_request(tmp_path, make_scene):
    write_transforms(tmp_path, make_scene(3))
    edit(tmp_path, lambda values: values["frames"].pop(1))
    views = read_transforms(tmp_path, frames="common")
    assert len(views) == 2
    with pytest.raises(ValueError, match="frames: expected 'equal' or 'common', got 'all'"):
        read_transforms(tmp_path, frames="all")


@pytest.mark.parametrize("depth", [True, False])
def test_opencv_poses_in_the_file_are_noticed_and_read_on_request(tmp_path, make_scene, depth):
    views = make_scene() if depth else replace(make_scene(), depth=None)
    write_transforms(tmp_path, views)
    for n in range(3):
        edit(
            tmp_path,
            lambda e: e.update(transform_matrix=(np.array(e["transform_matrix"]) @ OPENGL).tolist()),
            n,
        )
    with pytest.raises(
        ValueError,
        match=r"expected OpenGL axes .* looks like OpenCV axes \(y down, z forward\); read them with axes 'opencv'",
    ):
        read_transforms(tmp_path)
    for axes in ("opencv", "auto"):
        same_cameras(read_transforms(tmp_path, axes=axes).cameras, views.cameras)


def test_full_disk_leaves_nothing_half_written(tmp_path, make_scene, monkeypatch):
    import errno

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dataengine.storage.os.replace", full)
    with pytest.raises(OSError, match="the disk is full, nothing was changed; free some space"):
        write_transforms(tmp_path, make_scene())
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
