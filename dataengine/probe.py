"""How many turns of the flywheel a generator is worth on given views, where no camera can be spared: blocks of pixels are
hidden from the fit, and what the scene shows there is measured after every turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dataengine.cameras import Cameras
from dataengine.flywheel import Flywheel, flywheel, look
from dataengine.generators import Generator
from dataengine.quality import decibels
from dataengine.views import Views

BLOCKS = 8  # of a picture's side
HIDDEN = 6  # of the 64 blocks, the same ones at every frame


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe:
    """What a trial on hidden pixels says.

    Attributes:
        rounds: after how many the hidden pixels were shown best.
        last_word: whether the generator's repair of the renders shows them no worse than the renders do.
        hidden_psnr: dB on hidden pixels by round, 0 the first fit, until the wheel stopped.
        repaired_psnr: the same of the renders that the generator repairs last.
    """

    rounds: int
    last_word: bool
    hidden_psnr: list[float]
    repaired_psnr: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self).copy()


def probe(views: Views, cameras: Cameras, generator: Generator, settings: Flywheel) -> Probe:
    """Turn the wheel on `views` with blocks hidden, and see what comes of it there."""
    mask = hidden_blocks(views, settings.start.fit.seed)
    if views.confidence is not None:
        mask &= views.confidence > 0
    given, asked = hide(views, mask), replace(views, depth=None, body_ids=None, confidence=mask.float())
    turned = flywheel(given, generator, cameras, settings, held_out=asked)
    psnr = [record["psnr"] for record in turned.log]
    kept = [number for number, record in enumerate(turned.log) if record["kept"]]
    best = max(kept, key=lambda number: psnr[number])
    if best < kept[-1]:
        turned = flywheel(given, generator, cameras, replace(settings, rounds=best), held_out=asked)
    with torch.no_grad():
        renders = look(turned.scene, views.cameras, len(views))
        repaired = generator.repair(renders, given, None)
    shown, mended = (masked_psnr(x.images, views.images, mask) for x in (renders, repaired))
    return Probe(
        rounds=best,
        last_word=mended >= shown,
        hidden_psnr=psnr,
        repaired_psnr=mended,
    )


def hidden_blocks(views: Views, seed: int = 0) -> Tensor:
    """Bool ``[T, V, H, W]``: `HIDDEN` blocks of every view, drawn by `seed`."""
    generator, shape = torch.Generator().manual_seed(seed), views.images.shape[:-1]
    _, count, height, width = shape
    row, column = torch.arange(height) * BLOCKS // height, torch.arange(width) * BLOCKS // width
    block = row[:, None] * BLOCKS + column
    masks = [torch.isin(block, torch.randperm(BLOCKS**2, generator=generator)[:HIDDEN]) for _ in range(count)]
    return torch.stack(masks).expand(shape).clone()


def hide(views: Views, mask: Tensor) -> Views:
    """`views` without what they show at the pixels of `mask`: the mean colour, no depth, no body, no confidence."""
    given = torch.ones_like(views.images[..., 0]) if views.confidence is None else views.confidence
    return replace(
        views,
        images=torch.where(mask[..., None], views.images.mean((0, 1, 2, 3)), views.images),
        depth=None if views.depth is None else views.depth.masked_fill(mask, 0.0),
        body_ids=None if views.body_ids is None else views.body_ids.masked_fill(mask, 0),
        confidence=given.masked_fill(mask, 0.0),
    )


def masked_psnr(ours: Tensor, true: Tensor, mask: Tensor) -> float:
    """dB over the pixels of `mask` of all pictures ``[T, V, H, W, 3]`` together."""
    return decibels((ours - true)[mask].double().square().mean())


__all__ = ["Probe", "hidden_blocks", "hide", "masked_psnr", "probe"]
