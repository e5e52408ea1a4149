"""The flywheel of EnerVerse-D: few real views -> scene -> renders from anchor cameras -> a generator repairs them -> the
scene is fitted again to both -> the next round (EnerVerse, arXiv 2501.01895, section on the data engine).

The paper reports no number for it, so this one is measured: every round is judged on cameras that nothing was fitted to,
and beside any generator run the controls that need none.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dataengine.cameras import Cameras
from dataengine.charts import svg_curve
from dataengine.fit import Fit, fit
from dataengine.generators import ConstantFill, Generator, Identity, Oracle, Renders, Repaired
from dataengine.growth import grown
from dataengine.lerobot.layout import PROVENANCE_LEGEND
from dataengine.quality import decibels
from dataengine.reconstruct import Reconstruction, measure, reconstruct, render_all
from dataengine.scene import Scene
from dataengine.storage import AnyPath, atomic_write, write_json
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
    start: Reconstruction = field(default_factory=lambda: Reconstruction(complete=False))
    refit: Fit = field(default_factory=lambda: Fit(steps=80))
    weight: float = 0.5
    grow: bool = True
    tolerance: float = 0.5

    def __post_init__(self) -> None:
        if (
            not isinstance(self.rounds, int)
            or self.rounds < 0
            or not 0 < self.weight <= 1
            or self.tolerance < 0
        ):
            raise ValueError(
                "rounds, weight, tolerance: expected a whole number >= 0, a share in (0, 1] and a number >= 0, got "
                f"{self.rounds}, {self.weight}, {self.tolerance}"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Turned:
    """What the flywheel leaves: the scene, the views that it was fitted to, and a record per round."""

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
        scene: to go on from, as `first_fit` makes it; its numbers are changed in place, so give a copy to keep it. None
            makes one.
        held_out: views that are never fitted to, only measured.
        anchors: the truth at `cameras` where it is known: for the oracle, and to measure what the generator mends.
        gate: stop and undo a round that made the real or the held-out views worse.

    Returns the scene of the last round that was kept, and a log: round 0 is the first fit.

    Raises ValueError as `reconstruct` does, for cameras whose pictures are of another size than the views, and for a scene
    of another number of frames.
    """
    settings = settings or Flywheel()
    _check_fit_together(views, cameras, settings, scene)
    began = time.perf_counter()
    scene = first_fit(views, settings) if scene is None else scene
    log = [record(scene, views, held_out, 0, began)]
    joined = views
    for number in range(1, settings.rounds + 1):
        began, before = time.perf_counter(), (copy.deepcopy(scene), joined)
        told: dict[str, float] = {}
        if generator is not None:
            renders = look(scene, cameras, len(views))
            repaired = generator.repair(renders, views, anchors)
            told = judge(renders, repaired, anchors) | {"changed": changed(renders.images, repaired.images)}
            pseudo = as_views(repaired, cameras, views, settings.weight)
            joined = views.join(pseudo)
            if settings.grow:
                scene = grown(scene, pseudo, renders.alpha, views, settings.start.spacing)
        plan = replace(settings.refit, seed=settings.refit.seed + number)
        fit(scene, joined, plan)
        log.append(record(scene, views, held_out, number, began) | told)
        if gate and worse(log[-2], log[-1], settings.tolerance):
            log[-1]["kept"] = False
            return Turned(scene=before[0], views=before[1], log=log)
    return Turned(scene=scene, views=joined, log=log)


