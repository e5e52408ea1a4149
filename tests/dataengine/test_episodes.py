"""Round trips, layout and appending of episode datasets."""

import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataengine.episodes import EpisodeDataset, EpisodeWriter, VideoCodec
from dataengine.lerobot.video import DepthCodec, VideoEncoder
from tests.dataengine.conftest import rendered_image

INFO_KEYS = {
    "codebase_version",
    "robot_type",
    "total_episodes",
    "total_frames",
    "total_tasks",
    "chunks_size",
    "fps",
    "splits",
    "data_files_size_in_mb",
    "video_files_size_in_mb",
    "data_path",
    "video_path",
    "features",
}
DATA_COLUMNS = {
    "timestamp": "float",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
EPISODE_COLUMNS = {
    "episode_index",
    "tasks",
    "length",
    "data/chunk_index",
    "data/file_index",
    "dataset_from_index",
    "dataset_to_index",
    "meta/episodes/chunk_index",
    "meta/episodes/file_index",
}
VIDEO_COLUMNS = {"chunk_index", "file_index", "from_timestamp", "to_timestamp"}
VIDEO_INFO_KEYS = {
    "video.height",
    "video.width",
    "video.codec",
    "video.pix_fmt",
    "video.fps",
    "video.channels",
    "has_audio",
    "is_depth_map",
}
DEPTH_INFO_KEYS = {"video.depth_min", "video.depth_max", "video.shift", "video.use_log"}


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def write_full(open_writer, make_frame, length=23):
    frames = [make_frame(t, full=True) for t in range(length)]
    with open_writer(full=True) as writer:
        for t, values in enumerate(frames):
            source = "generated" if t == 2 else {"front": "observed", "top": "rendered"}
            writer.add_frame(**values, provenance=source)
        writer.save_episode(success=True, seed=9)
    return EpisodeDataset(writer.root), frames


def test_round_trip_keeps_every_value(open_writer, make_frame):
    dataset, frames = write_full(open_writer, make_frame)
    episode = dataset[0]
    assert (episode.task, episode.success, episode.seed, episode.fps, len(episode)) == (
        "lift the cube",
        True,
        9,
        10.0,
        23,
    )
    np.testing.assert_array_equal(episode.state, np.float32([f["state"] for f in frames]))
    np.testing.assert_array_equal(episode.action, np.float32([f["action"] for f in frames]))
    np.testing.assert_array_equal(
        episode.extra["privileged"], np.float32([f["extra"]["privileged"] for f in frames])
    )
    np.testing.assert_array_equal(episode.timestamp, np.float32(np.arange(23) / 10))
    for view in dataset.views:
        ids = np.stack([f["segmentation"][view] for f in frames])
        np.testing.assert_array_equal(episode.segmentation[view], np.maximum(ids, -1))
        depth = np.stack([f["depth"][view] for f in frames])
        assert np.abs(episode.depth[view] / depth - 1).max() <= DepthCodec().max_relative_error * 1.001
    assert episode.provenance["top"][:4].tolist() == [1, 1, 2, 1]
    dataset.validate()


def test_camera_poses_are_exact_to_float32(open_writer, make_frame):
    dataset, frames = write_full(open_writer, make_frame)
    cameras = dataset[0].cameras
    stored = np.stack([[f["cameras"][v]["camera_to_world"] for v in dataset.views] for f in frames])
    np.testing.assert_array_equal(cameras.camera_to_world, stored.astype(np.float32))
    assert cameras.intrinsics.shape == (23, 2, 3, 3)
    assert (cameras.width, cameras.height) == (64, 48)


def test_default_video_is_near_lossless(open_writer, make_frame):
    dataset, frames = write_full(open_writer, make_frame)
    for view in dataset.views:
        stored = dataset[0].images[view]
        assert min(psnr(a, f["images"][view]) for a, f in zip(stored, frames, strict=True)) >= 40


def test_lossless_video_on_request(open_writer, make_frame):
    with open_writer(video=VideoCodec(codec="libx264rgb", pix_fmt="rgb24", crf=0)) as writer:
        for t in range(4):
            writer.add_frame(**make_frame(t))
        writer.save_episode()
    stored = EpisodeDataset(writer.root)[0].images["top"]
    np.testing.assert_array_equal(stored, [make_frame(t)["images"]["top"] for t in range(4)])


def test_window_equals_slice_of_whole(open_writer, make_frame):
    dataset, _ = write_full(open_writer, make_frame)
    whole = dataset[0]
    for start, stop in ((0, 1), (9, 12), (10, 11), (17, 23), (22, 23)):
        window = dataset.episode(0, start, stop, views=["top"])
        assert window.views == ("top",)
        assert window.start == start
        np.testing.assert_array_equal(window.images["top"], whole.images["top"][start:stop])
        np.testing.assert_array_equal(window.depth["top"], whole.depth["top"][start:stop])
        np.testing.assert_array_equal(window.state, whole.state[start:stop])
        np.testing.assert_array_equal(
            window.cameras.camera_to_world[:, 0], whole.cameras.camera_to_world[start:stop, 1]
        )


def test_stacked_images(dataset_root):
    episode = EpisodeDataset(dataset_root)[0]
    assert episode.stacked_images.shape == (5, 2, 48, 64, 3)
    np.testing.assert_array_equal(episode.stacked_images[:, 1], episode.images["top"])


def test_dataset_pickles_for_worker_processes(dataset_root):
    dataset = pickle.loads(pickle.dumps(EpisodeDataset(dataset_root)))
    assert dataset.lengths == (5, 6, 7)
    assert dataset.success == (True, False, True)
    assert dataset.meta(-1).seed == 42


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 37),
    width=st.integers(1, 37),
    length=st.integers(1, 12),
    dim=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_odd_sizes_and_lengths(tmp_path_factory, height, width, length, dim, seed):
    random = np.random.default_rng(seed)
    root = tmp_path_factory.mktemp("odd") / "dataset"
    state = random.normal(size=(length, dim)).astype(np.float32)
    depth = random.uniform(0.06, 9.9, (length, height, width)).astype(np.float32)
    ids = random.integers(-1, 65535, (length, height, width)).astype(np.int32)
    size = (height, width)
    with EpisodeWriter(
        root, fps=7, views=["a"], image_size=size, state_dim=dim, action_dim=1, depth=True, segmentation=True
    ) as writer:
        for t in range(length):
            image = np.full((*size, 3), 20 * t, np.uint8)
            writer.add_frame(
                images={"a": image},
                state=state[t],
                action=[t],
                task="x",
                depth={"a": depth[t]},
                segmentation={"a": ids[t]},
            )
        writer.save_episode()
    episode = EpisodeDataset(root)[0]
    np.testing.assert_array_equal(episode.state, state)
    np.testing.assert_array_equal(episode.action[:, 0], np.arange(length))
    np.testing.assert_array_equal(episode.segmentation["a"], ids)
    np.testing.assert_allclose(episode.depth["a"], depth, rtol=DepthCodec().max_relative_error * 1.001)
    assert np.abs(episode.images["a"].astype(int) - 20 * np.arange(length)[:, None, None, None]).max() <= 3


