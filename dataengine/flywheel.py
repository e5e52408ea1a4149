"""The flywheel of EnerVerse-D: few real views -> scene -> renders from anchor cameras -> a generator repairs them -> the
scene is fitted again to both -> the next round (EnerVerse, arXiv 2501.01895, section on the data engine).

The paper reports no number for it, so this one is measured: every round is judged on cameras that nothing was fitted to,
and beside any generator run the controls that need none.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dataengine.cameras import Cameras
from dataengine.fit import Fit, fit
from dataengine.gaussians import STATIC, Gaussians
from dataengine.generators import ConstantFill, Generator, Identity, Oracle, Renders, Repaired
from dataengine.lerobot.layout import PROVENANCE_LEGEND
from dataengine.reconstruct import Reconstruction, measure, reconstruct, render_all
from dataengine.scene import Scene
from dataengine.storage import AnyPath, atomic_write
from dataengine.views import Views

CHANGED = 1.5 / 255
CONTROLS: dict[str, Callable[[], Generator | None]] = {
    "more_iterations": lambda: None,
    "self_distillation": Identity,
    "constant_fill": ConstantFill,
    "oracle": Oracle,
}


@dataclass(frozen=True, kw_only=True)
class Flywheel:
    """How to turn it.

    Attributes:
        rounds: at most so many after the first fit.
        start: the first fit, to the real views alone.
        refit: of every round; its steps alternate nothing: all views of a frame together, real ones in full.
        weight: of a repaired view against a real one.
        grow: where a repaired picture shows a surface and the scene has none, put Gaussians there.
        tolerance: dB by which the real views (and the held-out ones, where there are any) may get worse in a round; beyond
            it the round is undone and the wheel stops.
    """

    rounds: int = 2
    start: Reconstruction = field(default_factory=Reconstruction)
    refit: Fit = field(default_factory=lambda: Fit(steps=80))
    weight: float = 0.5
    grow: bool = True
    tolerance: float = 0.5

    def __post_init__(self) -> None:
        if self.rounds < 0 or not 0 < self.weight <= 1 or self.tolerance < 0:
            raise ValueError(
                f"rounds, weight, tolerance: expected rounds >= 0, weight in (0, 1], tolerance >= 0, got {self.rounds}, "
                f"{self.weight}, {self.tolerance}"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Turned:
    """What the flywheel leaves: the scene, the views it was last fitted to, and a record per round."""

    scene: Scene
    views: Views
    log: list[dict[str, Any]]


def flywheel(
    views: Views,
    generator: Generator | None,
    cameras: Cameras,
    settings: Flywheel | None = None,
    *,
    scene: Scene | None = None,
    held_out: Views | None = None,
    anchors: Views | None = None,
    gate: bool = True,
) -> Turned:
    """Turn the flywheel.

    Args:
        views: what was seen; kept in full in every round.
        generator: what repairs renders; None fits on to the real views alone.
        cameras: where to look from, fixed or of as many frames.
        scene: to go on from, as `first_fit` makes it; it is changed in place. None makes one.
        held_out: views that are never fitted to, only measured.
        anchors: the truth at `cameras` where it is known: for the oracle, and to measure what the generator mends.
        gate: stop and undo a round that made the real or the held-out views worse.

    Returns the scene of the last round that was kept, and a log: round 0 is the first fit.
    """
    settings = settings or Flywheel()
    began = time.perf_counter()
    scene = first_fit(views, settings) if scene is None else scene
    log = [record(scene, views, held_out, 0, began)]
    joined = views
    for number in range(1, settings.rounds + 1):
        began, before = time.perf_counter(), copy.deepcopy(scene)
        told: dict[str, float] = {}
        if generator is not None:
            renders = look(scene, cameras, len(views))
            repaired = generator.repair(renders, views, anchors)
            told = judge(renders, repaired, anchors) | {"changed": changed(renders.images, repaired.images)}
            pseudo = as_views(repaired, cameras, views, settings.weight)
            joined = views.join(pseudo)
            if settings.grow:
                scene = grown(scene, pseudo, renders.alpha, settings.start.spacing)
        plan = replace(settings.refit, seed=settings.refit.seed + number)
        fit(scene, joined, plan)
        log.append(record(scene, views, held_out, number, began) | told)
        if gate and worse(log[-2], log[-1], settings.tolerance):
            log[-1]["kept"] = False
            return Turned(scene=before, views=joined, log=log)
    return Turned(scene=scene, views=joined, log=log)


def first_fit(views: Views, settings: Flywheel) -> Scene:
    """The scene of round 0, fitted to real views alone."""
    return reconstruct(views, settings.start)


def with_controls(
    views: Views,
    generators: Mapping[str, Generator],
    cameras: Cameras,
    settings: Flywheel | None = None,
    *,
    held_out: Views,
    anchors: Views | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Logs of the flywheel with each of `generators` and with each control, all from the same first fit and ungated.

    The oracle runs only where the truth at the anchor cameras is known.
    """
    settings = settings or Flywheel()
    scene = first_fit(views, settings)
    runs: dict[str, Generator | None] = dict(generators)
    runs |= {name: make() for name, make in CONTROLS.items() if name != "oracle" or anchors is not None}
    return {
        name: flywheel(
            views, generator, cameras, settings, scene=copy.deepcopy(scene), held_out=held_out, anchors=anchors, gate=False
        ).log
        for name, generator in runs.items()
    }  # fmt: skip


def look(scene: Scene, cameras: Cameras, frames: int) -> Renders:
    """Renders of every frame from `cameras`."""
    blank = Views(
        cameras=cameras, images=torch.zeros(frames, len(cameras.names), cameras.height, cameras.width, 3)
    )
    images, depth, alpha = render_all(scene, blank)
    return Renders(images=images, depth=depth, alpha=alpha)


