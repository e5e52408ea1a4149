"""Camera conventions, proved against pictures: projection meets segmentation, depth meets geometry."""

import gymnasium
import numpy as np
import pytest

import sims
from sims.cameras import project, unproject

SIZE = 128


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "randomised"])
def scene(request):
    env = gymnasium.make(
        "enerverse/Lift-v0",
        image_size=SIZE,
        cameras=sims.CAMERAS,
        modalities=sims.MODALITIES,
        randomize=request.param,
    )
    obs, info = env.reset(seed=2)
    # Out of the way: what is checked below must not be hidden by the arm.
    for _ in range(8):
        obs, _, _, _, info = env.step(np.array([-1, 0, 1, 0, 0, 0, 0], np.float32))
    yield env.unwrapped, obs, info
    env.close()


@pytest.mark.parametrize("camera", sims.CAMERAS)
def test_pose_is_rigid_and_principal_point_is_the_middle(scene, camera):
    _, _, info = scene
    pose, matrix = info["cameras"][camera]["camera_to_world"], info["cameras"][camera]["intrinsics"]
    np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-9)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1.0)
    np.testing.assert_allclose(matrix[:2, 2], SIZE / 2)


@pytest.mark.parametrize("camera", ["front", "left", "right", "top"])
def test_world_is_upright(scene, camera):
    """Image rows grow downwards, so OpenCV's y axis points down in the world."""
    _, _, info = scene
    assert info["cameras"][camera]["camera_to_world"][2, 1] < 0


@pytest.mark.parametrize("camera", ["front", "left", "right", "top"])
def test_projected_cube_covers_its_segment(scene, camera):
    env, obs, info = scene
    seen, expected = _boxes(env, obs, info, camera)
    # A pixel belongs to the cube when its centre does, so both boxes agree to within a pixel.
    np.testing.assert_allclose(seen, expected, atol=1.01)


def test_wrist_segment_lies_inside_the_projected_cube(scene):
    """Here the picture's edge cuts the cube off, so only one inclusion can be asked for."""
    env, obs, info = scene
    seen, expected = _boxes(env, obs, info, "wrist")
    assert np.all(seen[:2] >= expected[:2] - 1.01)
    assert np.all(seen[2:] <= expected[2:] + 1.01)


@pytest.mark.parametrize("camera", sims.CAMERAS)
def test_depth_unprojects_onto_table_and_cube(scene, camera):
    env, obs, info = scene
    points = unproject(obs["depth"][camera], **_camera(info, camera))
    segments = obs["segmentation"][camera]
    table = points[(segments == 0) & (np.abs(points[..., 0] - 0.4) < 0.5) & (np.abs(points[..., 1]) < 0.5)]
    table = table[table[:, 2] > -0.02]
    assert len(table) > 200
    np.testing.assert_allclose(table[:, 2], 0.0, atol=1e-4)
    cube = points[segments == env.segmentation_classes.index("cube")]
    body = env.sim.data.body("cube")
    local = (cube - body.xpos) @ body.xmat.reshape(3, 3)
    # Every visible point lies on a face of the cube.
    np.testing.assert_allclose(np.abs(local).max(axis=1, initial=0.0), 0.025, atol=2e-4)


def test_project_and_unproject_are_inverse(scene):
    _, obs, info = scene
    camera = _camera(info, "left")
    points = unproject(obs["depth"]["left"], **camera).reshape(-1, 3)
    pixels, depth = project(points, **camera)
    rows, columns = np.indices((SIZE, SIZE))
    expected = np.stack([columns, rows], axis=-1).reshape(-1, 2) + 0.5
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    np.testing.assert_allclose(depth, obs["depth"]["left"].reshape(-1), rtol=1e-6)


def _camera(info, name):
    camera = info["cameras"][name]
    return {"matrix": camera["intrinsics"], "pose": camera["camera_to_world"]}


def _boxes(env, obs, info, camera):
    """Bounding boxes (x0, y0, x1, y1) of the cube: in the segmentation, and of its projected corners."""
    rows, columns = np.nonzero(obs["segmentation"][camera] == env.segmentation_classes.index("cube"))
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * 0.025
    body = env.sim.data.body("cube")
    pixels, _ = project(corners @ body.xmat.reshape(3, 3).T + body.xpos, **_camera(info, camera))
    seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return seen, np.array([*pixels.min(axis=0), *pixels.max(axis=0)])
