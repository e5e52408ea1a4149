"""Cameras beside the built-in ones: rings, what cannot be, and that nothing else changes with them."""

import gymnasium
import numpy as np
import pytest

import sims
from sims.cameras import TABLE, CameraPlacement, holdout_ring, project, ring

ABOVE = CameraPlacement(position=(0.6, 0.1, 0.9), look_at=(0.5, 0.0, 0.0), fovy=40.0)


def angles(cameras):
    """Azimuth and elevation of each camera as its target sees it, degrees [n, 2]."""
    away = np.array([np.subtract(c.position, c.look_at) for c in cameras.values()])
    flat = np.hypot(away[:, 0], away[:, 1])
    return np.degrees(
        np.stack([np.arctan2(away[:, 1], away[:, 0]) % (2 * np.pi), np.arctan2(away[:, 2], flat)], 1)
    )


def test_ring_is_a_dome_of_distinct_directions():
    cameras = ring(8)
    assert list(cameras) == [f"ring_{i:02d}" for i in range(8)]
    assert cameras == ring(8)
    seen = angles(cameras)
    for column, least in ((0, 37.0), (1, 1.0)):
        assert np.diff(np.sort(seen[:, column])).min() > least
    assert np.ptp(seen[:, 1]) > 15.0
    assert len({c.position[2] for c in ring(5, height=0.5).values()}) == 1
    (only,) = ring(1, radius=0.5, height=0.4, look_at=(0.4, 0.0, 0.0), phase=np.pi / 2, name="mine").values()
    np.testing.assert_allclose(only.position, (0.4, 0.5, 0.4), atol=1e-12)


@pytest.mark.parametrize(("n", "held"), [(8, 4), (4, 4), (6, 4), (5, 1), (3, 2), (1, 1), (2, 7)])
@pytest.mark.parametrize("arc", [np.radians(300), 2 * np.pi])
def test_held_out_cameras_share_no_direction(n, held, arc):
    fitted, tested = angles(ring(n, arc=arc)), angles(holdout_ring(held, beside=n, arc=arc))
    apart = np.abs(fitted[:, None] - tested[None])
    assert np.minimum(apart[..., 0], 360 - apart[..., 0]).min() > 0.45 * np.degrees(arc) / np.lcm(n, held)
    assert apart[..., 1].min() > 0.2


def test_free_cameras_see_the_workspace_where_they_were_put():
    free = {"above": ABOVE, **ring(2)}
    env = gymnasium.make(
        "enerverse/Lift-v0",
        cameras=("front", *free),
        free_cameras=free,
        modalities=("rgb", "segmentation"),
        randomize=True,
    )
    obs, info = env.reset(seed=3)
    cube = env.unwrapped.sim.position("cube")
    for name, camera in free.items():
        pose, matrix = info["cameras"][name]["camera_to_world"], info["cameras"][name]["intrinsics"]
        np.testing.assert_allclose(pose[:3, 3], camera.position)
        assert pose[2, 1] < 0  # upright
        (target,), _ = project(np.array([camera.look_at]), matrix, pose)
        np.testing.assert_allclose(target, 32.0)
        (pixel,), _ = project(cube[None], matrix, pose)
        shown = np.argwhere(obs["segmentation"][name] == 2)[:, ::-1] + 0.5
        assert np.linalg.norm(shown.mean(0) - pixel) < 2.0
    assert env.unwrapped.render_camera("above").shape == (64, 64, 3)
    env.close()


@pytest.mark.parametrize("randomize", [False, True])
def test_free_cameras_change_nothing_else(randomize):
    frames = []
    for free in (None, ring(3)):
        env = gymnasium.make("enerverse/Push-v0", free_cameras=free, image_size=32, randomize=randomize)
        env.reset(seed=1)
        frames.append(env.step(np.full(7, 0.5, np.float32)))
        env.close()
    (plain, *_, info), (beside, *_, info_beside) = frames
    assert list(beside["images"]) == list(plain["images"])
    for name, picture in plain["images"].items():
        np.testing.assert_array_equal(picture, beside["images"][name])
    np.testing.assert_array_equal(plain["state"], beside["state"])
    np.testing.assert_array_equal(info["privileged"], info_beside["privileged"])


def test_the_table_is_where_cameras_may_not_be():
    model = sims.TabletopEnv("Lift", cameras=()).sim.model
    middle, half = model.geom("table").pos, model.geom("table").size
    np.testing.assert_allclose(TABLE, [middle - half, middle + half])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ring(0), "n: expected a whole number of cameras >= 1, got 0"),
        (lambda: holdout_ring(-1, beside=2), "n: expected a whole number of cameras >= 1, got -1"),
        (lambda: holdout_ring(2, beside=0), "beside: expected a whole number of cameras >= 1, got 0"),
        (lambda: ring(2, radius=0.0), "radius: expected metres > 0, got 0.0"),
        (lambda: ring(2, arc=7.0), r"arc: expected radians in \(0, 2 pi\], got 7.0"),
        (lambda: ring(2, height=-0.02), r"position: expected a point outside the table, got .*; raise"),
        (lambda: ring(2, height=-0.6), "position: expected a point above the floor at -0.5 m, got"),
        (lambda: ring(2, fovy=180.0), r"fovy: expected degrees in \(0, 180\), got 180.0"),
        (
            lambda: CameraPlacement(position=(0.5, 0.0, 1.0), look_at=(0.5, 0.0, 0.0), fovy=40.0),
            "look_at: expected a point that is not straight above or below the camera, got .*; move one",
        ),
        (
            lambda: CameraPlacement(position=(0.5, np.nan, 1.0), look_at=(0.5, 0.0, 0.0), fovy=40.0),
            "position: expected 3 finite numbers in metres, got",
        ),
    ],
)
def test_cameras_that_cannot_be(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cameras": ("front", "front")}, "cameras: expected distinct names, got front twice"),
        ({"cameras": ("ring_7",)}, r"camera: .*, got 'ring_7'; did you mean 'ring_0"),
        ({"free_cameras": {"top": ABOVE}}, "free_cameras: expected names that are not taken, got 'top'"),
        ({"free_cameras": {"a/b": ABOVE}}, "free_cameras: expected names of letters, .*, got 'a/b'"),
        ({"free_cameras": {"a": (1, 2, 3)}}, r"free_cameras\['a'\]: expected a CameraPlacement, got tuple"),
    ],
)
def test_bad_names(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        gymnasium.make("enerverse/Lift-v0", **{"free_cameras": ring(2), **options})
