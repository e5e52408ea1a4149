"""LeRobot v2.1 datasets, as its own writer lays them out, and camera poses from meta/cameras.json beside any version."""

import json
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataengine.cameras import Cameras
from dataengine.episodes import DatasetError, EpisodeDataset, EpisodeWriter
from dataengine.views import Views

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
LENGTHS = (5, 8, 6)


def brightness(episode: int, t: int) -> int:
    return 40 * episode + 12 * t


def picture(episode: int, t: int, size=(48, 64)) -> np.ndarray:
    return np.full((*size, 3), brightness(episode, t), np.uint8)


def write_video(path: Path, frames: Iterator[np.ndarray], fps: float, codec: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "20", "g": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def version2(
    root: Path, *, fps=30, chunks_size=2, codec="libx264", channels_first=False, wrist="video", version="v2.1"
) -> Path:
    """Two cameras, three episodes of two tasks; `wrist` is stored as ``video`` or as ``image`` in the parquet."""
    (root / "meta").mkdir(parents=True)
    shape = (
        ([3, 48, 64], ["channel", "height", "width"])
        if channels_first
        else ([48, 64, 3], ["height", "width", "channels"])
    )
    pictured = {
        "dtype": "video",
        "shape": shape[0],
        "names": shape[1],
        "info": {"video.fps": float(fps), "video.codec": "h264"},
    }
    features = {
        "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["a", "b"]}},
        "observation.state": {"dtype": "float32", "shape": [3], "names": None},
        FRONT: pictured,
        WRIST: pictured | {"dtype": wrist},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    } | {
        k: {"dtype": "int64", "shape": [1], "names": None}
        for k in ("frame_index", "episode_index", "index", "task_index")
    }
    info = {
        "codebase_version": version,
        "robot_type": "so100",
        "total_episodes": 3,
        "total_frames": sum(LENGTHS),
        "total_tasks": 2,
        "total_videos": 6,
        "total_chunks": 2,
        "chunks_size": chunks_size,
        "fps": fps,
        "splits": {"train": "0:3"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))
    tasks = ["lift the cube", "push the plate"]
    lines = [json.dumps({"task_index": n, "task": task}) + "\n" for n, task in enumerate(tasks)]
    (root / "meta/tasks.jsonl").write_text("".join(lines))
    lines = [
        json.dumps({"episode_index": e, "tasks": [tasks[e % 2]], "length": n}) + "\n"
        for e, n in enumerate(LENGTHS)
    ]
    (root / "meta/episodes.jsonl").write_text("".join(lines))
    start = 0
    for e, length in enumerate(LENGTHS):
        chunk, t = f"chunk-{e // chunks_size:03d}", np.arange(length)
        columns = {
            "action": pa.array([[x, -x] for x in t / 10], pa.list_(pa.float32(), 2)),
            "observation.state": pa.array([[e, x, 0] for x in t], pa.list_(pa.float32(), 3)),
            "next.done": pa.array(t == length - 1),
            "timestamp": pa.array((t / fps).astype(np.float32)),
            "frame_index": pa.array(t),
            "episode_index": pa.array(np.full(length, e)),
            "index": pa.array(start + t),
            "task_index": pa.array(np.full(length, e % 2)),
        }
        if wrist == "image":
            cells = [
                {"bytes": cv2.imencode(".png", picture(e, x))[1].tobytes(), "path": f"frame_{x:06d}.png"}
                for x in t
            ]
            columns[WRIST] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        (root / f"data/{chunk}").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), root / f"data/{chunk}/episode_{e:06d}.parquet")
        for key in (FRONT, WRIST) if wrist == "video" else (FRONT,):
            path = root / f"videos/{chunk}/{key}/episode_{e:06d}.mp4"
            write_video(path, (picture(e, x) for x in range(length)), fps, codec)
        start += length
    return root


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fps": 50, "channels_first": True, "version": "v2.0"},
        {"wrist": "image", "fps": 5},
        {"codec": "libsvtav1", "chunks_size": 1000},
    ],
    ids=["plain", "channels_first", "image", "av1"],
)
def test_reads_what_lerobot_21_writes(tmp_path, options):
    dataset = EpisodeDataset(version2(tmp_path / "d", **options))
    assert (dataset.lengths, dataset.views, dataset.fps) == (
        LENGTHS,
        ("front", "wrist"),
        options.get("fps", 30),
    )
    for e, length in enumerate(LENGTHS):
        episode = dataset[e]
        assert episode.task == ("lift the cube", "push the plate")[e % 2]
        np.testing.assert_allclose(episode.action[:, 0], np.arange(length) / 10, rtol=1e-6)
        np.testing.assert_array_equal(episode.state[:, 1], np.arange(length))
        np.testing.assert_array_equal(episode.extra["next.done"][:, 0], np.arange(length) == length - 1)
        for view in dataset.views:
            expected = [brightness(e, t) for t in range(length)]
            assert episode.images[view].shape == (length, 48, 64, 3)
            np.testing.assert_allclose(episode.images[view].mean((1, 2, 3)), expected, atol=3)
        assert (episode.cameras, episode.depth, episode.success) == (None, None, None)
    window = dataset.episode(1, 3, 6, views=["wrist"])
    np.testing.assert_allclose(
        window.images["wrist"].mean((1, 2, 3)), [brightness(1, t) for t in (3, 4, 5)], atol=3
    )
    dataset.validate()


