"""Damaged datasets, and datasets of other writers with many episodes in one file."""

import errno
import json
import os
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataengine.episodes import DatasetError, EpisodeDataset
from dataengine.errors import is_full

DATA, META = "data/chunk-000/file-001.parquet", "meta/episodes/chunk-000/file-001.parquet"
VIDEO = "videos/observation.images.top/chunk-000/file-001.mp4"


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def overwrite_with_text(path):
    path.write_bytes(b"not what it says")


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, overwrite_with_text, empty, remove])
@pytest.mark.parametrize("file", [DATA, VIDEO])
def test_damaged_episode_is_named_and_others_stay_readable(dataset_root, file, damage):
    damage(dataset_root / file)
    dataset = EpisodeDataset(dataset_root)
    sentence = rf"{file}: cannot read episode 1 from frame 0 on \(.*\); restore .* or record"
    with pytest.raises(DatasetError, match=sentence) as caught:
        dataset[1]
    assert (caught.value.episode, caught.value.frame) == (1, 0)
    assert caught.value.path == dataset_root / file
    assert len(dataset[0]) == 5
    assert len(dataset[2]) == 7
    assert len(dataset.problems()) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_known_by_number_and_by_text(code):
    assert is_full(OSError(code, os.strerror(code)))
    assert is_full(RuntimeError(f"external error: {os.strerror(code)} (os error {code})"))
    assert not is_full(OSError(errno.EACCES, os.strerror(errno.EACCES)))


def test_a_damaged_video_is_told_in_words(dataset_root):
    overwrite_with_text(dataset_root / VIDEO)
    with pytest.raises(
        DatasetError, match=r"\(Invalid data found when processing input\); restore"
    ) as caught:
        EpisodeDataset(dataset_root)[1]
    assert "Errno" not in str(caught.value)
    assert "avcodec" not in str(caught.value)


@pytest.mark.parametrize("damage", [truncate, overwrite_with_text, empty])
def test_damaged_episode_metadata(dataset_root, damage):
    damage(dataset_root / META)
    dataset = EpisodeDataset(dataset_root)
    assert len(dataset) == 3
    assert dataset.lengths == (5, 0, 7)
    with pytest.raises(
        DatasetError, match=rf"episode 1: its metadata is missing or damaged \(.*{META}: cannot be read"
    ):
        dataset[1]
    assert len(dataset[2]) == 7
    with pytest.raises(DatasetError, match="problems: .*cannot be read"):
        dataset.validate()


def test_lost_episode_metadata_at_the_end(dataset_root):
    (dataset_root / "meta/episodes/chunk-000/file-002.parquet").unlink()
    dataset = EpisodeDataset(dataset_root)
    assert len(dataset) == 3
    with pytest.raises(
        DatasetError, match="episode 2: its metadata is missing or damaged .*has no row for it"
    ):
        dataset[2]


def test_too_few_video_frames_name_the_frame(dataset_root):
    shutil.copy(dataset_root / "videos/observation.images.top/chunk-000/file-000.mp4", dataset_root / VIDEO)
    dataset = EpisodeDataset(dataset_root)
    with pytest.raises(
        DatasetError, match="cannot read episode 1 from frame 5 on .*frame 5 of the file is not there"
    ):
        dataset[1]
    assert len(dataset.episode(1, 0, 5)) == 5


def test_too_many_video_frames_are_a_problem(dataset_root):
    shutil.copy(dataset_root / "videos/observation.images.top/chunk-000/file-002.mp4", dataset_root / VIDEO)
    assert "expected 6 frames of episode 1, got 7" in "".join(EpisodeDataset(dataset_root).problems())


def test_row_count_mismatch(dataset_root):
    path = dataset_root / DATA
    pq.write_table(pq.read_table(path).slice(0, 4), path)
    with pytest.raises(DatasetError, match="cannot read episode 1 from frame 4 on .4 rows instead of 6"):
        EpisodeDataset(dataset_root)[1]


