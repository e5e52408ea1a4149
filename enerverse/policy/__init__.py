"""The policy: world-model features and latents in, a chunk of actions out."""

from enerverse.policy.condition import PolicyInputs
from enerverse.policy.config import PolicyConfig
from enerverse.policy.features import read_features
from enerverse.policy.head import ActionHead

__all__ = ["ActionHead", "PolicyConfig", "PolicyInputs", "read_features"]
