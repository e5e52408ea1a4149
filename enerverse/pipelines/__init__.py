"""Pipelines: imagine with the world model, act with the policy."""

from enerverse.pipelines.world import EnerVersePipeline, Imagination

__all__ = ["EnerVersePipeline", "Imagination"]