def test_wrong_frame_index_and_time_are_problems(dataset_root):
    path = dataset_root / DATA
    table = pq.read_table(path)
    for name, values in (("frame_index", [0, 1, 3, 2, 4, 5]), ("timestamp", [0, 0.1, 0.3, 0.2, 0.4, 0.5])):
        position = table.schema.get_field_index(name)
        table = table.set_column(
            position, table.schema.field(position), pa.array(values, table.schema.field(position).type)
        )
    pq.write_table(table, path)
    found = " ".join(EpisodeDataset(dataset_root).problems())
    assert "episode 1, frame 2: expected frame_index 2, got 3" in found
    assert "expected rising timestamps" in found


@pytest.mark.parametrize("kind", ["depth", "images"])
@pytest.mark.parametrize("place", [0.3, 0.5, 0.6])
def test_flipped_bytes_in_a_video_are_noticed(open_writer, make_frame, kind, place):
    """Damage that a decoder may hide shows in the checksum; what H.264 can see is an error when read."""
    with open_writer(full=True) as writer:
        for t in range(8):
            writer.add_frame(**make_frame(t, full=True))
        writer.save_episode()
    path = writer.root / f"videos/observation.{kind}.top/chunk-000/file-000.mp4"
    content = bytearray(path.read_bytes())
    at = int(len(content) * place)
    content[at : at + 4] = bytes(b ^ 0xFF for b in content[at : at + 4])
    path.write_bytes(content)
    dataset = EpisodeDataset(writer.root)
    with pytest.raises(DatasetError, match=rf"observation\.{kind}\.top.*episode 0.*restore this file"):
        dataset.validate()
    if kind == "images":
        with pytest.raises(DatasetError, match=r"images\.top.*cannot read episode 0 from frame \d"):
            dataset[0]


def test_flipped_bytes_in_a_data_file_are_noticed(dataset_root):
    path = dataset_root / DATA
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"{DATA}: cannot read episode 1"):
        EpisodeDataset(dataset_root)[1]


def test_damaged_segmentation_names_file_and_episode(open_writer, make_frame):
    with open_writer(full=True) as writer:
        writer.add_frame(**make_frame(0, full=True))
        writer.save_episode()
    path = writer.root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    position = table.schema.get_field_index("observation.segmentation.top")
    field = table.schema.field(position)
    pq.write_table(
        table.set_column(position, field, pa.array([{"bytes": b"junk", "path": None}], field.type)), path
    )
    with pytest.raises(DatasetError, match=r"file-000\.parquet: cannot read episode 0 .*cannot be decoded"):
        EpisodeDataset(writer.root)[0]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda root: shutil.rmtree(root), "expected a dataset folder, found none; record one first"),
        (
            lambda root: (root / "meta/info.json").unlink(),
            r"meta/info\.json: expected this file in a LeRobot dataset",
        ),
        (
            lambda root: truncate(root / "meta/info.json"),
            r"meta/info\.json: cannot be read .*; restore this file",
        ),
        (
            lambda root: (root / "meta/info.json").write_text("{}"),
            r"info\.json: expected the key 'codebase_version'",
        ),
        (lambda root: truncate(root / "meta/tasks.parquet"), r"meta/tasks\.parquet: cannot be read"),
    ],
)
def test_dataset_that_cannot_be_opened(dataset_root, spoil, sentence):
    spoil(dataset_root)
    with pytest.raises(DatasetError, match=sentence):
        EpisodeDataset(dataset_root)


def test_old_version_is_refused(dataset_root):
    path = dataset_root / "meta/info.json"
    path.write_text(path.read_text().replace("v3.0", "v1.6"))
    with pytest.raises(DatasetError, match=r"expected a LeRobot v3 or v2 dataset, got v1\.6; convert it"):
        EpisodeDataset(dataset_root)


