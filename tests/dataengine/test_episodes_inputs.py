"""Every bad input gets one sentence, and the failing call writes nothing."""

import numpy as np
import pytest

from dataengine.episodes import DatasetError, EpisodeDataset, VideoCodec


def spoil_image(values, image):
    values["images"]["top"] = image


def spoil_camera(values, key, matrix):
    values["cameras"]["top"] = values["cameras"]["top"] | {key: matrix}


MIRROR = np.diag([-1.0, 1, 1, 1])
BAD_FRAMES = {
    "image size": (
        lambda v: spoil_image(v, np.zeros((64, 48, 3), np.uint8)),
        r"images\['top'\]: expected uint8 \[48, 64, 3\] \(height, width, channel\), got uint8 \[64, 48, 3\]",
    ),
    "image dtype": (
        lambda v: spoil_image(v, np.zeros((48, 64, 3))),
        r"images\['top'\]: expected uint8 .*, got float64",
    ),
    "image view": (lambda v: v["images"].update(tpo=0), r"images: unknown view 'tpo'; did you mean 'top'\?"),
    "image missing": (
        lambda v: v["images"].pop("top"),
        r"images: expected the views \['front', 'top'\], missing \['top'\]",
    ),
    "images list": (lambda v: v.update(images=[1]), "images: expected view name -> array, got list"),
    "state nan": (
        lambda v: v.update(state=[0, 0, np.nan, 0, 0]),
        "state: expected finite float32 numbers, got nan at position 2",
    ),
    "action overflow": (
        lambda v: v.update(action=[0, 1e300, 0]),
        "action: expected finite float32 numbers, got inf at position 1",
    ),
    "action length": (
        lambda v: v.update(action=np.zeros(4)),
        r"action: expected 3 numbers, got float64 \[4\]",
    ),
    "task": (lambda v: v.update(task=""), "task: expected the instruction as text, got ''"),
    "camera mirrored": (
        lambda v: spoil_camera(v, "camera_to_world", MIRROR),
        r"cameras\['top'\]\['camera_to_world'\]: expected a right-handed rotation",
    ),
    "camera scaled": (
        lambda v: spoil_camera(v, "camera_to_world", np.diag([2.0, 2, 2, 1])),
        r"cameras\['top'\]\['camera_to_world'\]: expected an orthonormal rotation",
    ),
    "camera shape": (
        lambda v: spoil_camera(v, "camera_to_world", np.eye(3)),
        r"\['camera_to_world'\]: expected \[4, 4\], got \[3, 3\]",
    ),
    "intrinsics": (
        lambda v: spoil_camera(v, "intrinsics", np.zeros((3, 3))),
        r"cameras\['top'\]\['intrinsics'\]: expected \[\[fx, 0, cx\]",
    ),
    "camera key": (
        lambda v: v["cameras"].update(top={"intrinsics": np.eye(3)}),
        r"cameras\['top'\]: expected the keys .*, missing 'camera_to_world'",
    ),
    "no cameras": (lambda v: v.update(cameras=None), "cameras: expected one array per view, got None"),
    "depth shape": (
        lambda v: v["depth"].update(top=np.ones((4, 4))),
        r"depth\['top'\]: expected float \[48, 64\] in metres, got float64 \[4, 4\]",
    ),
    "depth millimetres": (
        lambda v: v["depth"].update(top=np.ones((48, 64), np.uint16)),
        r"depth\['top'\]: expected float",
    ),
    "depth nan": (
        lambda v: v["depth"].update(top=np.full((48, 64), np.nan)),
        r"depth\['top'\]: expected metres of at least 0\.02 \(depth_range\), got nan",
    ),
    "segmentation dtype": (
        lambda v: v["segmentation"].update(top=np.zeros((48, 64))),
        r"segmentation\['top'\]: expected integers",
    ),
    "segmentation range": (
        lambda v: v["segmentation"].update(top=np.full((48, 64), 65535)),
        r"segmentation\['top'\]: expected ids from -1 \(nothing\) to 65534",
    ),
    "extra name": (
        lambda v: v["extra"].update(privilege=0),
        r"extra: unknown name 'privilege'; did you mean 'privileged'\?",
    ),
    "extra missing": (
        lambda v: v["extra"].pop("privileged"),
        r"extra: expected \['action\.clean', 'privileged'\] in every frame, missing 'privileged'",
    ),
    "provenance": (
        lambda v: v.update(provenance="render"),
        r"provenance: expected one of .*, got 'render'; did you mean 'rendered'\?",
    ),
    "time off grid": (
        lambda v: v.update(timestamp=0.31),
        r"timestamp: expected within 0\.0001 s of frame 2 / 10 fps = 0\.2 s, got 0\.31; resample",
    ),
    "time nan": (lambda v: v.update(timestamp=np.nan), "timestamp: expected within .* got nan"),
    "time almost on the grid": (
        lambda v: v.update(timestamp=0.2002),
        "timestamp: expected within .* got 0.2002",
    ),
}


