"""Diffusion objectives and the denoising loop."""

from enerverse.diffusion.objectives import OBJECTIVES, FlowX0, Objective, VPrediction, make_objective
from enerverse.diffusion.sampling import Generators, denoise, draw_noise, scheduler_times

__all__ = [
    "OBJECTIVES",
    "FlowX0",
    "Generators",
    "Objective",
    "VPrediction",
    "denoise",
    "draw_noise",
    "make_objective",
    "scheduler_times",
]
