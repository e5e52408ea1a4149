"""The definition of the rasteriser in plain torch: every Gaussian at every pixel, gradients by autograd, any dtype.

Every other implementation must agree. Source: Kerbl et al., 3D Gaussian Splatting (arXiv 2308.04079), with the rules of
gsplat 1.5.3: see `composite`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dataengine.rasterize.steps import Projected, Settings, Splats

THRESHOLD, MOST, STOP = (
    1 / 255,
    0.999,
    1e-4,
)  # alphas below do not count, above are cut; transmittance that ends a pixel
EXTENT = 3.33  # standard deviations that a radius never exceeds
CHUNK = 2**22  # pairs of pixel and Gaussian at a time


def project(
    settings: Settings, means: Tensor, quats: Any, scales: Any, covars: Any, opacities: Tensor, viewmats: Tensor,
    Ks: Tensor,
) -> Projected:  # fmt: skip
    """EWA projection: J W Sigma W^T J^T + eps2d, with J at the centre moved inside 1.3 times the field of view."""
    if covars is None:
        half = rotation_matrices(quats) * scales[..., None, :]
        covars = half @ half.mT
    else:  # the upper triangle counts
        covars = covars.triu() + covars.triu(1).mT
    rotation, shift = viewmats[..., :3, :3], viewmats[..., :3, 3]
    x, y, z = (
        sum(rotation[:, :, None, i, j] * means[:, None, :, j] for j in range(3)) + shift[:, :, None, i]
        for i in range(3)
    )
    visible = (z >= settings.near) & (z <= settings.far)
    z = torch.where(visible, z, 1.0)
    fx, fy, cx, cy = (Ks[..., i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    slopes = []
    for along, focal, centre, size in ((x, fx, cx, settings.width), (y, fy, cy, settings.height)):
        margin = 0.3 * (0.5 * size / focal)
        low, high = -(centre / focal + margin), (size - centre) / focal + margin
        slopes.append(torch.minimum(torch.maximum(along / z, low), high))
    zero = torch.zeros_like(z)
    jacobian = torch.stack(
        [fx / z, zero, -fx * slopes[0] / z, zero, fy / z, -fy * slopes[1] / z], -1
    ).unflatten(-1, (2, 3))
    turned = jacobian @ rotation[:, :, None]
    flat = turned @ covars[:, None] @ turned.mT
    a, b, c = flat[..., 0, 0], flat[..., 0, 1], flat[..., 1, 1]
    before = a * c - b * b
    a, c = a + settings.eps2d, c + settings.eps2d
    area = a * c - b * b
    visible = visible & (area > 0)
    area = torch.where(visible, area, 1.0)
    # where there is nothing left of a Gaussian, the root has no gradient
    share = torch.where(visible & (before > 0), before / area, 1.0).sqrt() * (before > 0)
    factor = share if settings.antialiased else torch.ones_like(share)
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)
    radii = _radii(
        settings, means2d.detach(), a.detach(), c.detach(), (opacities[:, None] * factor).detach(), visible
    )
    kept = (radii > 0).all(-1)
    conics = torch.stack([c / area, -b / area, a / area], -1)
    means2d, conics = (torch.where(kept[..., None], value, 0.0) for value in (means2d, conics))
    return Projected(radii, means2d, torch.where(kept, z, 0.0), conics, torch.where(kept, factor, 0.0))


def _radii(
    settings: Settings, means2d: Tensor, a: Tensor, c: Tensor, opaque: Tensor, visible: Tensor
) -> Tensor:
    """Whole pixels, int32, outside which alpha is below the threshold; 0 for what is not visible."""
    extent = (2 * (opaque.clamp(min=THRESHOLD) / THRESHOLD).log()).sqrt().clamp(max=EXTENT)
    radii = torch.stack(
        [(extent * a.clamp(min=0).sqrt()).ceil(), (extent * c.clamp(min=0).sqrt()).ceil()], -1
    )
    size = torch.tensor([settings.width, settings.height], device=a.device)
    inside = ((means2d + radii > 0) & (means2d - radii < size)).all(-1)
    kept = visible & (opaque >= THRESHOLD) & (radii > settings.radius_clip).any(-1) & inside
    return torch.where(kept[..., None], radii, 0).int()


def rotation_matrices(quats: Tensor) -> Tensor:
    """Rotations [.., 3, 3] of quaternions wxyz [.., 4] of any length."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def harmonics(degree: int, means: Tensor, centres: Tensor, coefficients: Tensor, visible: Tensor) -> Tensor:
    """max(0, 0.5 + sum over k of coefficient k times real spherical harmonic k) in the direction from camera to Gaussian.

    means [B, N, 3], centres of the cameras [B, C, 3], coefficients [B, (C,) N, K, 3]; 0.5 where not visible.
    """
    if coefficients.ndim == 4:
        coefficients = coefficients[:, None]
    rays = F.normalize(means[:, None] - centres[:, :, None], dim=-1)
    basis = torch.stack(_basis(degree, *rays.unbind(-1)), -1)
    sums = (basis[..., None] * coefficients[..., : (degree + 1) ** 2, :]).sum(-2)
    return (torch.where(visible[..., None], sums, 0.0) + 0.5).clamp(min=0.0)