def test_depth_beyond_far_end_is_the_far_end(open_writer, make_frame):
    values = make_frame(0, full=True)
    values["depth"]["top"][0, 0] = np.inf
    with open_writer(full=True, depth_range=(0.1, 4.0)) as writer:
        writer.add_frame(**values)
        writer.save_episode()
    assert EpisodeDataset(writer.root)[0].depth["top"][0, 0, 0] == pytest.approx(4.0)


def test_appending_goes_on_with_the_depth_range_of_the_dataset(open_writer, make_frame):
    values = make_frame(0, full=True)
    for arguments in ({"depth_range": (0.05, 4.0)}, {}):
        with open_writer(full=True, **arguments) as writer:
            writer.add_frame(**values)
            writer.save_episode()
    dataset = EpisodeDataset(writer.root)
    for index in range(2):
        depth = dataset[index].depth["top"][0]
        np.testing.assert_allclose(
            depth, values["depth"]["top"], rtol=1.001 * DepthCodec(near=0.05, far=4.0).max_relative_error
        )


def test_another_depth_range_than_that_of_the_dataset_is_refused(open_writer, make_frame):
    with open_writer(full=True, depth_range=(0.05, 4.0)) as writer:
        writer.add_frame(**make_frame(0, full=True))
        writer.save_episode()
    sentence = (
        r"depth_range: expected \(0\.05, 4\.0\) as in the dataset in .*, got \(0\.1, 4\.0\); leave it out"
    )
    with pytest.raises(ValueError, match=sentence):
        open_writer(full=True, depth_range=(0.1, 4.0))


