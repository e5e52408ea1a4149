"""The rasteriser on a CPU: projection and spherical harmonics, Gaussian by Gaussian, and the steps with their gradients.

Pixels are composited in `dataengine.rasterize.simd`. Geometry is computed in float64 whatever comes in: it costs the same
for one number at a time and keeps long thin Gaussians exact. Depths alone are computed in the given precision, in the
order of the reference, so that near ties are sorted alike. Work is cut into blocks of a fixed size, whose shares of a
gradient are added up in order: the result does not depend on the number of threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dataengine.rasterize import simd
from dataengine.rasterize.steps import Projected, Settings, Splats
from sparse_core.kernels.compiled import cached
from sparse_core.kernels.threads import split

BLOCK = 256  # Gaussians of a task
THRESHOLD, EXTENT = 1 / 255, 3.33
PI = math.pi
ONE = math.sqrt(3 / (4 * PI))
TWO, TWO_MIDDLE, TWO_LAST = math.sqrt(15 / (4 * PI)), math.sqrt(5 / (16 * PI)), math.sqrt(15 / (16 * PI))
THREE_A, THREE_B, THREE_C = math.sqrt(35 / (32 * PI)), math.sqrt(105 / (4 * PI)), math.sqrt(21 / (32 * PI))
THREE_D, THREE_E = math.sqrt(7 / (16 * PI)), math.sqrt(105 / (16 * PI))

kernel = cached(nogil=True, no_cfunc_wrapper=True)
part = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]


@part
def _rotation(quats, at, r):
    """Rotation r [3, 3] of the quaternion wxyz at quats[at]; returns 1 / its length."""
    w, x, y, z = (
        np.float64(quats[at]),
        np.float64(quats[at + 1]),
        np.float64(quats[at + 2]),
        np.float64(quats[at + 3]),
    )
    scale = 1.0 / max(math.sqrt(w * w + x * x + y * y + z * z), 1e-12)
    w, x, y, z = w * scale, x * scale, y * scale, z * scale
    r[0, 0], r[0, 1], r[0, 2] = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)
    r[1, 0], r[1, 1], r[1, 2] = 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    r[2, 0], r[2, 1], r[2, 2] = 2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)
    return scale


@part
def _covariance(quats, scales, covars, g, r, sigma):
    """Covariance sigma [3, 3] of Gaussian g; r gets its rotation. Without quats, the upper triangle of covars."""
    if len(quats) > 0:
        _rotation(quats, 4 * g, r)
        for i in range(3):
            for j in range(3):
                total = 0.0
                for k in range(3):
                    total += r[i, k] * r[j, k] * np.float64(scales[3 * g + k]) ** 2
                sigma[i, j] = total
    else:
        for i in range(3):
            for j in range(3):
                sigma[i, j] = covars[9 * g + 3 * min(i, j) + max(i, j)]


@part
def _camera(viewmats, Ks, view, w, k):
    """w [3, 4]: world to camera; k: fx, fy, cx, cy."""
    for i in range(3):
        for j in range(4):
            w[i, j] = viewmats[16 * view + 4 * i + j]
    k[0], k[1], k[2], k[3] = Ks[9 * view], Ks[9 * view + 4], Ks[9 * view + 2], Ks[9 * view + 5]


@part
def _slope(along, focal, centre, size):
    """A slope moved inside 1.3 times the field of view, and whether it was inside."""
    margin = 0.3 * (0.5 * size / focal)
    low, high = -(centre / focal + margin), (size - centre) / focal + margin
    return min(max(along, low), high), low <= along <= high


@part
def _flatten(w, k, p, sigma, width, height, t):
    """Covariance in the image without eps2d, xx, xy, yy; p is the centre in the camera, t [2, 3] gets J W."""
    sx, _ = _slope(p[0] / p[2], k[0], k[2], width)
    sy, _ = _slope(p[1] / p[2], k[1], k[3], height)
    for j in range(3):
        t[0, j] = k[0] / p[2] * (w[0, j] - sx * w[2, j])
        t[1, j] = k[1] / p[2] * (w[1, j] - sy * w[2, j])
    xx, xy, yy = 0.0, 0.0, 0.0
    for i in range(3):
        for j in range(3):
            xx += t[0, i] * sigma[i, j] * t[0, j]
            xy += t[0, i] * sigma[i, j] * t[1, j]
            yy += t[1, i] * sigma[i, j] * t[1, j]
    return xx, xy, yy


@kernel
def project_forward(
    means, quats, scales, covars, opacities, viewmats, Ks, radii, means2d, depths, conics, factors, sizes, options,
    low, high,
):  # fmt: skip
    """`reference.project` of the blocks low .. high of Gaussians, counted over batches; all flat, outputs hold zeros."""
    n, views, width, height, block, antialiased = sizes
    near, far, radius_clip, eps2d = options
    w, k, p, r = np.empty((3, 4)), np.empty(4), np.empty(3), np.empty((3, 3))
    sigma, t = np.empty((3, 3)), np.empty((2, 3))
    blocks = -(-n // block)
    for task in range(low, high):
        batch, start = task // blocks, task % blocks * block
        for g in range(batch * n + start, batch * n + min(start + block, n)):
            _covariance(quats, scales, covars, g, r, sigma)
            for view in range(batch * views, (batch + 1) * views):
                _camera(viewmats, Ks, view, w, k)
                place = 16 * view + 8
                depth = viewmats[place] * means[3 * g] + viewmats[place + 1] * means[3 * g + 1]
                depth = depth + viewmats[place + 2] * means[3 * g + 2] + viewmats[place + 3]
                if not near <= depth <= far:
                    continue
                for i in range(3):
                    p[i] = (
                        w[i, 0] * means[3 * g]
                        + w[i, 1] * means[3 * g + 1]
                        + w[i, 2] * means[3 * g + 2]
                        + w[i, 3]
                    )
                xx, xy, yy = _flatten(w, k, p, sigma, width, height, t)
                before = xx * yy - xy * xy
                xx, yy = xx + eps2d, yy + eps2d
                det = xx * yy - xy * xy
                if not det > 0:
                    continue
                factor = math.sqrt(max(before / det, 0.0)) if antialiased else 1.0
                opacity = opacities[g] * factor
                if opacity < THRESHOLD:
                    continue
                extent = min(EXTENT, math.sqrt(2.0 * math.log(opacity / THRESHOLD)))
                rx, ry = math.ceil(extent * math.sqrt(xx)), math.ceil(extent * math.sqrt(yy))
                if rx <= radius_clip and ry <= radius_clip:
                    continue
                x, y = k[0] * p[0] / p[2] + k[2], k[1] * p[1] / p[2] + k[3]
                if x + rx <= 0 or x - rx >= width or y + ry <= 0 or y - ry >= height:
                    continue
                out = view * n + g - batch * n
                radii[2 * out], radii[2 * out + 1] = min(rx, 2**30), min(ry, 2**30)
                means2d[2 * out], means2d[2 * out + 1] = x, y
                depths[out], factors[out] = depth, factor
                conics[3 * out], conics[3 * out + 1], conics[3 * out + 2] = yy / det, -xy / det, xx / det


@part
def _flat_gradient(v_a, v_b, v_c, v_factor, xx, xy, yy, eps2d, v):
    """v [2, 2]: gradient of the covariance in the image from that of the conic and of the antialiasing factor."""
    a1, c1 = xx + eps2d, yy + eps2d
    det = a1 * c1 - xy * xy
    a, b, c = (
        c1 / det,
        -xy / det,
        a1 / det,
    )  # the conic P; v = -P G P with G = [[v_a, v_b / 2], [v_b / 2, v_c]]
    g00, g01 = v_a * a + 0.5 * v_b * b, v_a * b + 0.5 * v_b * c
    g10, g11 = 0.5 * v_b * a + v_c * b, 0.5 * v_b * b + v_c * c
    v[0, 0], v[1, 1] = -(a * g00 + b * g10), -(b * g01 + c * g11)
    v[0, 1] = -0.5 * (a * g01 + b * g11 + b * g00 + c * g10)
    before = xx * yy - xy * xy
    if v_factor != 0 and before > 0:
        share = before / det
        scale = v_factor * 0.5 / math.sqrt(share) / det
        v[0, 0] += scale * (yy - share * c1)
        v[1, 1] += scale * (xx - share * a1)
        v[0, 1] += scale * (share - 1.0) * xy
    v[1, 0] = v[0, 1]


@part
def _shape_gradient(quats, scales, g, r, v_sigma, v_quats, v_scales):
    """Gradients of a quaternion and its scales from that of the covariance R S S R^T."""
    v_r = np.empty((3, 3))
    scale = _rotation(quats, 4 * g, r)
    for j in range(3):
        s = np.float64(scales[3 * g + j])
        total = 0.0
        for i in range(3):
            v_m = 0.0
            for a in range(3):
                v_m += (v_sigma[i, a] + v_sigma[a, i]) * r[a, j] * s
            total += r[i, j] * v_m
            v_r[i, j] = v_m * s
        v_scales[3 * g + j] = total
    w, x, y, z = (
        quats[4 * g] * scale,
        quats[4 * g + 1] * scale,
        quats[4 * g + 2] * scale,
        quats[4 * g + 3] * scale,
    )
    v_w = 2 * (x * (v_r[2, 1] - v_r[1, 2]) + y * (v_r[0, 2] - v_r[2, 0]) + z * (v_r[1, 0] - v_r[0, 1]))
    v_x = 2 * (-2 * x * (v_r[1, 1] + v_r[2, 2]) + y * (v_r[1, 0] + v_r[0, 1]) + z * (v_r[2, 0] + v_r[0, 2])
               + w * (v_r[2, 1] - v_r[1, 2]))  # fmt: skip
    v_y = 2 * (x * (v_r[1, 0] + v_r[0, 1]) - 2 * y * (v_r[0, 0] + v_r[2, 2]) + z * (v_r[2, 1] + v_r[1, 2])
               + w * (v_r[0, 2] - v_r[2, 0]))  # fmt: skip
    v_z = 2 * (x * (v_r[2, 0] + v_r[0, 2]) + y * (v_r[2, 1] + v_r[1, 2]) - 2 * z * (v_r[0, 0] + v_r[1, 1])
               + w * (v_r[1, 0] - v_r[0, 1]))  # fmt: skip
    along = w * v_w + x * v_x + y * v_y + z * v_z
    v_quats[4 * g], v_quats[4 * g + 1] = (v_w - along * w) * scale, (v_x - along * x) * scale
    v_quats[4 * g + 2], v_quats[4 * g + 3] = (v_y - along * y) * scale, (v_z - along * z) * scale


@kernel
def project_backward(
    means, quats, scales, covars, viewmats, Ks, radii, v_means2d, v_depths, v_conics, v_factors,
    v_means, v_quats, v_scales, v_covars, shares, sizes, options, low, high,
):  # fmt: skip
    """Gradients of `project_forward` of the blocks low .. high; shares [blocks, C, 3, 4]: each block's part of that of the
    viewmats."""
    n, views, width, height, block, antialiased = sizes
    eps2d = options[3]
    w, k, p, r = np.empty((3, 4)), np.empty(4), np.empty(3), np.empty((3, 3))
    sigma, t, v = np.empty((3, 3)), np.empty((2, 3)), np.empty((2, 2))
    v_sigma, v_t, v_p, v_mean = np.empty((3, 3)), np.empty((2, 3)), np.empty(3), np.empty(3)
    blocks = -(-n // block)
    for task in range(low, high):
        batch, start = task // blocks, task % blocks * block
        for g in range(batch * n + start, batch * n + min(start + block, n)):
            seen = False
            for view in range(batch * views, (batch + 1) * views):
                out = view * n + g - batch * n
                if radii[2 * out] <= 0 or radii[2 * out + 1] <= 0:
                    continue
                if not seen:
                    seen = True
                    _covariance(quats, scales, covars, g, r, sigma)
                    v_sigma[:, :] = 0
                    v_mean[:] = 0
                _camera(viewmats, Ks, view, w, k)
                for i in range(3):
                    p[i] = (
                        w[i, 0] * means[3 * g]
                        + w[i, 1] * means[3 * g + 1]
                        + w[i, 2] * means[3 * g + 2]
                        + w[i, 3]
                    )
                xx, xy, yy = _flatten(w, k, p, sigma, width, height, t)
                v_factor = np.float64(v_factors[out]) if antialiased else 0.0
                _flat_gradient(
                    np.float64(v_conics[3 * out]), np.float64(v_conics[3 * out + 1]), np.float64(v_conics[3 * out + 2]),
                    v_factor, xx, xy, yy, eps2d, v,
                )  # fmt: skip
                for i in range(3):
                    for j in range(3):
                        for a in range(2):
                            v_sigma[i, j] += t[a, i] * (v[a, 0] * t[0, j] + v[a, 1] * t[1, j])
                for a in range(2):
                    for j in range(3):
                        v_t[a, j] = 0.0
                        for i in range(3):
                            v_t[a, j] += 2.0 * (v[a, 0] * t[0, i] + v[a, 1] * t[1, i]) * sigma[i, j]
                v_p[0], v_p[1], v_p[2] = 0.0, 0.0, np.float64(v_depths[out])
                for a in range(2):
                    size = width if a == 0 else height
                    ratio = p[a] / p[2]
                    slope, inside = _slope(ratio, k[a], k[2 + a], size)
                    v_scale, v_slope = 0.0, 0.0  # of k / depth, and of the slope
                    for j in range(3):
                        v_scale += v_t[a, j] * (w[a, j] - slope * w[2, j])
                        v_slope -= v_t[a, j] * w[2, j] * k[a] / p[2]
                    v_p[2] -= v_scale * k[a] / (p[2] * p[2])
                    v_ratio = k[a] * np.float64(v_means2d[2 * out + a]) + (v_slope if inside else 0.0)
                    v_p[a] += v_ratio / p[2]
                    v_p[2] -= v_ratio * ratio / p[2]
                    if len(shares) > 0:
                        share = (task * views + view - batch * views) * 12
                        for j in range(3):
                            shares[share + 4 * a + j] += v_t[a, j] * k[a] / p[2]
                            shares[share + 8 + j] -= v_t[a, j] * k[a] / p[2] * slope
                for i in range(3):
                    for j in range(3):
                        v_mean[j] += w[i, j] * v_p[i]
                    if len(shares) > 0:
                        share = (task * views + view - batch * views) * 12 + 4 * i
                        for j in range(3):
                            shares[share + j] += v_p[i] * means[3 * g + j]
                        shares[share + 3] += v_p[i]
            if seen:
                for i in range(3):
                    v_means[3 * g + i] = v_mean[i]
                if len(quats) > 0:
                    _shape_gradient(quats, scales, g, r, v_sigma, v_quats, v_scales)
                else:
                    for i in range(3):
                        for j in range(i, 3):
                            v_covars[9 * g + 3 * i + j] = v_sigma[i, j] + (v_sigma[j, i] if i != j else 0.0)


@part
def _basis(degree, x, y, z, basis, slopes):
    """The real spherical harmonics of a unit vector, basis [16], and their derivatives by x, y, z, slopes [16, 3]."""
    slopes[:, :] = 0.0
    basis[0] = math.sqrt(1 / (4 * PI))
    if degree > 0:
        basis[1], basis[2], basis[3] = -ONE * y, ONE * z, -ONE * x
        slopes[1, 1], slopes[2, 2], slopes[3, 0] = -ONE, ONE, -ONE
    if degree > 1:
        basis[4], slopes[4, 0], slopes[4, 1] = TWO * x * y, TWO * y, TWO * x
        basis[5], slopes[5, 1], slopes[5, 2] = -TWO * y * z, -TWO * z, -TWO * y
        basis[6], slopes[6, 2] = TWO_MIDDLE * (3 * z * z - 1), 6 * TWO_MIDDLE * z
        basis[7], slopes[7, 0], slopes[7, 2] = -TWO * x * z, -TWO * z, -TWO * x
        basis[8], slopes[8, 0], slopes[8, 1] = TWO_LAST * (x * x - y * y), 2 * TWO_LAST * x, -2 * TWO_LAST * y
    if degree > 2:
        basis[9] = -THREE_A * y * (3 * x * x - y * y)
        slopes[9, 0], slopes[9, 1] = -6 * THREE_A * x * y, -3 * THREE_A * (x * x - y * y)
        basis[10], slopes[10, 0] = THREE_B * x * y * z, THREE_B * y * z
        slopes[10, 1], slopes[10, 2] = THREE_B * x * z, THREE_B * x * y
        basis[11] = -THREE_C * y * (5 * z * z - 1)
        slopes[11, 1], slopes[11, 2] = -THREE_C * (5 * z * z - 1), -10 * THREE_C * y * z
        basis[12], slopes[12, 2] = THREE_D * z * (5 * z * z - 3), THREE_D * (15 * z * z - 3)
        basis[13] = -THREE_C * x * (5 * z * z - 1)
        slopes[13, 0], slopes[13, 2] = -THREE_C * (5 * z * z - 1), -10 * THREE_C * x * z
        basis[14], slopes[14, 0] = THREE_E * z * (x * x - y * y), 2 * THREE_E * x * z
        slopes[14, 1], slopes[14, 2] = -2 * THREE_E * y * z, THREE_E * (x * x - y * y)
        basis[15] = -THREE_A * x * (x * x - 3 * y * y)
        slopes[15, 0], slopes[15, 1] = -3 * THREE_A * (x * x - y * y), 6 * THREE_A * x * y


@part
def _ray(means, centres, g, view, ray):
    """Unit vector from a camera to a Gaussian; returns 1 / the distance."""
    total = 0.0
    for i in range(3):
        ray[i] = np.float64(means[3 * g + i]) - np.float64(centres[3 * view + i])
        total += ray[i] * ray[i]
    inverse = 1.0 / max(math.sqrt(total), 1e-12)
    for i in range(3):
        ray[i] *= inverse
    return inverse


@kernel
def shade_forward(means, centres, coefficients, visible, colors, sizes, low, high):
    """`reference.harmonics` of the blocks low .. high; coefficients [B, C or 1, N, K, 3]. All flat."""
    n, views, block, degree, count, per_view = sizes
    basis, slopes, ray = np.empty(16), np.empty((16, 3)), np.empty(3)
    blocks, used = -(-n // block), (degree + 1) * (degree + 1)
    for task in range(low, high):
        batch, start = task // blocks, task % blocks * block
        for view in range(batch * views, (batch + 1) * views):
            for i in range(start, min(start + block, n)):
                out = view * n + i
                sums = (0.5, 0.5, 0.5)
                if visible[out]:
                    _ray(means, centres, batch * n + i, view, ray)
                    _basis(degree, ray[0], ray[1], ray[2], basis, slopes)
                    at = (out if per_view else batch * n + i) * count * 3
                    red, green, blue = sums
                    for k in range(used):
                        red += basis[k] * coefficients[at + 3 * k]
                        green += basis[k] * coefficients[at + 3 * k + 1]
                        blue += basis[k] * coefficients[at + 3 * k + 2]
                    sums = (red, green, blue)
                for c in range(3):
                    colors[3 * out + c] = max(sums[c], 0.0)


@kernel
def shade_backward(
    means, centres, coefficients, visible, colors, v_colors, v_means, v_coefficients, shares, sizes, low, high
):
    """Gradients of `shade_forward`; those that are summed over views are added to what is there. shares [blocks, C, 3]:
    each block's part of the gradient of the centres."""
    n, views, block, degree, count, per_view = sizes
    basis, slopes, ray, v_ray = np.empty(16), np.empty((16, 3)), np.empty(3), np.empty(3)
    blocks, used = -(-n // block), (degree + 1) * (degree + 1)
    for task in range(low, high):
        batch, start = task // blocks, task % blocks * block
        for view in range(batch * views, (batch + 1) * views):
            share = 3 * (task * views + view - batch * views)
            for i in range(start, min(start + block, n)):
                out, g = view * n + i, batch * n + i
                if not visible[out]:
                    continue
                inverse = _ray(means, centres, g, view, ray)
                _basis(degree, ray[0], ray[1], ray[2], basis, slopes)
                at = (out if per_view else g) * count * 3
                v_ray[:] = 0.0
                for c in range(3):
                    if colors[3 * out + c] <= 0:
                        continue
                    v = np.float64(v_colors[3 * out + c])
                    for k in range(used):
                        v_coefficients[at + 3 * k + c] += basis[k] * v
                        weight = v * coefficients[at + 3 * k + c]
                        for a in range(3):
                            v_ray[a] += weight * slopes[k, a]
                along = ray[0] * v_ray[0] + ray[1] * v_ray[1] + ray[2] * v_ray[2]
                for a in range(3):
                    v = (v_ray[a] - along * ray[a]) * inverse
                    v_means[3 * g + a] += v
                    shares[share + a] -= v


def _flat(x: Tensor | None, like: Tensor) -> np.ndarray:
    """A tensor as a flat array, its own memory where it is contiguous; nothing as an empty one."""
    return (like.new_empty(0) if x is None else x.detach().contiguous().view(-1)).numpy()


def _zeros(shape: Any, like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype)


def _or_zeros(v: Tensor | None, like: Tensor) -> np.ndarray:
    return _flat(_zeros(like.shape, like) if v is None else v, like)


def _blocks(n: int, size: int = BLOCK) -> int:
    return -(-n // size)


class _Project(Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, means: Tensor, quats: Any, scales: Any, covars: Any, opacities: Tensor,
                viewmats: Tensor, Ks: Tensor) -> Any:  # fmt: skip
        batches, n, views = means.shape[0], means.shape[1], viewmats.shape[1]
        shape = (batches, views, n)
        radii = torch.zeros(*shape, 2, dtype=torch.int32)
        outs = [_zeros(shape + tail, means) for tail in ((2,), (), (3,), ())]
        flat = [_flat(x, means) for x in (means, quats, scales, covars, opacities, viewmats, Ks)]
        sizes = (n, views, settings.width, settings.height, BLOCK, int(settings.antialiased))
        options = (
            float(settings.near),
            float(settings.far),
            float(settings.radius_clip),
            float(settings.eps2d),
        )
        if n:
            arguments = (*flat, *(x.view(-1).numpy() for x in (radii, *outs)), sizes, options)
            split(project_forward, arguments, batches * _blocks(n))
        ctx.save_for_backward(means, quats, scales, covars, viewmats, Ks, radii)
        ctx.sizes, ctx.options = sizes, options
        ctx.mark_non_differentiable(radii)
        ctx.set_materialize_grads(False)
        return radii, *outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, v_means2d: Any, v_depths: Any, v_conics: Any, v_factors: Any) -> Any:
        means, quats, scales, covars, viewmats, Ks, radii = ctx.saved_tensors
        batches, n, views = means.shape[0], means.shape[1], viewmats.shape[1]
        seen = _zeros((batches, views, n), means)
        like = (seen[..., None].expand(-1, -1, -1, 2), seen, seen[..., None].expand(-1, -1, -1, 3), seen)
        incoming = [
            _or_zeros(v, x) for v, x in zip((v_means2d, v_depths, v_conics, v_factors), like, strict=True)
        ]
        inputs = (means, quats, scales, covars)
        outs = [_zeros(0 if x is None else x.shape, means) for x in inputs]
        tasks = batches * _blocks(n)
        shares = torch.zeros((tasks, views, 3, 4) if ctx.needs_input_grad[6] else 0, dtype=torch.float64)
        if n:
            arguments = (
                *(_flat(x, means) for x in (means, quats, scales, covars, viewmats, Ks)), radii.view(-1).numpy(),
                *incoming, *(x.view(-1).numpy() for x in (*outs, shares)), ctx.sizes, ctx.options,
            )  # fmt: skip
            split(project_backward, arguments, tasks)
        v_viewmats = None
        if ctx.needs_input_grad[6]:
            v_viewmats = torch.zeros_like(viewmats)
            v_viewmats[..., :3, :] = shares.view(batches, -1, views, 3, 4).sum(1)
        v_means, v_quats, v_scales, v_covars = (
            None if given is None else v for v, given in zip(outs, inputs, strict=True)
        )
        return None, v_means, v_quats, v_scales, v_covars, None, v_viewmats, None


class _Harmonics(Function):
    @staticmethod
    def forward(
        ctx: Any, degree: int, means: Tensor, centres: Tensor, coefficients: Tensor, visible: Tensor
    ) -> Any:
        batches, n, views = means.shape[0], means.shape[1], centres.shape[1]
        colors = _zeros((batches, views, n, 3), means)
        ctx.sizes = (n, views, BLOCK, degree, coefficients.shape[-2], int(coefficients.ndim == 5))
        if n:
            arguments = (*(_flat(x, means) for x in (means, centres, coefficients)), visible.view(-1).numpy(),
                         colors.view(-1).numpy(), ctx.sizes)  # fmt: skip
            split(shade_forward, arguments, batches * _blocks(n))
        ctx.save_for_backward(means, centres, coefficients, visible, colors)
        return colors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_colors: Tensor) -> Any:
        means, centres, coefficients, visible, colors = ctx.saved_tensors
        batches, n, views = means.shape[0], means.shape[1], centres.shape[1]
        v_means, v_coefficients = _zeros(means.shape, means), _zeros(coefficients.shape, means)
        tasks = batches * _blocks(n)
        shares = torch.zeros(tasks, views, 3, dtype=torch.float64)
        if n:
            arguments = (
                *(_flat(x, means) for x in (means, centres, coefficients)), visible.view(-1).numpy(),
                *(_flat(x, means) for x in (colors, v_colors, v_means, v_coefficients)), shares.view(-1).numpy(),
                ctx.sizes,
            )  # fmt: skip
            split(shade_backward, arguments, tasks)
        v_centres = shares.view(batches, -1, views, 3).sum(1).to(centres.dtype)
        return None, v_means, v_centres, v_coefficients, None