def _basis(degree: int, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    """Real spherical harmonics of unit vectors, with the signs of the original 3D Gaussian Splatting."""
    pi = math.pi
    found = [torch.full_like(x, math.sqrt(1 / (4 * pi)))]
    if degree > 0:
        one = math.sqrt(3 / (4 * pi))
        found += [-one * y, one * z, -one * x]
    if degree > 1:
        two, middle, last = math.sqrt(15 / (4 * pi)), math.sqrt(5 / (16 * pi)), math.sqrt(15 / (16 * pi))
        found += [two * x * y, -two * y * z, middle * (3 * z * z - 1), -two * x * z, last * (x * x - y * y)]
    if degree > 2:
        a, b = math.sqrt(35 / (32 * pi)), math.sqrt(105 / (4 * pi))
        c, d, e = math.sqrt(21 / (32 * pi)), math.sqrt(7 / (16 * pi)), math.sqrt(105 / (16 * pi))
        found += [
            -a * y * (3 * x * x - y * y), b * x * y * z, -c * y * (5 * z * z - 1), d * z * (5 * z * z - 3),
            -c * x * (5 * z * z - 1), e * z * (x * x - y * y), -a * x * (x * x - 3 * y * y),
        ]  # fmt: skip
    return found


def composite(
    settings: Settings, splats: Splats, backgrounds: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Front to back in order of depth, of the index where depths are equal: alpha = min(.999, opacity exp(-sigma)), which
    counts where sigma >= 0 and alpha >= 1/255; a pixel ends before the Gaussian that would leave it <= 1e-4."""
    edges = splats.starts.tolist()
    means2d = splats.means2d.reshape(-1, 2)
    if settings.absgrad:
        splats.means2d.absgrad = torch.zeros_like(splats.means2d)  # type: ignore[attr-defined]
    images = []
    for image in range(len(edges) - 1):
        index = torch.arange(edges[image], edges[image + 1], device=means2d.device)
        index = index[(splats.radii[index] > 0).all(-1)]
        index = index[splats.depths[index].sort(stable=True).indices]
        images.append(_composite_image(settings, splats, means2d, index))
    size = (len(images), settings.height, settings.width)
    none = means2d.new_zeros(0, splats.colors.shape[-1] + 1)
    drawn = torch.cat(images or [none]).reshape(*size, -1) if images else none.reshape(*size, none.shape[-1])
    colors, left = drawn[..., :-1], drawn[..., -1:]
    if backgrounds is not None:
        colors = colors + left * backgrounds[:, None, None]
    return colors, 1 - left, {}


def _composite_image(settings: Settings, splats: Splats, means2d: Tensor, index: Tensor) -> Tensor:
    """Colours and, last, the light that is left, [height * width, D + 1]."""
    rows = torch.arange(settings.height, device=means2d.device, dtype=means2d.dtype) + 0.5
    columns = torch.arange(settings.width, device=means2d.device, dtype=means2d.dtype) + 0.5
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).reshape(-1, 2)
    a, b, c = splats.conics[index].unbind(-1)
    opaque, colors, places = splats.opacities[index], splats.colors[index], means2d[index]
    parts = []
    for part in pixels.split(max(1, CHUNK // max(1, len(index)))):
        centres = places[None].expand(len(part), -1, -1)
        if settings.absgrad and centres.requires_grad:
            centres.register_hook(lambda g, index=index: _add_absolute(splats.means2d, index, g))
        dx, dy = (centres - part[:, None]).unbind(-1)
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (opaque * torch.exp(-sigma)).clamp(max=MOST)
        alpha = torch.where((sigma >= 0) & (alpha >= THRESHOLD), alpha, 0.0)
        alpha = torch.where((1 - alpha.detach()).cumprod(-1) > STOP, alpha, 0.0)
        left = F.pad((1 - alpha).cumprod(-1), (1, 0), value=1.0)
        parts.append(torch.cat([(alpha * left[:, :-1]) @ colors, left[:, -1:]], -1))
    return torch.cat(parts)


def _add_absolute(means2d: Tensor, index: Tensor, gradient: Tensor) -> None:
    means2d.absgrad.view(-1, 2).index_add_(0, index, gradient.abs().sum(0))  # type: ignore[attr-defined]
