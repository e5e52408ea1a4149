"""Camera geometry at latent resolution: ray maps, and where a commanded gripper path lies in each view.

OpenCV axes, metres, pixel centres at +0.5; cameras [.., 3, 3] and camera-to-world [.., 4, 4].
"""

from __future__ import annotations

import torch
from torch import Tensor


def ray_map(
    intrinsics: Tensor, camera_to_world: Tensor, image: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Origin and unit direction of the ray through every latent cell: [..., 6, h, w].

    `image` (H, W) is the size that `intrinsics` belong to, `grid` (h, w) the latent size. Plain (o, d), not
    Pluecker coordinates, as EnerVerse and Genie-Envisioner use.
    """
    h, w = grid
    ys = (torch.arange(h, device=intrinsics.device, dtype=intrinsics.dtype) + 0.5) * (image[0] / h)
    xs = (torch.arange(w, device=intrinsics.device, dtype=intrinsics.dtype) + 0.5) * (image[1] / w)
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1)
    directions = camera_to_world[..., :3, :3] @ (torch.linalg.inv(intrinsics) @ pixels)
    directions = directions / directions.norm(dim=-2, keepdim=True)
    origins = camera_to_world[..., :3, 3:].expand_as(directions)
    return torch.cat([origins, directions], -2).unflatten(-1, (h, w))


def project_points(points: Tensor, intrinsics: Tensor, camera_to_world: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [..., 2] and depths [...] of world `points` [..., 3]; cameras broadcast against the points."""
    rotation, origin = camera_to_world[..., :3, :3], camera_to_world[..., :3, 3]
    local = torch.einsum("...ji,...j->...i", rotation, points - origin)
    depth = local[..., 2].clamp_min(1e-3)
    pixels = torch.einsum("...ij,...j->...i", intrinsics, local / depth[..., None])[..., :2]
    return pixels, depth


def commanded_path(start: Tensor, actions: Tensor, scale: Tensor) -> Tensor:
    """World positions [B, M, 3] a gripper is sent to: `start` [B, 3] plus the running sum of delta actions
    [B, M, A].

    `scale` [3] is metres per action unit.
    """
    return start[:, None] + (actions[..., :3] * scale).cumsum(1)


def path_map(
    path: Tensor,
    grip: Tensor,
    intrinsics: Tensor,
    camera_to_world: Tensor,
    image: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """Picture of a gripper path in every view at latent resolution: [B, V, M, 4, h, w].

    path [B, M, 3] world positions, grip [B, M] the gripper command. Channels: a soft spot at the projected
    position, the sub-cell offset to it (x, y, weighted by the spot), the gripper command (weighted likewise).
    EVAC (arXiv 2505.09723) draws the end effector into the image for the same purpose.
    """
    h, w = grid
    pixels, _ = project_points(path[:, None], intrinsics[:, :, None], camera_to_world[:, :, None])
    x = pixels[..., 0] * (w / image[1])
    y = pixels[..., 1] * (h / image[0])
    dx = (
        (x[..., None, None] - (torch.arange(w, device=path.device) + 0.5)).clamp(-3, 3).expand(*x.shape, h, w)
    )
    dy = (
        (y[..., None, None] - (torch.arange(h, device=path.device) + 0.5)[:, None])
        .clamp(-3, 3)
        .expand(*x.shape, h, w)
    )
    spot = torch.exp(-0.5 * (dx**2 + dy**2))
    return torch.stack([spot, spot * dx, spot * dy, spot * grip[:, None, :, None, None]], 3)
