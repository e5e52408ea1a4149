"""What our networks are built on: diffusers' saving and loading, and layers that start as zero."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Self, TypeVar

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from enerverse.files import AnyPath
from enerverse.folders import staged_folder

Layer = TypeVar("Layer", bound=nn.Module)


class Component(ModelMixin, ConfigMixin):
    """A network with `save_pretrained` and `from_pretrained`; its constructor's arguments are in `config`."""

    if TYPE_CHECKING:  # diffusers types these as a plain dict and as a function without self
        config: Any

        def to(self, *args: Any, **kwargs: Any) -> Self: ...

    def save_pretrained(self, save_directory: AnyPath, **options: Any) -> None:
        """Write weights (safetensors) and `config.json` into a folder, whole or not at all."""
        with staged_folder(save_directory) as stage:
            super().save_pretrained(str(stage), **options)

    def __init_subclass__(cls, **options: Any) -> None:
        """Put diffusers' base class beside `cls`: a saved pipeline looks for it in the module of its part."""
        super().__init_subclass__(**options)
        vars(sys.modules[cls.__module__]).setdefault("ModelMixin", ModelMixin)


def start_at_zero(layer: Layer) -> Layer:
    """The same layer with weights and biases at zero, so that what it belongs to starts without it."""
    for value in layer.parameters():
        nn.init.zeros_(value)
    return layer
