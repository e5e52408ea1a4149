"""Gaussian splatting with gsplat's interface on every device: checked once, then handed to what suits the device.

    colors, alphas, meta = rasterization(means, quats, scales, opacities, colors, viewmats, Ks, width, height)

On CUDA this is gsplat itself, on a CPU compiled loops with the same rules, and `reference` is the definition in plain
torch, for tests. Strategies that densify on top of gsplat, such as its `DefaultStrategy`, run on any of them.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from dataengine.rasterize.checks import check
from dataengine.rasterize.steps import Settings, render
from sparse_core.kernels.dispatch import installed

Implementation = Literal["auto", "reference", "numba", "gsplat"]
IMPLEMENTATIONS = ("reference", "numba", "gsplat")

log = logging.getLogger(__name__)


def rasterization(
    means: Tensor,
    quats: Tensor | None,
    scales: Tensor | None,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = True,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    render_mode: Literal["RGB", "D", "ED", "RGB+D", "RGB+ED"] = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    channel_chunk: int = 32,
    distributed: bool = False,
    camera_model: Literal["pinhole", "ortho", "fisheye", "ftheta"] = "pinhole",
    segmented: bool = False,
    covars: Tensor | None = None,
    with_ut: bool = False,
    with_eval3d: bool = False,
    radial_coeffs: Tensor | None = None,
    tangential_coeffs: Tensor | None = None,
    thin_prism_coeffs: Tensor | None = None,
    ftheta_coeffs: Any = None,
    rolling_shutter: Any = None,
    viewmats_rs: Tensor | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Render N Gaussians into C images, differentiable; arguments, results and rules are gsplat 1.5.3's.

    Args:
        means: centres [.., N, 3], metres in the world. The leading dimensions are a batch, such as time.
        quats: rotations [.., N, 4], wxyz, of any length but 0. None with `covars`.
        scales: standard deviations [.., N, 3], metres, along the rotated axes. None with `covars`.
        opacities: [.., N], 0 to 1.
        colors: [.., N, D] or per view [.., C, N, D], any number D of channels; with `sh_degree` the coefficients of
            spherical harmonics [.., (C,) N, K, 3], whose colour is max(0, sum + 0.5).
        viewmats: world to camera [.., C, 4, 4], OpenCV axes (`Cameras.world_to_camera`).
        Ks: intrinsics [.., C, 3, 3], pixels, pixel centres at +0.5; no gradient.
        width, height: of the images, pixels.
        near_plane, far_plane: depths in metres between which a Gaussian is seen.
        radius_clip: a Gaussian whose radii are at most so many pixels is left out.
        eps2d: variance in square pixels that is added to every projected Gaussian.
        sh_degree: 0 to 3; at most what K coefficients hold.
        packed: meta holds the n visible pairs of camera and Gaussian, [n, ..], not [.., C, N, ..]; the images are equal.
        backgrounds: [.., C, D] behind everything; depth has none.
        render_mode: colours, accumulated depth (D) or expected depth (ED), or colours with a depth as last channel.
        absgrad: leave the sum over pixels of |gradient| in `meta["means2d"].absgrad` after backward.
        rasterize_mode: `antialiased` makes a Gaussian less opaque by as much as `eps2d` made it larger.
        covars: covariances [.., N, 3, 3], symmetric, in place of quats and scales.
        channel_chunk, segmented: change nothing but the speed of gsplat.
        implementation: `gsplat` (CUDA, float32), `numba` (CPU, float32 and float64), `reference` (plain torch, every
            Gaussian at every pixel, any device), or `auto`. The others of gsplat's options are refused without CUDA.

    Returns:
        colors [.., C, height, width, X] with X channels by mode; alphas [.., C, height, width, 1]; meta: `means2d` (call
        `retain_grad` before backward), `radii` (int32, 0 where not visible), `depths`, `conics`, `opacities`, shapes
        [.., C, N, ..] or packed; `batch_ids`, `camera_ids`, `gaussian_ids` (None unless packed); `width`, `height`,
        `tile_size`, `tile_width`, `tile_height`, `n_batches`, `n_cameras`; and of numba and gsplat `tiles_per_gauss`,
        `isect_offsets`, `flatten_ids`.

    Raises:
        ValueError: what does not fit, or, without CUDA, NaN and infinity (on CUDA, asking would wait for the GPU, so
            gsplat draws what it makes of them).
        ImportError: the implementation is not installed.

    Source: Kerbl et al., 3D Gaussian Splatting (arXiv 2308.04079); Zwicker et al., EWA splatting (2001); Yu et al.,
    Mip-Splatting (arXiv 2311.16493); Ye et al., AbsGS (arXiv 2404.10484); gsplat (arXiv 2409.06765).
    """
    options = dict(locals())
    chosen = choose(options.pop("implementation"), means)
    check(**options, cuda=chosen == "gsplat")
    if chosen == "gsplat":
        return _load("gsplat").rasterization(**options)
    settings = Settings(
        width=width, height=height, near=near_plane, far=far_plane, radius_clip=radius_clip, eps2d=eps2d,
        antialiased=rasterize_mode == "antialiased", absgrad=absgrad, mode=render_mode, packed=packed,
        tile_size=tile_size,
    )  # fmt: skip
    shape = None if covars is not None else (quats, scales)
    return render(
        _load(chosen), settings, means, shape, covars, opacities, colors, viewmats, Ks, sh_degree, backgrounds
    )


def choose(name: str, means: Tensor) -> str:
    """What renders such Gaussians: for `auto`, gsplat on CUDA, numba on a CPU, else the reference.

    Raises ValueError for one that there is not or that does not fit, ImportError where it is not installed.
    """
    kernel, dtypes = (
        ("gsplat", (torch.float32,)) if means.is_cuda else ("numba", (torch.float32, torch.float64))
    )
    if name == "auto":
        name = kernel if means.dtype in dtypes and (means.is_cuda or installed(kernel)) else "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected auto or one of {', '.join(IMPLEMENTATIONS)}, got {name!r}"
        )
    if name not in ("reference", kernel):
        where = {"gsplat": "a CUDA device", "numba": "a CPU"}[name]
        raise ValueError(
            f"implementation: expected tensors on {where} for {name}, got {means.device}; move them or use auto"
        )
    if name != "reference" and not installed(name):
        raise ImportError(f"implementation: expected {name} for tensors on {means.device}, which is not installed; "
                          f"run pip install {name}, or use implementation='reference'")  # fmt: skip
    return name


@cache
def _load(name: str) -> Any:
    log.info("rasterization runs as %s", name)
    return import_module(f"{__name__}.{name}")
