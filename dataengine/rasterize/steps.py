"""The way from Gaussians to images that all implementations without CUDA share: project, colour, composite.

An implementation is a module with the three steps:

    project(settings, means, quats, scales, covars, opacities, viewmats, Ks) -> Projected
    harmonics(degree, means, centres, coefficients, visible) -> colours [B, C, N, 3]
    composite(settings, splats, backgrounds) -> colours [I, height, width, D], alphas [I, height, width, 1], extra meta
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `rasterization` that are no tensors."""

    width: int
    height: int
    near: float
    far: float
    radius_clip: float
    eps2d: float
    antialiased: bool
    absgrad: bool
    mode: str
    packed: bool
    tile_size: int


class Projected(NamedTuple):
    """Gaussians as the cameras see them, [B, C, N, ..]; where the radii are 0 one is not visible and all else is 0.

    radii [.., 2] int32, pixels; means2d [.., 2] pixels; depths [..] metres; conics [.., 3]: xx, xy, yy of the inverse
    covariance; compensations [..]: factor of the opacity in antialiased mode, else 1.
    """

    radii: Tensor
    means2d: Tensor
    depths: Tensor
    conics: Tensor
    compensations: Tensor


class Splats(NamedTuple):
    """Projected Gaussians one image after the other, M in all; those of image i are starts[i] .. starts[i + 1].

    means2d has any shape [.., 2] of M rows: it is the tensor whose gradient, and `absgrad`, the caller will ask for.
    radii [M, 2], depths [M] (order only, no gradient), conics [M, 3], opacities [M], colors [M, D].
    """

    means2d: Tensor
    radii: Tensor
    depths: Tensor
    conics: Tensor
    opacities: Tensor
    colors: Tensor
    starts: Tensor


def render(
    steps: Any, settings: Settings, means: Tensor, shape: tuple[Any, Any] | None, covars: Tensor | None,
    opacities: Tensor, colors: Tensor, viewmats: Tensor, Ks: Tensor, sh_degree: int | None,
    backgrounds: Tensor | None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    """Colours, alphas and meta of `rasterization`, whose arguments have been checked."""
    batch, n, views = tuple(means.shape[:-2]), means.shape[-2], viewmats.shape[-3]
    lead = len(batch)

    def one_batch(x: Tensor | None) -> Any:
        return None if x is None else x.reshape(batch_size, *x.shape[lead:])

    batch_size = 1
    for size in batch:
        batch_size *= size
    means, opacities, viewmats, Ks, covars, colors, backgrounds = map(
        one_batch, (means, opacities, viewmats, Ks, covars, colors, backgrounds)
    )
    quats, scales = map(one_batch, shape or (None, None))
    seen = steps.project(settings, means, quats, scales, covars, opacities, viewmats, Ks)
    visible = (seen.radii > 0).all(-1)
    opaque = opacities[:, None].expand(-1, views, -1)
    if settings.antialiased:
        opaque = opaque * seen.compensations
    if settings.mode in ("D", "ED"):
        colors, backgrounds = means.new_zeros(batch_size, views, n, 0), None
    elif sh_degree is not None:
        # the inverse of a rigid matrix, but with a gradient for any
        centres = torch.linalg.inv(viewmats)[..., :3, 3]
        colors = steps.harmonics(sh_degree, means, centres, colors, visible)
    elif colors.ndim == 3:
        colors = colors[:, None].expand(-1, views, -1, -1)
    if settings.mode != "RGB":
        colors = torch.cat([colors, seen.depths[..., None]], -1)
        if backgrounds is not None:
            backgrounds = torch.cat([backgrounds, backgrounds.new_zeros(batch_size, views, 1)], -1)
    images = batch_size * views
    fields = (seen.means2d, seen.radii, seen.depths, seen.conics, opaque, colors)
    ids = (None, None, None)
    if settings.packed:
        kept = visible.flatten().nonzero()[:, 0]
        fields = [x.reshape(images * n, *x.shape[3:]).index_select(0, kept) for x in fields]
        image = kept // max(n, 1)
        ids = (image // views, image % views, kept % max(n, 1))
        starts = torch.searchsorted(image, torch.arange(images + 1, device=image.device))
    else:
        fields = [x.reshape(*batch, views, *x.shape[2:]) for x in fields]
        starts = torch.arange(images + 1, device=means.device) * n
    means2d, radii, depths, conics, opaque, colors = fields
    splats = Splats(
        means2d, radii.reshape(-1, 2), depths.detach().reshape(-1), conics.reshape(-1, 3), opaque.reshape(-1),
        colors.reshape(-1, colors.shape[-1]) if colors.numel() else colors.new_zeros(0, colors.shape[-1]), starts,
    )  # fmt: skip
    behind = None if backgrounds is None else backgrounds.reshape(images, -1)
    drawn, alphas, extra = steps.composite(settings, splats, behind)
    if settings.mode.endswith("ED"):
        drawn = torch.cat([drawn[..., :-1], drawn[..., -1:] / alphas.clamp(min=1e-10)], -1)
    drawn, alphas = (x.reshape(*batch, views, *x.shape[1:]) for x in (drawn, alphas))
    across, down = (-(-size // settings.tile_size) for size in (settings.width, settings.height))
    meta = {
        "batch_ids": ids[0], "camera_ids": ids[1], "gaussian_ids": ids[2], "radii": radii, "means2d": means2d,
        "depths": depths, "conics": conics, "opacities": opaque, "width": settings.width, "height": settings.height,
        "tile_size": settings.tile_size, "tile_width": across, "tile_height": down, "n_batches": batch_size,
        "n_cameras": views,
    }  # fmt: skip
    if "isect_offsets" in extra:
        extra["isect_offsets"] = extra["isect_offsets"].reshape(*batch, views, down, across)
    return drawn, alphas, meta | extra