def _check_fit_together(views: Views, cameras: Cameras, settings: Flywheel, scene: Scene | None) -> None:
    if not isinstance(settings, Flywheel):
        raise ValueError(f"settings: expected a Flywheel, got {settings!r}; pass Flywheel(rounds=...)")
    ours, theirs = ((c.width, c.height) for c in (views.cameras, cameras))
    if ours != theirs:
        raise ValueError(
            f"cameras: expected pictures of {ours[0]} x {ours[1]} pixels like the views, got {theirs[0]} x {theirs[1]}; "
            f"pass cameras.scaled_to({ours[0]}, {ours[1]})"
        )
    if scene is not None and scene.frames != len(views):
        raise ValueError(
            f"scene: expected {len(views)} frames like the views, got {scene.frames}; fit another one"
        )


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

    The oracle runs only where the truth at the anchor cameras is known. The control `planes` starts anew from a scene
    whose planes were completed, which needs no generator either, and is fitted on; its round 0 is the common first fit.
    """
    settings = settings or Flywheel()
    scene = first_fit(views, settings)
    runs: dict[str, Generator | None] = dict(generators)
    runs |= {name: make() for name, make in CONTROLS.items() if name != "oracle" or anchors is not None}
    logs = {
        name: flywheel(
            views, generator, cameras, settings, scene=copy.deepcopy(scene), held_out=held_out, anchors=anchors, gate=False
        ).log
        for name, generator in runs.items()
    }  # fmt: skip
    completed = replace(settings, start=replace(settings.start, complete=True))
    fitted_on = flywheel(views, None, cameras, completed, held_out=held_out, gate=False).log
    logs["planes"] = [logs["more_iterations"][0], *fitted_on[1:]]
    return logs


def look(scene: Scene, cameras: Cameras, frames: int) -> Renders:
    """Renders of every frame from `cameras`."""
    blank = Views(
        cameras=cameras, images=torch.zeros(frames, len(cameras.names), cameras.height, cameras.width, 3)
    )
    images, depth, alpha = render_all(scene, blank)
    return Renders(images=images, depth=depth, alpha=alpha, cameras=cameras)


def as_views(repaired: Repaired, cameras: Cameras, views: Views, weight: float) -> Views:
    """Repaired pictures as views that count `weight` times their confidence."""
    depth = None if views.depth is None else repaired.depth
    generated = PROVENANCE_LEGEND.index("generated")
    return Views(
        cameras=cameras, images=repaired.images, depth=depth, confidence=weight * repaired.confidence,
        body_ids=None, bodies=views.bodies, fps=views.fps,
        provenance=torch.full(repaired.images.shape[:2], generated),
    )  # fmt: skip


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
        if held_out.depth is not None:
            found |= reprojection_errors(scene, held_out)
    return found


def judge(renders: Renders, repaired: Repaired, anchors: Views | None) -> dict[str, float]:
    """PSNR of the anchor views before and after the generator, where the truth is known."""
    if anchors is None:
        return {}
    before, after = ((x - anchors.images).square().mean() for x in (renders.images, repaired.images))
    return {"anchor_psnr_before": decibels(before), "anchor_psnr_after": decibels(after)}


def changed(before: Tensor, after: Tensor) -> float:
    """Share of pictures ``[T, V, H, W, 3]`` in which a generator changed any pixel by more than storing them does."""
    return float(((after - before).abs().amax((2, 3, 4)) > CHANGED).float().mean())


def worse(before: Mapping[str, Any], after: Mapping[str, Any], tolerance: float) -> bool:
    """Whether a round made the real views, or the held-out ones, worse by more than `tolerance` dB."""
    return any(after[key] < before[key] - tolerance for key in ("input_psnr", "psnr") if key in before)


@torch.no_grad()
def reprojection_errors(scene: Scene, held_out: Views) -> dict[str, float]:
    """How far views disagree when pixels are carried from one held-out camera to another by the scene's own depth: mean
    absolute difference of colour, 0 to 1, over all pixels whose true surface both cameras see.

    `reprojection` carries what the scene shows at the first camera and compares with the true picture of the second: are
    made views right and do they fit the others? `reprojection_depth` carries the true picture instead, so that the
    scene's depth alone is judged. A pixel where the scene has no surface, or one outside the second picture, goes
    nowhere: it counts as what the scene shows against the truth, or the mean colour against the truth, so that holes do
    not pay. Needs depth in `held_out`, which tells what both see; with one camera nothing can be said.
    """
    if len(held_out.names) < 2:
        return {}
    mean, errors = held_out.images.mean((0, 1, 2, 3)), {"reprojection": [], "reprojection_depth": []}
    for frame in range(scene.frames):
        cameras = held_out.cameras.at(frame)
        shown = scene.render(cameras, frame)
        surface = torch.where(shown.alpha > 0.5, shown.depth, 0.0)
        for a, b in itertools.permutations(range(len(cameras.names)), 2):
            true, depth = held_out.images[frame, a], _depth(held_out)[frame, a]
            there, far, _ = carry(cameras, a, b, depth, held_out, frame)
            shared = ((there[..., 3] - far).abs() < 0.02 + 0.02 * far) & (depth > 0)
            other, _, inside = carry(cameras, a, b, surface[a], held_out, frame)
            landed = (inside & (surface[a] > 0))[..., None]
            made = shown.images[a].clamp(0, 1)
            pictures = {
                "reprojection": torch.where(landed, other[..., :3] - made, made - true),
                "reprojection_depth": torch.where(landed, other[..., :3] - true, mean - true),
            }
            for name, difference in pictures.items():
                errors[name].append(difference.abs().mean(-1)[shared])
    joined = {name: torch.cat(parts) for name, parts in errors.items()}
    return {name: float(values.mean()) for name, values in joined.items() if len(values)}


def _depth(views: Views) -> Tensor:
    if views.depth is None:
        raise ValueError("views: expected depth, to know which cameras see the same surface, got none")
    return views.depth


def carry(
    cameras: Cameras, a: int, b: int, depth: Tensor, views: Views, frame: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What view b shows at the points of `depth` ``[H, W]`` of view a: colour and depth ``[H, W, 4]``, the points' own
    depth from there ``[H, W]``, and which lie in its picture."""
    first, second = (cameras.select([cameras.names[i]]) for i in (a, b))
    points = first.unproject(depth[None].numpy()).reshape(-1, 3)
    pixels, far = (torch.from_numpy(x[0]).float() for x in second.project(points))
    place = (pixels / torch.tensor([second.width, second.height]) * 2 - 1).nan_to_num(2.0).clamp(-2, 2)
    far = far.view(depth.shape)
    inside = (place.abs() < 1).all(-1).view(depth.shape) & (far > 0)
    stack = torch.cat([views.images[frame, b], _depth(views)[frame, b][..., None]], -1).movedim(-1, 0)
    seen = F.grid_sample(stack[None], place.view(1, *depth.shape, 2), mode="nearest", align_corners=False)
    return seen[0].movedim(0, -1), far, inside


def write_log(path: AnyPath, logs: Mapping[str, list[dict[str, Any]]], settings: Flywheel) -> Path:
    """Write logs and settings as JSON, and beside it, under the same name in `.svg`, the PSNR of every run by round: on
    held-out cameras where there were any, else on the real views."""
    path = Path(path)
    with atomic_write(path.with_suffix(".svg")) as temporary:
        temporary.write_text(draw_log(logs), encoding="utf-8")
    return write_json(path, {"settings": asdict(settings), "logs": logs})


def draw_log(logs: Mapping[str, list[dict[str, Any]]]) -> str:
    """The PSNR of every run by round, as SVG."""
    held_out = all("psnr" in record for log in logs.values() for record in log)
    measure, cameras = ("psnr", "cameras held out") if held_out else ("input_psnr", "cameras fitted to")
    series = {
        name: ([float(record["round"]) for record in log], [record[measure] for record in log])
        for name, log in logs.items()
    }
    return svg_curve(series, "round", f"PSNR on {cameras}, dB")
