"""What `rasterization` accepts: shapes that fit each other, one dtype, finite numbers, options there is code for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MODES = ("RGB", "D", "ED", "RGB+D", "RGB+ED")
RASTERIZE_MODES = ("classic", "antialiased")
DEGREE = 3
# gsplat's options that only CUDA has: what is expected without it, and what else to do.
ONLY_CUDA: dict[str, tuple[Any, str]] = {
    "tile_size": (16, "leave it, the image does not depend on it"),
    "sparse_grad": (False, "use dense gradients"),
    "distributed": (False, "render every view in one process"),
    "camera_model": ("pinhole", "undistort the images first"),
    "with_ut": (False, "leave it"),
    "with_eval3d": (False, "leave it"),
    "radial_coeffs": (None, "undistort the images first"),
    "tangential_coeffs": (None, "undistort the images first"),
    "thin_prism_coeffs": (None, "undistort the images first"),
    "ftheta_coeffs": (None, "undistort the images first"),
    "viewmats_rs": (None, "give every time its own viewmats"),
}


def check(*, cuda: bool, **options: Any) -> None:
    """ValueError, in one sentence, where the arguments of `rasterization` do not fit; `cuda`: gsplat will render."""
    tensors = _shapes(**options)
    _dtypes(tensors)
    _numbers(**options)
    _one_of("render_mode", options["render_mode"], MODES)
    _one_of("rasterize_mode", options["rasterize_mode"], RASTERIZE_MODES)
    if cuda:
        return
    for name, (expected, instead) in ONLY_CUDA.items():
        got = options[name]
        if got is not expected and (isinstance(got, Tensor) or got != expected):
            shown = f"a tensor {list(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise ValueError(
                f"{name}: expected {expected!r} without CUDA, got {shown}; {instead} or move to CUDA"
            )
    shutter = options["rolling_shutter"]
    if getattr(shutter, "name", shutter) not in (None, "GLOBAL"):
        raise ValueError(
            f"rolling_shutter: expected None without CUDA, got {shutter}; give every time its own viewmats"
        )
    if next(iter(tensors.values())).dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"means: expected float32 or float64, got {options['means'].dtype}; call .float() on all"
        )
    for name, tensor in tensors.items():
        if not tensor.detach().isfinite().all():
            count = int((~tensor.detach().isfinite()).sum())
            raise ValueError(
                f"{name}: expected finite numbers, got {count} NaN or infinite; lower the learning rate or drop those"
            )


def _shapes(
    *, means: Tensor, quats: Any, scales: Any, opacities: Tensor, colors: Tensor, viewmats: Tensor, Ks: Tensor,
    sh_degree: int | None, backgrounds: Tensor | None, covars: Tensor | None, render_mode: str, **rest: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors by name, once their shapes fit."""
    if means.ndim < 2 or means.shape[-1] != 3:
        raise ValueError(f"means: expected [.., N, 3], got {list(means.shape)}; one row per Gaussian")
    batch, n = tuple(means.shape[:-2]), means.shape[-2]
    if (
        viewmats.ndim != len(batch) + 3
        or tuple(viewmats.shape[:-3]) != batch
        or viewmats.shape[-2:] != (4, 4)
    ):
        raise ValueError(f"viewmats: expected {_list((*batch, 'C', 4, 4))}, got {list(viewmats.shape)}; "
                         "one world-to-camera matrix per view, batched like means")  # fmt: skip
    views = viewmats.shape[-3]
    expected: dict[str, tuple[Any, Sequence[Any]]] = {
        "opacities": (opacities, (*batch, n)),
        "Ks": (Ks, (*batch, views, 3, 3)),
    }
    if covars is None:
        expected |= {"quats": (quats, (*batch, n, 4)), "scales": (scales, (*batch, n, 3))}
    else:
        expected["covars"] = (covars, (*batch, n, 3, 3))
    for name, (tensor, shape) in expected.items():
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != tuple(shape):
            got = list(tensor.shape) if isinstance(tensor, Tensor) else tensor
            raise ValueError(f"{name}: expected {_list(shape)} beside means {list(means.shape)}, got {got}; "
                             "give every Gaussian, or every view, one")  # fmt: skip
    channels = _check_colors(colors, batch, views, n, sh_degree)
    found = {
        "means": means,
        **{name: pair[0] for name, pair in expected.items()},
        "colors": colors,
        "viewmats": viewmats,
    }
    if backgrounds is not None:
        shape = (*batch, views, channels)
        if render_mode not in ("D", "ED") and tuple(backgrounds.shape) != shape:
            raise ValueError(f"backgrounds: expected {_list(shape)}, got {list(backgrounds.shape)}; "
                             "one colour per view, without the depth")  # fmt: skip
        found["backgrounds"] = backgrounds
    return found


def _check_colors(colors: Tensor, batch: tuple[int, ...], views: int, n: int, degree: int | None) -> int:
    """Channels that these colours or coefficients give."""
    tail, inner = (("D",), 1) if degree is None else (("K", 3), 2)
    leads = ((*batch, n), (*batch, views, n))
    fits = any(
        tuple(colors.shape[: len(lead)]) == lead and colors.ndim == len(lead) + inner for lead in leads
    )
    if not fits or (degree is not None and colors.shape[-1] != 3):
        what = "colors" if degree is None else "coefficients with sh_degree"
        raise ValueError(f"colors: expected {_list((*batch, n, *tail))} or {_list((*batch, views, n, *tail))}, "
                         f"got {list(colors.shape)}; give {what} per Gaussian, or per view and Gaussian")  # fmt: skip
    if degree is None:
        return colors.shape[-1]
    most = min(DEGREE, int(colors.shape[-2] ** 0.5) - 1)
    if not 0 <= degree <= most:
        raise ValueError(f"sh_degree: expected 0 to {most} with {colors.shape[-2]} coefficients, got {degree}; "
                         "a degree takes (degree + 1) ** 2 coefficients, and 3 is the highest")  # fmt: skip
    return 3


def _dtypes(tensors: dict[str, Tensor]) -> None:
    means = tensors["means"]
    for name, tensor in tensors.items():
        if tensor.dtype != means.dtype or not tensor.is_floating_point():
            raise ValueError(
                f"{name}: expected {means.dtype} like means, got {tensor.dtype}; use one floating dtype"
            )
        if tensor.device != means.device:
            raise ValueError(
                f"{name}: expected a tensor on {means.device} like means, got {tensor.device}; move it"
            )


def _numbers(
    *, width: int, height: int, near_plane: float, far_plane: float, eps2d: float, **rest: Any
) -> None:
    for name, value in (("width", width), ("height", height)):
        if value != int(value) or value < 1:
            raise ValueError(f"{name}: expected a whole number of pixels, at least 1, got {value}; round it")
    if not 0 < near_plane < far_plane:
        raise ValueError(
            f"near_plane: expected 0 < near_plane < far_plane, got {near_plane} and {far_plane}; use metres"
        )
    if not eps2d >= 0:
        raise ValueError(
            f"eps2d: expected a variance in square pixels, at least 0, got {eps2d}; gsplat's is 0.3"
        )


def _one_of(name: str, got: object, known: Sequence[str]) -> None:
    if got not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {got!r}; choose one of these")


def _list(shape: Sequence[Any]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"
