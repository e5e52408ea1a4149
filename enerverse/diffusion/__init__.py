"""Diffusion objectives and the denoising loop."""

from enerverse.diffusion.objectives import OBJECTIVES, FlowX0, Objective, VPrediction, make_objective
from enerverse.diffusion.sampling import denoise, scheduler_times

__all__ = ["OBJECTIVES", "FlowX0", "Objective", "VPrediction", "denoise", "make_objective", "scheduler_times"]
