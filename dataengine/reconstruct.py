"""From what cameras saw to a 4D scene: choose how it moves, start, fit, measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dataengine.captures.problems import find_problems
from dataengine.completion import backdrop, complete
from dataengine.fit import Callback, Fit, fit
from dataengine.frusta import from_frusta
from dataengine.gaussians import LOOSE, STATIC
from dataengine.initialize import Start, from_depth, moving_pixels
from dataengine.motion import FOLLOWING, check_model, make_motion
from dataengine.paths import Course, Rigid
from dataengine.quality import decibels, ssim
from dataengine.scene import Scene
from dataengine.storage import AnyPath
from dataengine.tracking import track_bodies
from dataengine.views import Views

STILL = 1e-3  # share of moving pixels below which nothing moves
MOST = 0.5  # and above which no body can be told from the rest


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How to reconstruct. Raises ValueError for an unknown motion, spacing that is not above 0, and another degree.

    Attributes:
        motion: `auto` (see `choose_motion`) or one of :data:`dataengine.motion.MODELS`.
        spacing: side of a cell in pixels, of which every one that depth shows starts a Gaussian.
        degree: of the spherical harmonics of the colour, 0 to 3.
        complete: guess what no camera saw: planes go on (`dataengine.completion`), behind them is the usual colour.
        learn_poses: correct the poses that `rigid` is given; those that `bodies` finds always are.
        fit: the optimisation.
    """

    motion: str = "auto"
    spacing: float = 1.5
    degree: int = 0
    complete: bool = True
    learn_poses: bool = False
    fit: Fit = field(default_factory=Fit)

    def __post_init__(self) -> None:
        check_model(self.motion, "auto")
        if not isinstance(self.fit, Fit):
            raise ValueError(f"fit: expected a Fit, got {type(self.fit).__name__}; pass Fit(steps=...)")
        if not 0 < self.spacing < math.inf:
            raise ValueError(
                f"spacing: expected pixels above 0, got {self.spacing}; 1.5 starts a Gaussian every 1.5 pixels"
            )
        if self.degree not in range(4):
            raise ValueError(
                f"degree: expected 0, 1, 2 or 3, got {self.degree!r}; 0 is the same colour from everywhere"
            )


def choose_motion(views: Views) -> str:
    """`rigid` where bodies, their pixels and depth are known; `static` where less than a thousandth of all pixels move;
    `polynomial` without depth, or where most pixels move (cameras that move, say); else `bodies`, which of the models that
    need no poses shows moving pixels best."""
    if views.bodies is not None and views.body_ids is not None and views.depth is not None:
        return "rigid"
    moving = float(moving_pixels(views).float().mean())
    if moving < STILL:
        return "static"
    return "polynomial" if views.depth is None or moving > MOST else "bodies"


def reconstruct(
    views: Views,
    settings: Reconstruction | None = None,
    *,
    folder: AnyPath | None = None,
    callbacks: Sequence[Callback] = (),
) -> Scene:
    """A scene fitted to `views`; in `folder` it goes on where it was stopped.

    Raises ValueError for what :func:`dataengine.captures.find_problems` finds, such as fewer than two views, views that do
    not overlap, depth in millimetres or poses in other axes (of which colour alone proves nothing: it is taken as it is),
    or a motion that the views do not allow.
    """
    settings = settings or Reconstruction()
    for problem in find_problems(views):
        if problem.kind != "axes" or views.depth is not None:
            raise ValueError(problem.sentence)
    scene = begin(views, settings)
    plan = settings.fit if views.depth is not None else replace(settings.fit, densify=True)
    fit(scene, views, plan, folder=folder, callbacks=callbacks)
    return scene


def begin(views: Views, settings: Reconstruction) -> Scene:
    """The scene that a fit starts from."""
    name = choose_motion(views) if settings.motion == "auto" else settings.motion
    poses = None if views.bodies is None else torch.from_numpy(views.bodies.poses).float()
    labels, course = views.body_ids, None
    follows = name in FOLLOWING and views.depth is not None
    if name == "bodies" or follows:
        tracks = track_bodies(views)
        labels, poses = tracks.labels, tracks.poses
    start = _start(views, name, labels, poses, settings)
    if follows:
        start, course = _loosened(start, tracks.poses)
    motion = make_motion(name, start.gaussians, len(views), poses, learn=settings.learn_poses)
    scene = Scene(start.gaussians, motion, len(views), start.born)
    if course is not None:
        motion.follow(scene.canonical, scene.own, course)
    if settings.complete and views.depth is not None:
        scene = scene.with_more(complete(scene.canonical.detach(), views))
        scene.background.copy_(backdrop(views))
    return scene


def _start(
    views: Views, name: str, labels: Tensor | None, poses: Tensor | None, settings: Reconstruction
) -> Start:
    if views.depth is None:
        if name == "rigid":
            raise ValueError("views: expected depth to give bodies their pixels, got none; use polynomial")
        loose = {"static": None, "polynomial": "born"}.get(name, "first")
        return from_frusta(views, loose=loose)
    if name == "rigid" and labels is None:
        raise ValueError(
            "views: expected body_ids to give bodies their pixels, got none; use bodies, which finds both"
        )
    if name in ("static", "polynomial"):
        labels = torch.zeros(views.images.shape[:-1], dtype=torch.long) if name == "static" else None
        poses = None
    return from_depth(views, labels, poses, spacing=settings.spacing, degree=settings.degree)


def _loosened(start: Start, poses: Tensor) -> tuple[Start, Course]:
    """A start whose Gaussians of bodies are loose, and where `poses` ``[T, K, 4, 4]`` take them. What was loose already
    goes nowhere, and is kept where frame 0 showed it."""
    known = (start.gaussians.body != LOOSE) | (start.born == 0)
    gaussians = start.gaussians[known]
    course = Course.of(Rigid(poses), gaussians, len(poses))
    loose = torch.where(gaussians.body == STATIC, STATIC, LOOSE)
    return Start(gaussians=gaussians.replace(body=loose), born=start.born[known]), course


@torch.no_grad()
def measure(scene: Scene, views: Views, moving: Tensor | None = None) -> dict[str, float]:
    """How well `scene` shows what `views` saw: means over frames and views.

    psnr (at most 100 dB; where the views have confidence, over the pixels together that have any), ssim; moving_psnr over
    the pixels `moving` ``[T, V, H, W]`` of all frames together; cover, the mean alpha; depth_cm, the median error of depth
    in centimetres where the views have depth.
    """
    pictures, depths, alphas = render_all(scene, views)
    ours, true = pictures.movedim(-1, 2), views.images.movedim(-1, 2)
    error = (ours - true).square().mean(2).double()
    apart = error.mean((-2, -1)) if views.confidence is None else error[views.confidence > 0].mean()
    found = {"psnr": decibels(apart), "ssim": float(ssim(ours, true).mean())}
    if moving is not None and moving.any():
        found["moving_psnr"] = decibels(error[moving].mean())
    found["cover"] = float(alphas.mean())
    if views.depth is not None:
        known = views.depth > 0
        found["depth_cm"] = 100 * float((depths - views.depth).abs()[known].median())
    return found


@torch.no_grad()
def render_all(scene: Scene, views: Views) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``[T, V, H, W, 3]`` in [0, 1], depth and alpha ``[T, V, H, W]`` from the cameras of `views`, every frame."""
    frames = [scene.render(views.cameras, frame) for frame in range(scene.frames)]
    images = torch.stack([frame.images for frame in frames]).clamp(0, 1)
    return (
        images,
        torch.stack([frame.depth for frame in frames]),
        torch.stack([frame.alpha for frame in frames]),
    )