def test_episode_and_window_outside(dataset_root):
    dataset = EpisodeDataset(dataset_root)
    with pytest.raises(IndexError, match="episode 3: expected 0 to 2"):
        dataset[3]
    with pytest.raises(IndexError, match="window: expected 0 <= start < stop <= 5 in episode 0, got 2, 9"):
        dataset.episode(0, 2, 9)
    with pytest.raises(ValueError, match=r"views: unknown view 'fron'; did you mean 'front'\?"):
        dataset.episode(0, views=["fron"])


def shared_file_dataset(root, lengths=(4, 6, 3), fps=5):
    """A dataset as other writers leave it: one parquet, one 4:2:0 video, one meta file, list columns, no
    camera poses.
    """
    total = sum(lengths)
    for folder in ("meta/episodes/chunk-000", "data/chunk-000", "videos/observation.images.cam/chunk-000"):
        (root / folder).mkdir(parents=True)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    frame = np.concatenate([np.arange(n) for n in lengths])
    columns = {
        "observation.state": [[float(i), -float(i)] for i in range(total)],
        "action": [[i / 10] for i in range(total)],
        "timestamp": (frame / fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": episode,
        "index": np.arange(total),
        "task_index": episode % 2,
    }
    pq.write_table(pa.table(columns), root / "data/chunk-000/file-000.parquet", row_group_size=4)
    with av.open(str(root / "videos/observation.images.cam/chunk-000/file-000.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", 4
        for i in range(total):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.full((32, 32, 3), 15 * i, np.uint8), format="rgb24")
                )
            )
        container.mux(stream.encode(None))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    key = "videos/observation.images.cam"
    meta = {
        "episode_index": range(len(lengths)),
        "tasks": [[f"task {i % 2}"] for i in range(len(lengths))],
        "length": lengths,
        "data/chunk_index": [0] * 3,
        "data/file_index": [0] * 3,
        "dataset_from_index": starts,
        "dataset_to_index": ends,
        f"{key}/chunk_index": [0] * 3,
        f"{key}/file_index": [0] * 3,
        f"{key}/from_timestamp": starts / fps,
        f"{key}/to_timestamp": ends / fps,
        "stats/action/mean": [[0.0]] * 3,
    }
    pq.write_table(
        pa.table({k: list(v) for k, v in meta.items()}), root / "meta/episodes/chunk-000/file-000.parquet"
    )
    pq.write_table(
        pa.table({"task_index": [0, 1], "__index_level_0__": ["task 0", "task 1"]}),
        root / "meta/tasks.parquet",
    )
    vector = {"dtype": "float32", "names": None}
    index = {k: {"dtype": "int64", "shape": [1], "names": None} for k in columns if k.endswith("index")}
    features = {
        "observation.state": vector | {"shape": [2]},
        "action": vector | {"shape": [1]},
        "timestamp": vector | {"shape": [1]},
        "observation.images.cam": {
            "dtype": "video",
            "shape": [32, 32, 3],
            "names": None,
            "info": {"video.fps": fps},
        },
        **index,
    }
    info = {
        "codebase_version": "v3.0",
        "fps": fps,
        "total_episodes": 3,
        "total_frames": total,
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info))


def test_many_episodes_in_one_file(tmp_path):
    shared_file_dataset(tmp_path / "other")
    dataset = EpisodeDataset(tmp_path / "other")
    assert dataset.lengths == (4, 6, 3)
    assert dataset.views == ("cam",)
    for index, first in ((0, 0), (1, 4), (2, 10)):
        episode = dataset[index]
        expected = first + np.arange(dataset.lengths[index])
        np.testing.assert_array_equal(episode.state[:, 0], expected)
        np.testing.assert_allclose(episode.action[:, 0], expected / 10, rtol=1e-6)
        brightness = episode.images["cam"].mean((1, 2, 3))
        np.testing.assert_allclose(brightness, 15 * expected, atol=2.5)
        assert episode.task == f"task {index % 2}"
        assert (episode.cameras, episode.depth, episode.success, episode.seed) == (None, None, None, None)
    window = dataset.episode(1, 3, 5)
    np.testing.assert_allclose(window.images["cam"].mean((1, 2, 3)), [105, 120], atol=2.5)
    dataset.validate()
