"""Pipelines: imagine with the world model, act with the policy."""

from enerverse.pipelines.policy import EnerVersePolicy
from enerverse.pipelines.world import EnerVersePipeline, Imagination

__all__ = ["EnerVersePipeline", "EnerVersePolicy", "Imagination"]