class _Composite(Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, means2d: Tensor, conics: Tensor, opacities: Tensor, colors: Tensor,
                backgrounds: Tensor | None, radii: Tensor, depths: Tensor, starts: Tensor) -> Any:  # fmt: skip
        splats, channels, images = len(conics), colors.shape[-1], len(starts) - 1
        width, height = settings.width, settings.height
        across, down = _blocks(width, simd.TILE), _blocks(height, simd.TILE)
        tiles, stride = across * down, simd.COLOR + simd.GROUP * max(1, _blocks(channels, simd.GROUP))
        data = _zeros(splats * stride, means2d).numpy()
        boxes, counts = np.zeros(4 * splats, np.int32), np.zeros(splats, np.int32)
        flat = [_flat(x, means2d) for x in (means2d, conics, opacities)]
        radii_, firsts = radii.contiguous().view(-1).numpy(), starts.numpy()
        if splats:
            sizes = (width, height, channels, stride, splats, BLOCK)
            split(
                simd.bound,
                (*flat, radii_, _flat(colors, means2d), boxes, counts, data, sizes),
                _blocks(splats),
            )
        keys = _flat(depths, means2d)
        keys = keys.view(np.int32 if keys.itemsize == 4 else np.int64)
        order, found = np.zeros(splats, np.int32), np.zeros(images, np.int64)
        offsets = np.zeros(images * tiles + 1, np.int64)
        if images:
            sizes = (across, tiles, 8 * keys.itemsize)
            split(simd.sort, (keys, counts, firsts, boxes, order, found, offsets[1:], sizes), images)
        np.cumsum(offsets, out=offsets)
        slots = np.cumsum(counts, dtype=np.int64) - counts
        entries = np.zeros(2 * int(offsets[-1]), np.int32)
        if images:
            arguments = (order, found, firsts, boxes, slots, offsets[:-1].copy(), entries, across)
            split(simd.fill, arguments, images)
        size = (images, height, width)
        out, alphas, left = (_zeros((*size, tail), means2d) for tail in (channels, 1, 1))
        last = torch.zeros(size, dtype=torch.int32)
        if images:
            sizes = (width, height, across, tiles, channels, stride)
            arguments = (data, entries, offsets, boxes, _flat(backgrounds, means2d),
                         *(x.view(-1).numpy() for x in (out, alphas, left, last)), sizes)  # fmt: skip
            split(simd.forward, arguments, images * tiles)
        ctx.save_for_backward(means2d, conics, opacities, colors, backgrounds, left, last)
        ctx.arrays, ctx.settings = (data, entries, offsets, boxes, counts, slots), settings
        info = (
            torch.from_numpy(counts),
            torch.from_numpy(offsets[:-1]),
            torch.from_numpy(entries[::2].copy()),
        )
        ctx.mark_non_differentiable(*info)
        ctx.set_materialize_grads(False)
        return out, alphas, *info

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_out: Tensor | None, v_alpha: Tensor | None, *_: Any) -> Any:
        means2d, conics, opacities, colors, backgrounds, left, last = ctx.saved_tensors
        data, entries, offsets, boxes, counts, slots = ctx.arrays
        splats, channels, images = len(conics), colors.shape[-1], len(left)
        width, height, absolute = ctx.settings.width, ctx.settings.height, ctx.settings.absgrad
        across, tiles = _blocks(width, simd.TILE), (len(offsets) - 1) // max(images, 1)
        stride = simd.COLOR + simd.GROUP * max(1, _blocks(channels, simd.GROUP))
        length = simd.COLOR_SUMS + stride - simd.COLOR
        sums = _zeros(length * (len(entries) // 2), means2d).numpy()
        like = _zeros((*last.shape, channels), means2d) if v_out is None else v_out
        if images:
            arguments = (
                data, entries, offsets, boxes, _flat(backgrounds, means2d), left.view(-1).numpy(),
                last.view(-1).numpy(), _flat(like, means2d), _or_zeros(v_alpha, left), sums, int(absolute),
                (width, height, across, tiles, channels, stride),
            )  # fmt: skip
            split(simd.backward, arguments, images * tiles)
        outs = [_zeros(x.shape, means2d) for x in (means2d, means2d, conics, opacities, colors)]
        v_means2d, v_absolute, v_conics, v_opacities, v_colors = outs
        if splats:
            flat = [x.view(-1).numpy() for x in outs]
            flat[1] = flat[1] if absolute else flat[1][:0]
            order = (flat[0], flat[1], *flat[2:])
            arguments = (
                sums,
                slots,
                counts,
                _flat(opacities, means2d),
                *order,
                (channels, stride, splats, BLOCK),
            )
            split(simd.gather, arguments, _blocks(splats))
        if absolute:
            means2d.absgrad = v_absolute
        v_backgrounds = (like * left).sum((1, 2)) if ctx.needs_input_grad[5] else None
        return None, v_means2d, v_conics, v_opacities, v_colors, v_backgrounds, None, None, None


def project(settings: Settings, *tensors: Any) -> Projected:
    """`reference.project`."""
    return Projected(*_Project.apply(settings, *tensors))  # type: ignore[misc]


def harmonics(degree: int, means: Tensor, centres: Tensor, coefficients: Tensor, visible: Tensor) -> Tensor:
    """`reference.harmonics`."""
    return _Harmonics.apply(degree, means, centres, coefficients, visible)  # type: ignore[return-value]


def composite(
    settings: Settings, splats: Splats, backgrounds: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`reference.composite`, and the lists of the tiles: gsplat's `tiles_per_gauss`, `isect_offsets`, `flatten_ids`."""
    out, alphas, counts, offsets, ids = _Composite.apply(
        settings, splats.means2d, splats.conics, splats.opacities, splats.colors, backgrounds, splats.radii, splats.depths,
        splats.starts,
    )  # type: ignore[misc]  # fmt: skip
    down, across = (_blocks(size, simd.TILE) for size in (settings.height, settings.width))
    return (
        out,
        alphas,
        {
            "tiles_per_gauss": counts.view(splats.means2d.shape[:-1]),
            "isect_offsets": offsets.view(-1, down, across),
            "flatten_ids": ids,
        },
    )
