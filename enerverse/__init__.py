"""EnerVerse: embodied world models that imagine, and policies that act on what they imagine.

The names below load on first use, so that `import enerverse` stays cheap. They also let diffusers find the
components of a saved pipeline.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "ActionHead": "enerverse.policy",
    "EnerVersePipeline": "enerverse.pipelines",
    "EnerVersePolicy": "enerverse.pipelines",
    "HashedTextEncoder": "enerverse.model",
    "KLAutoencoder": "enerverse.latents",
    "PatchAutoencoder": "enerverse.latents",
    "PretrainedTextEncoder": "enerverse.model",
    "VideoUNet": "enerverse.model",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'enerverse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