def as_views(repaired: Repaired, cameras: Cameras, views: Views, weight: float) -> Views:
    """Repaired pictures as views that count `weight` times their confidence."""
    depth = None if views.depth is None else repaired.depth
    generated = PROVENANCE_LEGEND.index("generated")
    return Views(
        cameras=cameras, images=repaired.images, depth=depth, confidence=weight * repaired.confidence,
        body_ids=None, bodies=views.bodies, fps=views.fps,
        provenance=torch.full(repaired.images.shape[:2], generated),
    )  # fmt: skip


def grown(scene: Scene, pseudo: Views, alpha: Tensor, spacing: float) -> Scene:
    """The scene with static Gaussians where `pseudo` shows a surface at frame 0 and the scene covers less than half."""
    if pseudo.depth is None or pseudo.confidence is None:
        return scene
    empty = (alpha[0] < 0.5) & (pseudo.depth[0] > 0) & (pseudo.confidence[0] > 0.1)
    step = max(1, round(spacing))
    empty &= _every(empty.shape[-2:], step)
    if not empty.any():
        return scene
    still = pseudo.cameras.at(0)
    points = torch.from_numpy(still.unproject(pseudo.depth[0].numpy())).float()[empty]
    focal = float(still.intrinsics[0, 0, 0])
    size = 0.5 * spacing * pseudo.depth[0][empty] / focal
    body = torch.full((len(points),), STATIC)
    more = Gaussians.from_points(
        points, pseudo.images[0][empty], size, body=body, degree=scene.canonical.degree
    )
    return scene.with_more(more)


def _every(size: torch.Size, step: int) -> Tensor:
    rows, columns = torch.arange(size[0]) % step == 0, torch.arange(size[1]) % step == 0
    return rows[:, None] & columns


def record(scene: Scene, views: Views, held_out: Views | None, number: int, began: float) -> dict[str, Any]:
    """The measures of a round."""
    found: dict[str, Any] = {
        "round": number,
        "seconds": time.perf_counter() - began,
        "gaussians": len(scene),
        "kept": True,
    }
    found["input_psnr"] = measure(scene, views)["psnr"]
    if held_out is not None:
        moving = None if held_out.body_ids is None else held_out.body_ids > 0
        found |= measure(scene, held_out, moving)
        found["reprojection"] = reprojection_error(scene, views, held_out)
    return found


def judge(renders: Renders, repaired: Repaired, anchors: Views | None) -> dict[str, float]:
    """PSNR of the anchor views before and after the generator, where the truth is known."""
    if anchors is None:
        return {}
    before, after = ((x - anchors.images).square().mean() for x in (renders.images, repaired.images))
    return {
        "anchor_psnr_before": float(-10 * before.log10()),
        "anchor_psnr_after": float(-10 * after.log10()),
    }


def changed(before: Tensor, after: Tensor) -> float:
    """Share of pictures ``[T, V, H, W, 3]`` in which a generator changed any pixel by more than storing them does."""
    return float(((after - before).abs().amax((2, 3, 4)) > CHANGED).float().mean())


def worse(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float) -> bool:
    """Whether a round made the real views, or the held-out ones, worse by more than `tolerance` dB."""
    return any(after[key] < before[key] - tolerance for key in ("input_psnr", "psnr") if key in before)


@torch.no_grad()
def reprojection_error(scene: Scene, views: Views, held_out: Views) -> float:
    """Mean absolute difference, 0 to 1, between what held-out cameras see and what real views show at the same points.

    The scene's depth at a held-out pixel gives a point; where a real view sees that point (its own depth there agrees
    within 2 cm or 2 %), its colour must be that of the held-out picture. It grows with wrong geometry, and a pixel that no
    view confirms counts as the difference to the mean colour, so that holes do not pay.
    """
    total, mean = [], views.images.mean((0, 1, 2, 3))
    for frame in range(scene.frames):
        target, source = held_out.cameras.at(frame), views.cameras.at(frame)
        there, here = (scene.render(cameras, frame) for cameras in (target, source))
        points = torch.from_numpy(target.unproject(there.depth.numpy())).float()
        best = (held_out.images[frame] - mean).abs().mean(-1)
        confirmed = torch.zeros_like(best, dtype=torch.bool)
        pixels, depth = source.project(points.reshape(-1, 3).numpy())
        for view in range(len(source.names)):
            place = (
                torch.from_numpy(pixels[view]).float() / torch.tensor([source.width, source.height]) * 2 - 1
            )
            stack = torch.cat([views.images[frame, view].movedim(-1, 0), here.depth[view][None]])[None]
            seen = F.grid_sample(stack, place.view(1, 1, -1, 2), align_corners=False)[0, :, 0].T.view(
                *best.shape, 4
            )
            far = torch.from_numpy(depth[view]).float().view(best.shape)
            inside = (place.abs() < 1).all(-1).view(best.shape) & (far > 0) & (there.alpha > 0.5)
            same = inside & ((seen[..., 3] - far).abs() < 0.02 + 0.02 * far)
            error = (seen[..., :3] - held_out.images[frame]).abs().mean(-1)
            best = torch.where(same & (~confirmed | (error < best)), error, best)
            confirmed |= same
        total.append(best.mean())
    return float(torch.stack(total).mean())


def write_log(path: AnyPath, logs: Mapping[str, list[dict[str, Any]]], settings: Flywheel) -> Path:
    """Write logs and settings as JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps({"settings": asdict(settings), "logs": logs}, indent=1), encoding="utf-8"
        )
    return Path(path)
