"""One episode from cameras that were not fitted to: the data engine at work, beside what is really there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataengine.export import write_page
from dataengine.fit import Fit
from dataengine.flywheel import Flywheel, first_fit, flywheel, look
from dataengine.generators import load_restorer
from dataengine.quality import psnr
from dataengine.reconstruct import Reconstruction
from dataengine.views import Views

STEPS, REFIT, FRAMES = 100, 60, 16


@dataclass(frozen=True, kw_only=True)
class Viewed:
    """What unseen cameras show: films by version, uint8 [T, V, P, P, 3], the truth first; PSNR in dB of the others; the
    pictures that were fitted to; names of the views; seconds; the page that plays the scene."""

    seen: np.ndarray
    films: dict[str, np.ndarray]
    psnr: dict[str, float]
    seen_views: tuple[str, ...]
    views: tuple[str, ...]
    fps: float
    page: Path


def view(seen: Views, anchors: Views, unseen: Views, page: Path) -> Viewed:
    """Fit a scene to `seen`, turn the flywheel twice with the shipped restorer looking from the cameras of `anchors`, and
    look from those of `unseen`, whose pictures serve for comparison alone. The scene goes into the HTML file `page`."""
    every = max(1, len(seen) // FRAMES)
    seen, anchors, unseen = (views.at(slice(0, None, every)) for views in (seen, anchors, unseen))
    settings = Flywheel(
        start=Reconstruction(complete=False, fit=Fit(steps=STEPS, quiet=True)),
        refit=Fit(steps=REFIT, quiet=True),
    )
    scene = first_fit(seen, settings)
    shown = {"truth": unseen.images, "first fit": look(scene, unseen.cameras, len(seen)).images}
    scene = flywheel(seen, load_restorer(), anchors.cameras, settings, scene=scene).scene
    shown["after two turns"] = look(scene, unseen.cameras, len(seen)).images
    with torch.no_grad():
        frames = [scene.at(t).detach() for t in range(scene.frames)]
    write_page(page, frames, cameras=seen.cameras, fps=seen.fps / every, title="4D scene")
    return Viewed(
        seen=_pixels(seen.images), films={name: _pixels(images) for name, images in shown.items()},
        psnr={name: _decibels(images, unseen.images) for name, images in shown.items() if name != "truth"},
        seen_views=seen.names, views=unseen.names, fps=seen.fps / every, page=page,
    )  # fmt: skip


def _decibels(images: Tensor, truth: Tensor) -> float:
    return float(psnr(images.movedim(-1, 2), truth.movedim(-1, 2)).mean())


def _pixels(images: Tensor) -> np.ndarray:
    return images.clamp(0, 1).mul(255).round().byte().numpy()