def test_info_json_has_the_published_keys(open_writer, make_frame):
    dataset, _ = write_full(open_writer, make_frame)
    info = json.loads((dataset.root / "meta/info.json").read_text())
    assert set(info) >= INFO_KEYS
    assert info["codebase_version"] == "v3.0"
    assert info["splits"] == {"train": "0:1"}
    assert isinstance(info["fps"], int)
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (1, 23, 1)
    assert info["provenance"] == {"0": "observed", "1": "rendered", "2": "generated"}
    for feature in info["features"].values():
        assert {"dtype", "shape", "names"} <= set(feature)
    colour, depth = info["features"]["observation.images.top"], info["features"]["observation.depth.top"]
    assert set(colour["info"]) >= VIDEO_INFO_KEYS
    assert set(depth["info"]) >= VIDEO_INFO_KEYS | DEPTH_INFO_KEYS
    assert depth["info"]["is_depth_map"]
    assert depth["info"]["video.pix_fmt"] == "gray12le"
    assert not any("/" in name for name in info["features"])


def test_parquet_columns_follow_the_schema(open_writer, make_frame):
    dataset, _ = write_full(open_writer, make_frame)
    schema = pq.read_schema(dataset.root / "data/chunk-000/file-000.parquet")
    for name, kind in DATA_COLUMNS.items():
        assert str(schema.field(name).type) == kind
    assert str(schema.field("observation.state").type) == "fixed_size_list<element: float>[5]"
    assert (
        str(schema.field("observation.camera.top.extrinsics").type) == "fixed_size_list<element: float>[16]"
    )
    stored = {n for n, f in dataset.features.items() if f["dtype"] != "video"}
    assert set(schema.names) == stored
    row = pq.read_table(dataset.root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[0]
    videos = {
        f"videos/{k}/{n}" for k, f in dataset.features.items() if f["dtype"] == "video" for n in VIDEO_COLUMNS
    }
    assert set(row) >= EPISODE_COLUMNS | videos
    for statistic in ("min", "max", "mean", "std", "count"):
        assert f"stats/observation.state/{statistic}" in row
        assert f"stats/observation.images.top/{statistic}" in row
    assert row["success"] is True
    assert row["seed"] == 9
    assert row["tasks"] == ["lift the cube"]


def test_tasks_parquet_carries_the_pandas_index(dataset_root):
    table = pq.read_table(dataset_root / "meta/tasks.parquet")
    pandas = json.loads(table.schema.metadata[b"pandas"])
    assert pandas["index_columns"] == ["task"]
    assert table.to_pydict() == {"task_index": [0], "task": ["lift the cube"]}


def test_next_success_marks_the_last_frame(dataset_root):
    for file, expected in (("000", [False] * 4 + [True]), ("001", [False] * 6)):
        table = pq.read_table(dataset_root / f"data/chunk-000/file-{file}.parquet")
        assert table["next.success"].to_pylist() == expected
    third = pq.read_table(dataset_root / "data/chunk-000/file-002.parquet")
    assert third["index"].to_pylist() == list(range(11, 18))


def test_stats_json_is_the_statistics_of_all_frames(dataset_root):
    dataset = EpisodeDataset(dataset_root)
    state = np.concatenate([dataset[i].state for i in range(3)])
    stats = json.loads((dataset_root / "meta/stats.json").read_text())
    np.testing.assert_allclose(stats["observation.state"]["mean"], state.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["observation.state"]["std"], state.std(0), rtol=1e-5)
    np.testing.assert_allclose(stats["observation.state"]["max"], state.max(0))
    assert stats["observation.state"]["count"] == [18]
    images = np.concatenate([dataset[i].images["top"] for i in range(3)]) / 255
    assert np.shape(stats["observation.images.top"]["mean"]) == (3, 1, 1)
    np.testing.assert_allclose(
        np.ravel(stats["observation.images.top"]["mean"]), images.mean((0, 1, 2)), atol=2e-3
    )
    np.testing.assert_allclose(
        np.ravel(stats["observation.images.top"]["std"]), images.std((0, 1, 2)), atol=2e-3
    )


def test_second_writer_appends(dataset_root, open_writer, make_frame):
    with open_writer() as writer:
        assert writer.finished == 3
        assert writer.seeds == (40, 41, 42)
        writer.add_frame(**make_frame(0) | {"task": "push the ball"})
        assert writer.save_episode() == 3
    dataset = EpisodeDataset(dataset_root)
    assert dataset.lengths == (5, 6, 7, 1)
    assert dataset.tasks == ("lift the cube", "push the ball")
    assert (dataset[3].task, dataset[3].success, dataset[3].seed) == ("push the ball", None, None)
    assert dataset.info["total_frames"] == 19
    dataset.validate()


def test_files_roll_over_to_the_next_chunk(open_writer, make_frame, monkeypatch):
    monkeypatch.setattr("dataengine.lerobot.layout.CHUNK_SIZE", 2)
    with open_writer() as writer:
        for _ in range(5):
            writer.add_frame(**make_frame(0))
            writer.save_episode()
    assert (writer.root / "data/chunk-002/file-000.parquet").exists()
    assert len(EpisodeDataset(writer.root)) == 5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"state_dim": 6}, r"observation\.state: expected shape \[5\] as in the dataset .*, got \[6\]"),
        (
            {"extra": {"force": 2}},
            r"force: expected the features of the dataset .*, but the dataset lacks it",
        ),
        (
            {"views": ("front", "tip")},
            r"observation\.images\.tip: expected the features .* the dataset lacks it \(did you mean "
            r"'observation\.images\.top'\?\)",
        ),
        (
            {"views": ("front",)},
            r"observation\.images\.top: expected the features .* the writer was not asked for it",
        ),
        ({"fps": 20}, "fps: expected 10 as in the dataset in .*, got 20"),
        (
            {"cameras": True},
            r"observation\.camera\.front\.extrinsics: expected the features .* the dataset lacks it",
        ),
    ],
)
def test_appending_other_features_names_the_difference(dataset_root, open_writer, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_writer(**change)
    open_writer().finalize()  # the failed attempt left no lock


def test_discarded_episode_leaves_nothing(dataset_root, open_writer, make_frame):
    before = sorted(p.relative_to(dataset_root) for p in dataset_root.rglob("*"))
    with open_writer() as writer:
        writer.add_frame(**make_frame(0))
        writer.discard_episode()
        writer.add_frame(**make_frame(1))
    assert sorted(p.relative_to(dataset_root) for p in dataset_root.rglob("*")) == before
    assert len(EpisodeDataset(dataset_root)) == 3


def test_empty_dataset_is_readable_and_can_be_continued(open_writer, make_frame):
    open_writer().finalize()
    with open_writer() as writer:
        assert len(EpisodeDataset(writer.root)) == 0
        writer.add_frame(**make_frame(0), cameras=None)
        writer.save_episode()
    assert len(EpisodeDataset(writer.root)) == 1


@pytest.mark.parametrize(("side", "setting"), [(24, b"mbtree=0"), (48, b"mbtree=0"), (64, b"mbtree=1")])
@pytest.mark.parametrize("codec", ["libx264", "libx264rgb"])
def test_small_images_do_without_what_differs_from_run_to_run(tmp_path, codec, side, setting):
    """x264 notes its settings in the file."""
    chosen = VideoCodec(codec=codec, pix_fmt="yuv444p" if codec == "libx264" else "rgb24")
    encoder = VideoEncoder(tmp_path / "film.mp4", fps=10, height=side, width=side, codec=chosen)
    for t in range(3):
        encoder.add(rendered_image(t, side, side))
    encoder.close()
    assert setting in (tmp_path / "film.mp4").read_bytes()
