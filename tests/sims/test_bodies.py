"""Named bodies: which there are, and that poses carry what is seen at one frame to where it is seen at another."""

import gymnasium
import numpy as np
import pytest

import sims
from sims.cameras import camera_to_world, intrinsics, project, unproject
from sims.experts import make_expert

ROBOT = (*(f"link{i}" for i in range(1, 8)), "hand", "finger_left", "finger_right")
SIZE = 96


@pytest.mark.parametrize("task", sims.TASKS)
def test_names_are_the_robot_and_the_objects(task):
    env = gymnasium.make(f"enerverse/{task}-v0", cameras=(), modalities=("bodies",)).unwrapped
    assert env.bodies == (*ROBOT, *env.task.objects)
    obs, info = env.reset(seed=0)
    assert list(obs) == ["state"]
    assert tuple(info["bodies"]) == env.bodies
    for name, pose in info["bodies"].items():
        np.testing.assert_array_equal(pose[:3], env.sim.position(name))
        assert np.linalg.norm(pose[3:]) == pytest.approx(1.0)


def test_body_ids_refine_the_classes():
    env = gymnasium.make("enerverse/OpenDrawer-v0", image_size=SIZE, modalities=("segmentation", "bodies"))
    obs, info = env.reset(seed=0)
    bodies, classes = env.unwrapped.bodies, env.unwrapped.segmentation_classes
    found = set()
    for name in obs["bodies"]:
        ids, kinds = obs["bodies"][name], obs["segmentation"][name]
        found |= set(np.unique(ids).tolist())
        robot = (ids > 0) & (ids <= len(ROBOT))
        assert (kinds[robot] == 1).all()
        for thing in ("cabinet", "drawer", "handle"):
            np.testing.assert_array_equal(ids == 1 + bodies.index(thing), kinds == classes.index(thing))
    assert {0, 1 + bodies.index("drawer"), 1 + bodies.index("hand")} <= found
    assert "bodies" in info
    env.close()


def test_nothing_of_it_unless_asked():
    env = gymnasium.make("enerverse/Lift-v0", image_size=16)
    obs, info = env.reset(seed=0)
    env.close()
    assert "bodies" not in obs
    assert "bodies" not in info


def pictures(env, view):
    """Ids, depth and camera of a view now."""
    sim = env.sim
    camera = {"matrix": intrinsics(sim.model, view, SIZE), "pose": camera_to_world(sim.model, sim.data, view)}
    return env.render_camera(view, "bodies"), env.render_camera(view, "depth"), camera


def rigid(pose):
    """[7] -> rotation [3, 3] and position [3]."""
    w, x, y, z = pose[3:]
    turn = np.array([[w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z]])  # fmt: skip
    return turn, pose[:3]


@pytest.fixture(scope="module")
def lift():
    """A lifted cube: the environment, and what two views and the poses were at the first frame and at the last."""
    env = gymnasium.make("enerverse/Lift-v0", cameras=(), modalities=("bodies",), image_size=SIZE)
    obs, info = env.reset(seed=2)
    expert, base, moments = make_expert(env), env.unwrapped, []
    for step in range(31):
        if step in (0, 30):
            moments.append(({v: pictures(base, v) for v in ("front", "left")}, info["bodies"]))
        obs, *_, info = env.step(expert.act(obs, info)[0])
    yield base, *moments
    env.close()


@pytest.mark.parametrize(
    ("view", "body"),
    [
        ("front", "cube"),
        ("front", "hand"),
        ("front", "link7"),
        ("front", "finger_left"),
        ("left", "hand"),
        ("left", "link7"),
    ],
)
def test_moved_points_land_on_the_pixels_of_their_body(lift, view, body):
    env, (before, poses_before), (after, poses_after) = lift
    number = 1 + env.bodies.index(body)
    ids, depth, camera = before[view]
    turn, place = rigid(poses_before[body])
    local = (unproject(depth, **camera)[ids == number] - place) @ turn
    turn, place = rigid(poses_after[body])
    moved = local @ turn.T + place
    assert len(moved) > 25
    assert np.linalg.norm(moved - unproject(depth, **camera)[ids == number], axis=1).min() > 0.02
    ids, depth, camera = after[view]
    pixels, distance = project(moved, **camera)
    columns, rows = np.floor(pixels).astype(int).T
    inside = (rows > 0) & (rows < SIZE - 1) & (columns > 0) & (columns < SIZE - 1)
    rows, columns, distance = rows[inside], columns[inside], distance[inside]
    down, right = np.indices((3, 3)).reshape(2, 9) - 1
    window = (rows[:, None] + down, columns[:, None] + right)
    near = ids[window] == number
    hidden = depth[window].min(axis=1) < distance - 1e-3
    # Beside the silhouette a pixel's centre may miss the body where the point itself does not.
    assert (near.any(axis=1) | hidden).all()
    full = near.all(axis=1)
    assert full.sum() > 5
    error = np.abs(depth[rows, columns][full] - distance[full])
    assert np.median(error) < 0.002