def test_pictures_kept_as_files(tmp_path):
    root = version2(tmp_path / "d", wrist="image")
    path = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    cells = [{"bytes": None, "path": f"images/{WRIST}/{t}.png"} for t in range(5)]
    position = table.column_names.index(WRIST)
    table = table.set_column(position, WRIST, pa.array(cells, table.schema.field(WRIST).type))
    pq.write_table(table, path)
    (root / f"images/{WRIST}").mkdir(parents=True)
    for t in range(5):
        cv2.imwrite(str(root / f"images/{WRIST}/{t}.png"), picture(0, t))
    images = EpisodeDataset(root)[0].images["wrist"]
    np.testing.assert_array_equal(images[:, 0, 0, 0], [brightness(0, t) for t in range(5)])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda r: (r / "meta/episodes.jsonl").unlink(),
            r"episodes\.jsonl: expected this file in a LeRobot v2 dataset",
        ),
        (
            lambda r: (r / "meta/episodes.jsonl").write_text('{"episode_index": 0'),
            r"episodes\.jsonl: cannot be read",
        ),
        (
            lambda r: (r / "meta/episodes.jsonl").write_text('{"episode_index": 0}\n'),
            r"episodes\.jsonl: cannot be read .'length'",
        ),
        (lambda r: (r / "meta/tasks.jsonl").write_text("[]\n"), r"tasks\.jsonl: cannot be read"),
        (lambda r: (r / "meta/cameras.json").write_text("{"), r"cameras\.json: cannot be read"),
        (
            lambda r: (r / "meta/cameras.json").write_text("[1]"),
            r"cameras\.json: expected an object, got list",
        ),
    ],
)
def test_damaged_metadata_is_named(tmp_path, spoil, sentence):
    root = version2(tmp_path / "d")
    spoil(root)
    with pytest.raises(DatasetError, match=sentence):
        EpisodeDataset(root)


def test_damaged_episode_leaves_the_others(tmp_path):
    root = version2(tmp_path / "d")
    (root / f"videos/chunk-000/{FRONT}/episode_000001.mp4").unlink()
    (root / "data/chunk-001/episode_000002.parquet").write_bytes(b"PAR1")
    dataset = EpisodeDataset(root)
    assert len(dataset[0]) == 5
    for index, file in (
        (1, r"observation\.images\.front/episode_000001\.mp4"),
        (2, r"episode_000002\.parquet"),
    ):
        with pytest.raises(DatasetError, match=f"{file}: cannot read episode {index} from frame 0 on"):
            dataset[index]
    assert len(dataset.problems()) == 2


def test_nobody_appends_to_version_2(tmp_path):
    root = version2(tmp_path / "d")
    with pytest.raises(
        DatasetError, match=r"expected a LeRobot v3 dataset to append to, got v2\.1; choose another root"
    ):
        EpisodeWriter(root, fps=30, views=("front",), image_size=(48, 64), state_dim=3, action_dim=2)
    EpisodeDataset(root).validate()


POSES = np.stack([np.eye(4), np.eye(4)])
POSES[1, :3] = [[0, -1, 0, 0.5], [1, 0, 0, 0.2], [0, 0, 1, 1.0]]
K = np.array([[70.0, 0, 32], [0, 71, 24], [0, 0, 1]])


def entry(**changes):
    return {"intrinsics": K.tolist(), "camera_to_world": POSES[1].tolist()} | changes


