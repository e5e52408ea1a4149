"""Scenes of datasets and captures as files."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch

from dataengine import fit
from dataengine.cameras import Cameras
from dataengine.captures import read_colmap, read_transforms, write_colmap, write_transforms
from dataengine.captures.geometry import WORDS, from_opencv, to_opencv
from dataengine.episodes import DatasetError, EpisodeDataset
from dataengine.errors import MissingPackage
from dataengine.export import read_film, read_ply, read_ply_sequence, read_splat
from dataengine.fit import Fit
from dataengine.lerobot.sidecar import read_cameras
from dataengine.reconstruct import Reconstruction, reconstruct
from dataengine.scenes import check_formats, make_scene, read_parts
from dataengine.sources import windows
from tests.dataengine.scene.conftest import capture, ring, save_dataset

QUICK = Reconstruction(fit=Fit(steps=8, quiet=True))
ALL = ("page", "ply", "film", "splat", "transforms", "colmap")


@pytest.fixture(scope="module")
def seen3():
    return capture(ring(6).select(["ring_0", "ring_1", "ring_2"]))


@pytest.fixture(scope="module")
def dataset(seen3, tmp_path_factory):
    return save_dataset(tmp_path_factory.mktemp("source") / "push", [seen3])


@pytest.fixture(scope="module")
def made(dataset, tmp_path_factory):
    parts = read_parts(dataset.root)
    assert [part.name for part in parts.parts] == ["episode_000"]
    out = tmp_path_factory.mktemp("scenes")
    return out, make_scene(parts.parts[0], out, QUICK, ALL, source="push")


def test_every_format_is_written_and_can_be_read(made, seen3):
    out, scene = made
    assert set(scene.files) == {*ALL, "canonical"}
    assert scene.figures["psnr"] > 20
    page = scene.files["page"].read_text()
    assert page.count("<html") == 1
    assert "push the block 0" in page
    assert "http://" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    frames, fps = read_ply_sequence(scene.files["ply"])
    assert (len(frames), fps) == (4, 10.0)
    film, canonical = read_film(scene.files["film"]), read_ply(scene.files["canonical"])
    assert scene.files["canonical"] == out / "episode_000" / "canonical.ply"
    assert len(film) == 4
    torch.testing.assert_close(canonical.means, film.canonical.means)
    torch.testing.assert_close(frames[3].means, film.at(3).means)
    assert not torch.equal(frames[3].means, frames[0].means)  # the block moves
    assert len(read_splat(scene.files["splat"] / "frame_0002.splat")) == len(canonical)
    again = read_transforms(scene.files["transforms"])
    np.testing.assert_allclose(again.cameras.camera_to_world, seen3.cameras.camera_to_world, atol=1e-6)
    views, points, _ = read_colmap(scene.files["colmap"].parents[1])
    assert len(views) == 4
    assert 100 < len(points) <= len(canonical)
    assert np.abs(points[:, :2]).max() < 1.5


def test_another_format_needs_no_second_fit(made, dataset, monkeypatch):
    out, scene = made
    monkeypatch.setattr(fit._Run, "advance", None)  # a step would fail
    part = read_parts(dataset.root).parts[0]
    again = make_scene(part, out, QUICK, ("splat",), source="push")
    assert again.figures == scene.figures
    assert json.loads((out / "episode_000" / "scene.json").read_text())["figures"] == scene.figures


@pytest.mark.parametrize(
    ("settings", "source", "sentence"),
    [
        (
            dataclasses.replace(QUICK, spacing=3.0),
            "push",
            "settings: expected spacing 1.5 as in .*, got spacing 3.0; choose another folder",
        ),
        (QUICK, "lift", "source: expected push as in .*, got lift; choose another folder"),
    ],
)
def test_another_scene_in_the_folder_is_refused(made, dataset, settings, source, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_scene(read_parts(dataset.root).parts[0], made[0], settings, source=source)


def test_long_recordings_become_several_scenes(dataset):
    parts = read_parts(dataset.root, window=3, observed=("ring_0", "ring_2"), size=12).parts
    assert [part.name for part in parts] == ["episode_000/part_00", "episode_000/part_01"]
    assert [part.frames for part in parts] == [2, 2]
    views = parts[1].load()
    assert (len(views), views.names, views.cameras.width) == (2, ("ring_0", "ring_2"), 12)


@pytest.mark.parametrize("write", [write_transforms, write_colmap])
def test_captures_become_scenes_and_datasets(write, seen3, tmp_path):
    write(tmp_path / "in", seen3)
    parts = read_parts(tmp_path / "in", observed=("ring_0", "ring_1"))
    assert (parts.views, parts.size, parts.parts[0].frames) == (("ring_0", "ring_1"), (24, 24), 4)
    assert parts.kind == ("transforms" if write is write_transforms else "colmap")
    made = make_scene(parts.parts[0], tmp_path / "out", QUICK, ("lerobot",), new_views=2)
    dataset = EpisodeDataset(made.files["lerobot"])
    assert dataset.problems() == []
    assert dataset.views == ("ring_0", "ring_1", "view_00", "view_01")
    episode = dataset.episode(0)
    assert episode.images["view_01"].shape == (4, 24, 24, 3)
    assert {view: int(codes[0]) for view, codes in episode.provenance.items()} == {
        "ring_0": 0, "ring_1": 0, "view_00": 1, "view_01": 1
    }  # fmt: skip
    assert episode.images["view_00"].std() > 5
    with pytest.raises(ValueError, match="expected a dataset of the views"):
        make_scene(parts.parts[0], tmp_path / "out", QUICK, ("lerobot",), new_views=1)


def test_formats_are_checked():
    with pytest.raises(
        ValueError, match="formats: expected some of page, ply, .*, got 'plyy'; did you mean 'ply'"
    ):
        check_formats(("plyy",), "colmap")
    with pytest.raises(ValueError, match="formats: expected at least one of page"):
        check_formats((), "colmap")
    with pytest.raises(
        ValueError, match="formats: expected lerobot for a capture alone, got it for a dataset"
    ):
        check_formats(("lerobot",), "dataset")


def test_rerun_needs_its_package_before_any_work_is_done(monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(
        MissingPackage, match=r"rerun-sdk: expected the package, .*; run pip install 'enerverse\[viewer\]'"
    ):
        check_formats(("page", "rerun"), "dataset")
    monkeypatch.setitem(sys.modules, "rerun", types.ModuleType("rerun"))
    check_formats(("page", "rerun"), "dataset")


def test_rerun_gets_a_recording_beside_the_other_formats(made, dataset, monkeypatch):
    out = made[0]
    monkeypatch.setattr("dataengine.export.log_rerun", lambda film, path: path.with_name(f"{len(film)}.rrd"))
    again = make_scene(read_parts(dataset.root).parts[0], out, QUICK, ("rerun",), source="push")
    assert again.files == {"rerun": out / "episode_000" / "4.rrd"}


@pytest.mark.parametrize(
    ("name", "value"), [("images", torch.nan), ("depth", torch.nan), ("depth", torch.inf)]
)
def test_numbers_that_are_not_finite_are_named_before_a_fit(seen3, name, value):
    spoilt = getattr(seen3, name).clone()
    spoilt[2, 1, 5] = value
    sentence = (
        f"{name}: expected finite numbers, got NaN or infinity in 1 pictures, first in view 'ring_1', frame 2"
    )
    with pytest.raises(ValueError, match=sentence):
        reconstruct(dataclasses.replace(seen3, **{name: spoilt}), QUICK)


def test_views_without_a_frame_are_refused(seen3):
    with pytest.raises(ValueError, match="images: expected at least one frame and one view, got 0 of 3"):
        seen3.at(slice(4, 9))
    with pytest.raises(ValueError, match="window: expected at least 1 frame, got 0"):
        windows(0, 8)
    with pytest.raises(ValueError, match="fps: expected frames per second above 0, got 0"):
        dataclasses.replace(seen3, fps=0.0)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="expected a LeRobot dataset, a transforms.json or a COLMAP model"
    ):
        read_parts(tmp_path)


def rewrite(folder, views, change):
    """A transforms.json of `views` whose list of frames was changed."""
    path = write_transforms(folder, views)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"frames": change(values["frames"])}))


@pytest.mark.parametrize("axes", ["opencv", "world_to_camera", "opengl_world_to_camera"])
def test_captures_with_other_axes_are_named_and_mended(seen3, tmp_path, axes):
    def turn(frames):
        true = [to_opencv(np.array(f["transform_matrix"]), "opengl") for f in frames]
        return [
            f | {"transform_matrix": from_opencv(pose, axes).tolist()}
            for f, pose in zip(frames, true, strict=True)
        ]

    rewrite(tmp_path, seen3, turn)
    advice = f"expected OpenGL axes .*; read them with axes '{axes}', or repair"
    with pytest.raises(ValueError, match=advice):
        read_parts(tmp_path)
    parts = read_parts(tmp_path, mend=True)
    assert parts.mended == [f"camera_to_world: read as {WORDS[axes]}, not as OpenGL axes (y up, z back)"]
    np.testing.assert_allclose(
        parts.parts[0].load().cameras.camera_to_world, seen3.cameras.camera_to_world, atol=1e-6
    )


def test_left_handed_captures_are_named(seen3, tmp_path):
    def mirror(frames):
        first, *rows = frames[0]["transform_matrix"]
        return [frames[0] | {"transform_matrix": [[-x for x in first], *rows]}, *frames[1:]]

    rewrite(tmp_path, seen3, mirror)
    with pytest.raises(ValueError, match="expected a right-handed pose .*, got a left-handed one"):
        read_parts(tmp_path)


@pytest.mark.parametrize(("column", "axis"), [(1, "y"), (2, "z")])
def test_the_axis_that_is_wrong_is_named(seen3, tmp_path, column, axis):
    def turn(frames):
        matrices = [np.array(frame["transform_matrix"]) for frame in frames]
        for matrix in matrices:
            matrix[:, column] *= -1
        return [f | {"transform_matrix": m.tolist()} for f, m in zip(frames, matrices, strict=True)]

    rewrite(tmp_path, seen3, turn)
    with pytest.raises(ValueError, match=f"flip its {axis} axis"):
        read_parts(tmp_path)


def test_empty_masks_are_named(seen3, tmp_path):
    masked = torch.ones_like(seen3.images[..., 0])
    masked[2, 1] = 0
    write_transforms(tmp_path, dataclasses.replace(seen3, confidence=masked))
    with pytest.raises(
        ValueError, match="got 1 that keep none, first in view 'ring_1', frame 2; turn the masks round"
    ):
        read_parts(tmp_path)


def test_cameras_with_other_moments_are_named_or_cut(seen3, tmp_path):
    rewrite(tmp_path, seen3, lambda frames: frames[:-1])
    with pytest.raises(ValueError, match="ring_2"):
        read_parts(tmp_path)
    assert len(read_parts(tmp_path, common=True).parts[0].load()) == 3


def test_one_view_is_too_few(seen3, tmp_path):
    write_transforms(tmp_path, seen3)
    with pytest.raises(
        ValueError, match="views: expected at least 2 cameras, got 1; add views of the same frames"
    ):
        read_parts(tmp_path, observed=("ring_0",))
    with pytest.raises(ValueError, match="got 'rng_0'; did you mean 'ring_0'"):
        read_parts(tmp_path, observed=("rng_0", "ring_1"))


def test_a_scene_shows_which_body_is_where(seen3):
    from tests.dataengine.scene.conftest import world

    cameras: Cameras = seen3.cameras
    ids = world().body_ids(cameras, 2, 1)
    truth = seen3.body_ids[2] > 0
    assert ((ids > 0) & truth).sum() > 0.8 * ((ids > 0) | truth).sum()


def test_scaled_views_keep_edges_and_geometry(seen3):
    small = seen3.scaled_to(12, 8)
    assert small.images.shape == (4, 3, 8, 12, 3)
    torch.testing.assert_close(small.images[..., 0].mean(), seen3.images[..., 0].mean())
    assert set(small.depth.flatten().tolist()) <= set(
        seen3.depth.flatten().tolist()
    )  # no depth between two surfaces
    assert set(small.body_ids.flatten().tolist()) == {0, 1}
    point = np.array([[0.1, 0.2, 0.0]])
    ours, theirs = small.cameras.project(point)[0], seen3.cameras.project(point)[0]
    np.testing.assert_allclose(ours, theirs * (0.5, 1 / 3))
    assert seen3.scaled_to(24, 24) is seen3


def test_a_file_of_cameras_is_read_for_a_size(seen3, tmp_path):
    path = tmp_path / "cameras.json"
    path.write_text(seen3.cameras.to_json())
    found = read_cameras(path, (12, 12))
    assert found.names == seen3.names
    np.testing.assert_allclose(found.intrinsics, seen3.cameras.scaled_to(12, 12).intrinsics)
    np.testing.assert_allclose(found.camera_to_world, seen3.cameras.camera_to_world)
    path.write_text('{"convention": "OpenCV"}')
    with pytest.raises(
        DatasetError, match="expected view -> camera, got no camera; write intrinsics and poses"
    ):
        read_cameras(path, (12, 12))
    path.write_text("[]")
    with pytest.raises(DatasetError, match="expected an object, got list"):
        read_cameras(path, (12, 12))
