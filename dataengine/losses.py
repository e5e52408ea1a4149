"""What a fit of a scene minimises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataengine.quality import WINDOW, ssim_map
from dataengine.scene import Rendering


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Of the terms of the loss; photometric terms as in 3D Gaussian Splatting, eq. 7.

    Attributes:
        ssim: share of 1 - SSIM against L1 in the photometric term.
        depth: of the L1 of depth, in units of 10 cm, where depth is known.
        cover: of the L1 between alpha and 1 where depth is known, for surfaces have no holes.
        motion: of the motion's own penalty.
    """

    ssim: float = 0.2
    depth: float = 0.1
    cover: float = 0.1
    motion: float = 1.0

    def __post_init__(self) -> None:
        for name in ("ssim", "depth", "cover", "motion"):
            value = getattr(self, name)
            if not 0 <= value < float("inf") or (name == "ssim" and value > 1):
                raise ValueError(
                    f"{name}: expected a weight from 0{' to 1' if name == 'ssim' else ''}, got {value}"
                )


def frame_loss(
    rendering: Rendering, images: Tensor, depth: Tensor | None, confidence: Tensor | None, weights: Weights
) -> Tensor:
    """Loss of a frame: images ``[V, H, W, 3]``, depth ``[V, H, W]`` metres (0 unknown), confidence ``[V, H, W]``.

    Every term is a mean over pixels, weighted by confidence, so a view that counts half pulls half as strongly.
    """
    counted = images.new_ones(images.shape[:-1]) if confidence is None else confidence
    loss = (1 - weights.ssim) * _mean((rendering.images - images).abs().mean(-1), counted)
    if weights.ssim and min(images.shape[1:3]) >= WINDOW:
        similar = ssim_map(rendering.images.movedim(-1, 1), images.movedim(-1, 1))
        edge = WINDOW // 2
        loss = loss + weights.ssim * _mean(1 - similar, counted[:, edge:-edge, edge:-edge])
    if depth is not None and (weights.depth or weights.cover):
        known = (depth > 0) * counted
        # A far wall must not outweigh the table: errors count relative to the distance beyond a metre.
        error = (rendering.depth - depth).abs() / (0.1 * depth.clamp_min(1.0))
        loss = loss + weights.depth * _mean(error.clamp_max(10.0), known)
        loss = loss + weights.cover * _mean((1 - rendering.alpha).abs(), known)
    return loss


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean over all pixels of `values` times `weight`."""
    return (torch.where(weight > 0, values, 0.0) * weight).mean()
