"""The video UNet and the instruction encoders."""

from enerverse.model.locator import FactReader, Locator
from enerverse.model.text import HashedTextEncoder, PretrainedTextEncoder
from enerverse.model.unet import Conditions, VideoUNet

__all__ = ["Conditions", "FactReader", "HashedTextEncoder", "Locator", "PretrainedTextEncoder", "VideoUNet"]
