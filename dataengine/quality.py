"""Image quality: PSNR, SSIM and masks of what moves.

Images are float tensors `[..., 3, H, W]` with values in [0, 1]; leading axes (B, V, T) stay in the result.
Masks are bool tensors `[..., H, W]` whose leading axes broadcast against those of the images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 11
SMALL = 512  # pixels a side: up to here matrices beat convolutions of one channel, on a CPU about ninefold
SIGMA = 1.5
ALIKE = 100.0  # dB; pictures that differ less, or not at all, are said to differ so much


def psnr(images: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, `[...]`, for a peak of 1.

    `-10 log10(mean squared error)` over channels and pixels, or over the pixels of `mask` only. Equal images
    give inf, an empty mask nan. Raises ValueError for other shapes or integer images.
    """
    _check_images(images, reference)
    error = (images.double() - reference.double()).square().mean(dim=-3)
    return -10.0 * torch.log10(_mean_over(error, mask))


def decibels(error: Tensor) -> float:
    """The PSNR of a mean squared error, or the mean of several; each at most `ALIKE`, so that it is a number."""
    return float((-10.0 * error.double().log10()).clamp(max=ALIKE).mean())


def ssim(images: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the structural similarity, `[...]`, 1 for equal images.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", eq. 13, with
    the paper's 11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, for a data range of 1; averaged over
    channels and over the window centres whose window lies inside the image, or over those in `mask` only
    (nan where there are none). Raises ValueError for other shapes, integer images, or sides under 11.
    """
    similarity = ssim_map(images.double(), reference.double())
    margin = WINDOW // 2
    inside = None if mask is None else mask[..., margin:-margin, margin:-margin]
    return _mean_over(similarity, inside)


def ssim_map(images: Tensor, reference: Tensor) -> Tensor:
    """Return the structural similarity of every window inside the images, `[..., H - 10, W - 10]`; see `ssim`."""
    _check_images(images, reference)
    if min(images.shape[-2:]) < WINDOW:
        size = "x".join(map(str, images.shape[-2:]))
        raise ValueError(
            f"images: expected sides of at least {WINDOW} pixels for SSIM, got {size}; enlarge them"
        )
    return _similarity(images, reference).mean(dim=-3)


def moving_mask(frames: Tensor, reference: Tensor, threshold: float = 20 / 255) -> Tensor:
    """Return which pixels of `frames` `[..., 3, H, W]` differ from `reference`, bool `[..., H, W]`.

    A pixel differs when any channel is further than `threshold` away. `reference` broadcasts: the last memory
    frame, or the median over an episode's frames for the static scene. Raises ValueError for other shapes.
    """
    _check_images(frames, reference, same=False)
    return (frames - reference).abs().amax(dim=-3) > threshold


def mask_iou(mask: Tensor, reference: Tensor) -> Tensor:
    """Return intersection over union of two bool masks `[..., H, W]` as `[...]`; 1 where both are empty."""
    if mask.shape != reference.shape or mask.dtype != torch.bool or reference.dtype != torch.bool:
        got = f"{_describe(mask)} and {_describe(reference)}"
        raise ValueError(f"mask, reference: expected two bool masks of one shape [..., H, W], got {got}")
    intersection = (mask & reference).sum(dim=(-2, -1)).double()
    union = (mask | reference).sum(dim=(-2, -1)).double()
    return torch.where(union == 0, 1.0, intersection / union.clamp(min=1))


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x.square()
    variance_y = _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance * structure


def _blur(images: Tensor) -> Tensor:
    """Weighted mean under the window, `[..., H, W]` -> `[..., H - 10, W - 10]`; rows and columns separate."""
    offsets = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / SIGMA).square())
    weights = weights / weights.sum()
    height, width = images.shape[-2:]
    if max(height, width) <= SMALL:
        return _band(weights, height) @ images @ _band(weights, width).T
    planes = images.reshape(-1, 1, height, width)
    blurred = F.conv2d(F.conv2d(planes, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return blurred.reshape(*images.shape[:-2], *blurred.shape[-2:])


def _band(weights: Tensor, size: int) -> Tensor:
    """The matrix `[size - 10, size]` that takes the weighted mean under every window of a row of pixels."""
    rows = F.pad(weights.expand(size - WINDOW + 1, -1), (0, size - WINDOW + 1))
    return rows.reshape(-1)[: (size - WINDOW + 1) * size].view(-1, size)


def _mean_over(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` `[..., H, W]` over the pixels of `mask`, nan where it has none."""
    if mask is None:
        return values.mean(dim=(-2, -1))
    if mask.dtype != torch.bool or mask.shape[-2:] != values.shape[-2:]:
        size = "x".join(map(str, values.shape[-2:]))
        raise ValueError(f"mask: expected a bool mask [..., H, W] of {size} pixels, got {_describe(mask)}")
    # where, not a product: a broken pixel outside the mask must not reach the sum
    total = torch.where(mask, values, 0.0).sum(dim=(-2, -1))
    return total / mask.expand_as(values).sum(dim=(-2, -1))


def _check_images(images: Tensor, reference: Tensor, same: bool = True) -> None:
    for name, tensor in (("images", images), ("reference", reference)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floats in [0, 1], got {tensor.dtype}; divide bytes by 255")
        if tensor.dim() < 3 or tensor.shape[-3] != 3:
            raise ValueError(
                f"{name}: expected shape [..., 3, H, W], got {list(tensor.shape)}; move the channels"
            )
    if images.shape[-2:] != reference.shape[-2:] or (same and images.shape != reference.shape):
        raise ValueError(f"reference: expected shape {list(images.shape)}, got {list(reference.shape)}")


def _describe(mask: Tensor) -> str:
    return f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
