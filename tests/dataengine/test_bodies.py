"""Poses of bodies: the record, and its way through a dataset."""

import gymnasium
import numpy as np
import pytest

import sims  # noqa: F401 - registers the environments
from dataengine.bodies import Bodies, quaternion_to_rotation
from dataengine.cameras import check_rigid
from dataengine.episodes import EpisodeDataset, EpisodeWriter
from dataengine.record import record, writer_arguments
from sims.cameras import ring

UPRIGHT = np.array([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])


def random_bodies(frames=4, count=3, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(frames, count, 7))
    return Bodies.from_vectors([f"body{i}" for i in range(count)], vectors)


def test_quaternions_become_rotations():
    half = np.sqrt(0.5)
    np.testing.assert_allclose(quaternion_to_rotation([half, 0, 0, half]) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    check_rigid(random_bodies().poses, "poses")


def test_motion_takes_points_along():
    bodies, points = random_bodies(), np.random.default_rng(1).normal(size=(5, 3))
    ids = np.array([0, 1, 2, 3, 1])
    moved = bodies.move(points, ids, 0, 3)
    np.testing.assert_allclose(moved[0], points[0])
    for i in (1, 2, 3, 4):
        before, after = bodies.poses[0, ids[i] - 1], bodies.poses[3, ids[i] - 1]
        local = np.linalg.inv(before) @ [*points[i], 1.0]
        np.testing.assert_allclose(moved[i], (after @ local)[:3], atol=1e-12)
    np.testing.assert_allclose(bodies.move(moved, ids, 3, 0), points, atol=1e-12)
    assert bodies.motion(1, 1).shape == (4, 4, 4)
    assert len(bodies.at(slice(1, 3))) == 2
    assert bodies.select(["body2"]).names == ("body2",)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Bodies((), np.zeros((1, 0, 4, 4))), r"names: expected at least one name .*, got \[\]"),
        (lambda: Bodies(("a", "a"), np.zeros((1, 2, 4, 4))), "names: expected .* no name twice, got"),
        (lambda: Bodies(("a",), np.eye(4)), r"poses: expected \[T, 1, 4, 4\], got \[4, 4\]; give one matrix"),
        (lambda: Bodies(("a",), 2 * np.eye(4)[None, None]), "poses: expected a last row of 0 0 0 1"),
        (
            lambda: Bodies.from_vectors(("a",), np.zeros((2, 6))),
            r"vectors: expected \[T, 1, 7\], got \[2, 6\]",
        ),
        (lambda: Bodies.from_vectors(("a",), np.zeros((2, 7))), "poses: expected finite numbers"),
        (lambda: random_bodies().select(["bodyy2"]), "names: .* got 'bodyy2'; did you mean 'body2'?"),
        (lambda: random_bodies().move(np.zeros((1, 3)), [4], 0, 1), "ids: expected 0 to 3, got 4 to 4"),
    ],
)
def test_bad_bodies(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A short episode with every modality, and what the environment said on the way."""
    free = ring(2)
    env = gymnasium.make(
        "enerverse/Lift-v0",
        cameras=("front", *free),
        free_cameras=free,
        modalities=("rgb", "depth", "segmentation", "bodies"),
        image_size=32,
    )
    seen = []

    def policy(obs, info):
        seen.append((obs, info))
        return np.array([0.5, -0.5, 1, 0, 0, 0.2, 0], np.float32)

    root = tmp_path_factory.mktemp("bodies") / "d"
    with EpisodeWriter(root, **writer_arguments(env)) as writer:
        record(env, policy, writer, 1, keep="all", max_steps=5)
    env.close()
    return EpisodeDataset(root), seen


def test_poses_and_ids_come_back(recorded):
    dataset, seen = recorded
    dataset.validate()
    assert dataset.views == ("front", "ring_00", "ring_01")
    assert dataset.bodies == (
        *(f"link{i}" for i in range(1, 8)),
        "hand",
        "finger_left",
        "finger_right",
        "cube",
    )
    episode = dataset[0]
    assert episode.bodies is not None
    assert episode.bodies.names == dataset.bodies
    assert "observation.body_poses" not in episode.extra
    for t, (obs, info) in enumerate(seen):
        expected = Bodies.from_vectors(dataset.bodies, np.stack(list(info["bodies"].values()))[None])
        np.testing.assert_allclose(episode.bodies.poses[t], expected.poses[0], atol=2e-7)
        for view in dataset.views:
            np.testing.assert_array_equal(episode.body_ids[view][t], obs["bodies"][view])
            np.testing.assert_array_equal(episode.segmentation[view][t], obs["segmentation"][view])
    window = dataset.episode(0, 2, 4, views=("ring_01",))
    np.testing.assert_array_equal(window.bodies.poses, episode.bodies.poses[2:4])
    assert list(window.body_ids) == ["ring_01"]


def test_recorded_motion_carries_recorded_pixels(recorded):
    dataset, _ = recorded
    episode = dataset[0]
    number = 1 + dataset.bodies.index("hand")
    for v, view in enumerate(dataset.views):
        mask = episode.body_ids[view] == number
        points = episode.cameras.at(0).unproject(np.stack([episode.depth[n][0] for n in dataset.views]))[v]
        moved = episode.bodies.move(points[mask[0]], np.full(mask[0].sum(), number), 0, 5)
        pixels = episode.cameras.at(5).project(moved)[0][v]
        shown = np.argwhere(mask[5])[:, ::-1] + 0.5
        inside = ((pixels > 0) & (pixels < 32)).all(axis=1)
        nearest = np.linalg.norm(pixels[inside][:, None] - shown[None], axis=2).min(axis=1)
        assert mask[0].sum() > 10
        assert np.quantile(nearest, 0.95) < 1.5


def test_other_bodies_are_another_dataset(recorded, tmp_path):
    arguments = {"fps": 10, "views": ("a",), "image_size": (8, 8), "state_dim": 1, "action_dim": 1}
    with EpisodeWriter(tmp_path / "d", **arguments, bodies=("left", "right")) as writer:
        frame = {"images": {"a": np.zeros((8, 8, 3), np.uint8)}, "state": [0], "action": [0], "task": "t"}
        writer.add_frame(**frame, bodies={"left": UPRIGHT, "right": UPRIGHT})
        writer.save_episode()
    with pytest.raises(ValueError, match="observation.body_poses: expected names"):
        EpisodeWriter(tmp_path / "d", **arguments, bodies=("right", "left"))
    assert EpisodeDataset(tmp_path / "d")[0].body_ids is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bodies": None}, r"bodies: expected \['cube'\] -> 7 numbers, got NoneType; pass all bodies"),
        ({"bodies": {"cub": UPRIGHT}}, r"bodies: expected \['cube'\] -> 7 numbers, got \['cub'\]"),
        ({"bodies": {"cube": UPRIGHT[:6]}}, r"bodies\['cube'\]: expected 7 numbers"),
        (
            {"bodies": {"cube": 2 * UPRIGHT}},
            r"bodies\['cube'\]: .* quaternion wxyz of length 1, got length 2;",
        ),
        ({"body_ids": None}, "body_ids: expected one array per view, got None"),
        (
            {"body_ids": {"a": np.full((8, 8), 2)}},
            r"body_ids\['a'\]: expected ids from 0 .* to 1, got 2 to 2",
        ),
    ],
)
def test_bad_frames(tmp_path, change, sentence):
    frame = {
        "images": {"a": np.zeros((8, 8, 3), np.uint8)},
        "state": [0],
        "action": [0],
        "task": "t",
        "bodies": {"cube": UPRIGHT},
        "body_ids": {"a": np.ones((8, 8), int)},
    }
    arguments = {"fps": 10, "views": ("a",), "image_size": (8, 8), "state_dim": 1, "action_dim": 1}
    with EpisodeWriter(tmp_path / "d", **arguments, bodies=("cube",), body_ids=True) as writer:
        writer.add_frame(**frame)
        with pytest.raises(ValueError, match=sentence):
            writer.add_frame(**{**frame, **change})


def test_ids_need_names(tmp_path):
    with pytest.raises(ValueError, match="body_ids: expected the names of the bodies beside it, got none"):
        EpisodeWriter(
            tmp_path, fps=10, views=("a",), image_size=(8, 8), state_dim=1, action_dim=1, body_ids=True
        )
