"""The video UNet and the instruction encoders."""

from enerverse.model.locator import Locator
from enerverse.model.text import HashedTextEncoder, PretrainedTextEncoder
from enerverse.model.unet import Conditions, VideoUNet

__all__ = ["Conditions", "HashedTextEncoder", "Locator", "PretrainedTextEncoder", "VideoUNet"]