SIDECARS = {
    "record": json.loads(Cameras(("wrist", "front"), np.stack([K, K]), POSES[::-1], 64, 48).to_json()),
    "views": {"front": entry(camera_to_world=POSES[0].tolist()), "wrist": entry()},
    "nested": {
        "cameras": {"front": entry(camera_to_world=POSES[0].tolist()), "wrist": entry(), "spare": entry()}
    },
    "inverse": {
        "front": entry(camera_to_world=POSES[0].tolist()),
        "wrist": {"intrinsics": K.ravel().tolist(), "world_to_camera": np.linalg.inv(POSES[1]).tolist()},
    },
    "extrinsics": {
        "front": {"intrinsics": K.tolist(), "extrinsics": POSES[0].ravel().tolist()},
        "wrist": {
            "intrinsics": (K * [[2], [2], [1]]).tolist(),
            "extrinsics": POSES[1].tolist(),
            "width": 128,
            "height": 96,
        },
    },
    "opengl": {
        "axes": "opengl",
        "front": entry(camera_to_world=np.diag([1.0, -1, -1, 1]).tolist()),
        "wrist": entry(camera_to_world=(POSES[1] @ np.diag([1.0, -1, -1, 1])).tolist()),
    },
}


@pytest.mark.parametrize("form", SIDECARS)
@pytest.mark.parametrize("channels_first", [False, True])
def test_camera_poses_from_the_sidecar(tmp_path, form, channels_first):
    root = version2(tmp_path / "d", channels_first=channels_first)
    (root / "meta/cameras.json").write_text(json.dumps(SIDECARS[form]))
    episode = EpisodeDataset(root)[1]
    cameras = episode.cameras
    assert (cameras.names, cameras.frames, cameras.width, cameras.height) == (("front", "wrist"), 8, 64, 48)
    np.testing.assert_allclose(cameras.camera_to_world[3], POSES, atol=1e-12)
    np.testing.assert_allclose(cameras.intrinsics[7], [K, K])
    assert Views.from_episode(episode).images.shape == (8, 2, 48, 64, 3)


def test_a_sidecar_of_one_view(tmp_path):
    root = version2(tmp_path / "d")
    (root / "meta/cameras.json").write_text(json.dumps({"front": entry()}))
    dataset = EpisodeDataset(root)
    assert dataset[0].cameras is None
    assert dataset.episode(0, views=["front"]).cameras.names == ("front",)


def test_columns_come_before_the_sidecar(open_writer, make_frame):
    """Our own writer leaves conventions in cameras.json, and poses in columns."""
    with open_writer(full=True) as writer:
        writer.add_frame(**make_frame(2, full=True))
        writer.save_episode()
    stored = EpisodeDataset(writer.root)[0].cameras
    values = json.loads((writer.root / "meta/cameras.json").read_text())
    assert "convention" in values
    values |= {"front": entry(), "top": entry()}
    (writer.root / "meta/cameras.json").write_text(json.dumps(values))
    np.testing.assert_array_equal(
        EpisodeDataset(writer.root)[0].cameras.camera_to_world, stored.camera_to_world
    )


def test_conventions_alone_are_no_cameras(dataset_root):
    (dataset_root / "meta/cameras.json").write_text(json.dumps({"convention": "OpenCV", "views": ["front"]}))
    assert EpisodeDataset(dataset_root)[0].cameras is None
    text = Cameras(("front", "top"), np.stack([K, K]), POSES, 64, 48).to_json()
    (dataset_root / "meta/cameras.json").write_text(text)
    np.testing.assert_allclose(EpisodeDataset(dataset_root)[0].cameras.camera_to_world[4], POSES)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"front": entry(), "wrist": {"intrinsics": K.tolist()}},
            "wrist: expected intrinsics and one of camera_to_world, .*got",
        ),
        ({"front": entry(), "wrist": entry(fov=3)}, "wrist: unknown key 'fov'"),
        (
            {"front": entry(), "wrist": entry(intrinsics=[1, 2])},
            r"wrist: expected intrinsics 3 x 3 and a pose 4 x 4, got \[2\]",
        ),
        (
            {"front": entry(), "wrist": entry(camera_to_world=(-np.eye(4)).tolist())},
            "camera_to_world: expected a last row of",
        ),
        (
            {"axes": "blender", "front": entry(), "wrist": entry()},
            "axes: expected 'opencv' or 'opengl', got 'blender'",
        ),
        (
            json.loads(
                Cameras(("front", "wrist"), np.stack([K, K]), np.stack([POSES] * 2), 64, 48).to_json()
            ),
            "cameras: expected cameras that stand still, got 2 frames; store moving ones in columns",
        ),
    ],
)
def test_bad_sidecars(tmp_path, values, sentence):
    root = version2(tmp_path / "d")
    (root / "meta/cameras.json").write_text(json.dumps(values))
    with pytest.raises(DatasetError, match=r"meta/cameras\.json: " + sentence):
        EpisodeDataset(root)[0]
