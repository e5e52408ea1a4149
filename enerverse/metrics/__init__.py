"""Metrics: image quality, intervals for small samples, distances between feature sets."""

from dataengine.quality import mask_iou, moving_mask, psnr, ssim, ssim_map
from enerverse.metrics.frechet import frechet_distance
from enerverse.metrics.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_paired_difference,
    mcnemar_exact,
    student_mean,
    wilson,
)

__all__ = [
    "Interval",
    "bootstrap_mean",
    "bootstrap_paired_difference",
    "frechet_distance",
    "mask_iou",
    "mcnemar_exact",
    "moving_mask",
    "psnr",
    "ssim",
    "ssim_map",
    "student_mean",
    "wilson",
]
