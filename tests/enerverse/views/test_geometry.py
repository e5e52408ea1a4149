"""Ray maps and projections against loops over pixels and against the cameras of the datasets."""

import numpy as np
import pytest
import torch

from dataengine.cameras import Cameras
from enerverse.views import commanded_path, path_map, project_points, ray_map

SIZE, GRID = (16, 16), (4, 8)


@pytest.fixture
def tensors(cameras) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(cameras[0]), torch.from_numpy(cameras[1])


@pytest.fixture
def real(cameras) -> Cameras:
    return Cameras(("front", "top"), *cameras, SIZE[1], SIZE[0])


@pytest.fixture
def points() -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.2, 0.2, (7, 3))


def test_rays_equal_a_loop_over_cells(tensors):
    rays = ray_map(*tensors, SIZE, GRID)
    assert rays.shape == (2, 6, *GRID)
    for view in range(2):
        intrinsics, pose = tensors[0][view].numpy(), tensors[1][view].numpy()
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                u, v = (column + 0.5) * SIZE[1] / GRID[1], (row + 0.5) * SIZE[0] / GRID[0]
                local = (
                    (u - intrinsics[0, 2]) / intrinsics[0, 0],
                    (v - intrinsics[1, 2]) / intrinsics[1, 1],
                    1,
                )
                direction = pose[:3, :3] @ local
                expected = [*pose[:3, 3], *(direction / np.linalg.norm(direction))]
                np.testing.assert_allclose(rays[view, :, row, column].numpy(), expected, atol=1e-12)


def test_a_point_along_a_ray_projects_to_the_centre_of_its_cell(tensors, real):
    rays = ray_map(*tensors, SIZE, GRID).numpy()
    ys, xs = (np.arange(GRID[0]) + 0.5) * SIZE[0] / GRID[0], (np.arange(GRID[1]) + 0.5) * SIZE[1] / GRID[1]
    centres = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
    for view in range(2):
        along = (rays[view, :3] + 0.7 * rays[view, 3:]).reshape(3, -1).T
        pixels, _ = real.project(along)
        np.testing.assert_allclose(pixels[view], centres, atol=1e-9)


def test_rays_at_full_size_pass_through_unprojected_pixels(tensors, real):
    rays = ray_map(*tensors, SIZE, SIZE).permute(0, 2, 3, 1).numpy()
    points = real.unproject(np.full((2, *SIZE), 1.3))
    offset = points - rays[..., :3]
    np.testing.assert_allclose(
        offset / np.linalg.norm(offset, axis=-1, keepdims=True), rays[..., 3:], atol=1e-9
    )


def test_leading_dimensions_broadcast(tensors):
    batched = ray_map(tensors[0].expand(3, 2, 3, 3), tensors[1].expand(3, 2, 4, 4), SIZE, GRID)
    assert torch.equal(batched[2], ray_map(*tensors, SIZE, GRID))


def test_projection_equals_that_of_the_cameras(tensors, real, points):
    pixels, depth = project_points(torch.from_numpy(points), tensors[0][:, None], tensors[1][:, None])
    expected, expected_depth = real.project(points)
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(depth.numpy(), expected_depth, atol=1e-9)


def test_a_point_behind_the_camera_stays_finite(tensors):
    behind = tensors[1][:, :3, 3] - tensors[1][:, :3, 2]
    pixels, depth = project_points(behind, *tensors)
    assert torch.isfinite(pixels).all()
    assert (depth > 0).all()


def test_a_commanded_path_adds_up_scaled_actions():
    actions = torch.tensor([[[1.0, 0, 0, 9, 9, 9, 1], [0, -1, 0.5, 9, 9, 9, 1]]])
    path = commanded_path(torch.tensor([[0.1, 0.2, 0.3]]), actions, torch.tensor([0.01, 0.02, 0.04]))
    torch.testing.assert_close(path, torch.tensor([[[0.11, 0.2, 0.3], [0.11, 0.18, 0.32]]]))


@pytest.fixture
def drawn(tensors, points):
    path = torch.from_numpy(points)[None]
    grip = torch.linspace(-1, 1, 7, dtype=torch.float64)[None]
    batched = tensors[0][None], tensors[1][None]
    return path_map(path, grip, *batched, SIZE, GRID), grip


def test_the_spot_peaks_in_the_cell_a_point_projects_into(drawn, real, points):
    pixels, _ = real.project(points)
    cells = np.floor(pixels * [GRID[1] / SIZE[1], GRID[0] / SIZE[0]]).astype(int)
    inside = ((cells >= 0) & (cells < [GRID[1], GRID[0]])).all(-1)
    assert inside.sum() > 4
    for view, index in np.argwhere(inside):
        spot = drawn[0][0, view, index, 0]
        assert list(np.unravel_index(int(spot.argmax()), GRID))[::-1] == cells[view, index].tolist()


def test_the_offset_channels_lead_from_the_peak_to_the_point(drawn, real, points):
    pixels, _ = real.project(points)
    for view in range(2):
        for index in range(7):
            spot, dx, dy, _ = drawn[0][0, view, index]
            row, column = np.unravel_index(int(spot.argmax()), GRID)
            x = column + 0.5 + float(dx[row, column] / spot[row, column])
            y = row + 0.5 + float(dy[row, column] / spot[row, column])
            expected = pixels[view, index] * [GRID[1] / SIZE[1], GRID[0] / SIZE[0]]
            np.testing.assert_allclose([x, y], expected, atol=1e-9)


def test_the_last_channel_is_the_gripper_command_on_the_spot(drawn):
    maps, grip = drawn
    torch.testing.assert_close(maps[:, :, :, 3], maps[:, :, :, 0] * grip[:, None, :, None, None])