@pytest.fixture
def full_writer(open_writer, make_frame):
    writer = open_writer(full=True)
    writer.add_frame(**make_frame(0, full=True), timestamp=0.0)
    writer.add_frame(**make_frame(1, full=True), timestamp=0.10005)
    yield writer
    writer.finalize()


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frame_is_refused_and_not_written(full_writer, make_frame, name):
    spoil, sentence = BAD_FRAMES[name]
    values = make_frame(2, full=True)
    spoil(values)
    with pytest.raises(ValueError, match=sentence):
        full_writer.add_frame(**values)
    full_writer.add_frame(**make_frame(2, full=True))
    full_writer.save_episode()
    episode = EpisodeDataset(full_writer.root)[0]
    assert len(episode) == 3
    np.testing.assert_allclose(episode.timestamp, [0, 0.10005, 0.2])


def test_modalities_the_writer_was_not_opened_for(open_writer, make_frame):
    with open_writer(cameras=False) as writer:
        with pytest.raises(
            ValueError, match="depth: expected None, because the writer was opened with depth=False"
        ):
            writer.add_frame(**make_frame(0), depth={})
        with pytest.raises(
            ValueError, match="cameras: expected None, because the writer was opened with cameras=False"
        ):
            writer.add_frame(**make_frame(0), cameras={})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fps": 0}, "fps: expected frames per second above 0, got 0"),
        ({"views": ()}, "views: expected at least one name and no name twice"),
        ({"views": ("a", "a")}, "views: expected at least one name and no name twice"),
        ({"views": ("a/b",)}, "views, bodies, extra: expected names without '/', got 'a/b'"),
        ({"image_size": (0, 4)}, r"image_size: expected \(height, width\) of at least 1 pixel, got \(0, 4\)"),
        ({"state_dim": 0}, "state_dim: expected a length of at least 1, got 0"),
        ({"extra": {"action": 3}}, "extra: expected a name that is not taken, got 'action'"),
        ({"depth_range": (2.0, 1.0)}, r"depth_range: expected 0 < near < far in metres, got \(2\.0, 1\.0\)"),
        (
            {"image_size": (47, 64), "video": VideoCodec(pix_fmt="yuv420p")},
            "image_size: yuv420p needs even sides, got 47 x 64",
        ),
    ],
)
def test_bad_writer_arguments(open_writer, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_writer(**change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"codec": "x264"}, r"codec: expected a colour encoder, got 'x264'; did you mean 'libx264'\?"),
        ({"pix_fmt": "yuv440p"}, "pix_fmt: libx264 cannot write 'yuv440p'; did you mean"),
        ({"crf": 60}, r"crf: expected 0 \(best\) to 51, got 60"),
        ({"gop": 0}, "gop: expected at least 1 frame between key frames, got 0"),
    ],
)
def test_bad_codec_arguments(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        VideoCodec(**change)


def test_calls_out_of_order(open_writer, make_frame):
    writer = open_writer()
    with pytest.raises(ValueError, match="save_episode: expected at least one add_frame before it, got none"):
        writer.save_episode()
    writer.finalize()
    writer.finalize()
    with pytest.raises(ValueError, match="was finalised; open a new EpisodeWriter on it to append"):
        writer.add_frame(**make_frame(0))


def test_root_with_other_files_is_refused(tmp_path, open_writer):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(
        DatasetError, match="expected an empty folder or a LeRobot v3 dataset, got other files"
    ):
        open_writer(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
