"""Fit a scene to what cameras saw: one loop, which may be stopped anywhere and goes on exactly where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataengine.digests import digest_views
from dataengine.errors import MissingPackage
from dataengine.gaussians import LOOSE
from dataengine.losses import Weights, frame_loss
from dataengine.motion import describe_motion
from dataengine.progress import counted, make_bar
from dataengine.scene import Scene
from dataengine.storage import AnyPath, load_tensors, save_tensors
from dataengine.views import Views

Callback = Callable[[Scene, dict[str, float]], Any]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates: metres for means, and of the motion's own numbers; those of its network beside them, and of the
    corrections of poses (metres and radians), of which one frame in T has a gradient at a step."""

    means: float = 5e-4
    quats: float = 5e-3
    scales: float = 1e-2
    opacities: float = 5e-2
    harmonics: float = 1e-2
    own: float = 2e-3
    network: float = 1e-3
    poses: float = 5e-4
    last: float = 0.1

    def of(self, name: str) -> float:
        return getattr(self, name, self.own)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How to fit.

    Attributes:
        steps: optimiser steps; each sees all views of one frame, frames in an order shuffled anew each time round.
        rates: learning rates, which fall to `rates.last` of themselves on a cosine.
        weights: of the loss.
        densify: clone, split and prune by gsplat's `DefaultStrategy`; for scenes that started without depth.
        seed: of the order of frames and of densification.
        save_every: steps between checkpoints where there is a folder.
        quiet: no progress bar, nor lines in its place.
    """

    steps: int = 400
    rates: Rates = field(default_factory=Rates)
    weights: Weights = field(default_factory=Weights)
    densify: bool = False
    seed: int = 0
    save_every: int = 200
    quiet: bool = False

    def __post_init__(self) -> None:
        whole = isinstance(self.steps, int) and isinstance(self.save_every, int)
        if not whole or self.steps < 0 or self.save_every < 1:
            raise ValueError(
                "steps, save_every: expected whole numbers of at least 0 and 1, got "
                f"{self.steps!r} and {self.save_every!r}"
            )


def bound(settings: Fit) -> dict[str, Any]:
    """The settings that a fit's numbers depend on, as JSON."""
    return {name: value for name, value in asdict(settings).items() if name not in ("quiet", "save_every")}


def fit(
    scene: Scene,
    views: Views,
    settings: Fit | None = None,
    *,
    folder: AnyPath | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, float]]:
    """Fit `scene`, in place, to `views`; returns one record ``{"step", "frame", "loss", "gaussians"}`` per step.

    With a `folder` the state is saved there every `save_every` steps and at the end; a fit of the same settings that
    was stopped goes on from there, and ends with the same numbers as one that was not. A callback gets the scene and the
    record of a step; it may stop the fit by returning True.

    Raises:
        ValueError: a scene of another number of frames; a folder with a fit of other settings or views, or from another
            start.
    """
    settings = settings or Fit()
    if scene.frames != len(views):
        raise ValueError(f"views: expected {scene.frames} frames like the scene, got {len(views)}")
    run = _Run(scene, settings)
    seen = digest_views(views) if folder is not None else ""
    records = run.resume(Path(folder), seen) if folder is not None else []
    bar = make_bar(
        total=settings.steps, initial=run.step, desc="fit", unit="step", quiet=settings.quiet, leave=False
    )
    for step in counted(run.step, settings.steps, bar):
        frame = _frame(settings.seed, step, len(views))
        loss = run.advance(views, step, frame)
        records.append({"step": step, "frame": frame, "loss": loss, "gaussians": len(scene)})
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        last = step + 1 == settings.steps
        asked = [callback(scene, records[-1]) for callback in callbacks]  # all of them are called
        stop = any(answer is True for answer in asked)
        if folder is not None and (last or stop or (step + 1) % settings.save_every == 0):
            run.save(Path(folder), step + 1, records, seen)
        if stop:
            break
    return records


def _frame(seed: int, step: int, frames: int) -> int:
    """The frame of a step: every round of `frames` steps is a new permutation."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step // frames)
    return int(torch.randperm(frames, generator=generator)[step % frames])


class _Run:
    """The optimisers of a fit and where it stands."""

    def __init__(self, scene: Scene, settings: Fit):
        self.scene, self.settings, self.step = scene, settings, 0
        # Counts, not digits: those of a start differ by rounding between machines.
        self.start = json.dumps({"gaussians": len(scene), "motion": describe_motion(scene.motion)})
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.Adam([value], lr=settings.rates.of(name), eps=1e-15)
            for name, value in scene.params.items()
            if value.requires_grad
        }
        learned: dict[str, list[torch.nn.Parameter]] = {"network": [], "poses": []}
        for name, value in scene.motion.named_parameters():
            if value.requires_grad:
                learned["poses" if name.endswith("correction") else "network"].append(value)
        groups = [{"params": values, "rate": name} for name, values in learned.items() if values]
        self.network = torch.optim.Adam(groups) if groups else None
        self.strategy = _Densification(self) if settings.densify else None

    def advance(self, views: Views, step: int, frame: int) -> float:
        """One step on all views of a frame; returns the loss."""
        self._set_rates(step)
        options = {"absgrad": True} if self.strategy else {}
        rendering = self.scene.render(views.cameras, frame, **options)
        depth, confidence = (None if x is None else x[frame] for x in (views.depth, views.confidence))
        loss = frame_loss(rendering, views.images[frame], depth, confidence, self.settings.weights)
        loss = loss + self.settings.weights.motion * self.scene.penalty(frame)
        if self.strategy:
            self.strategy.before(step, rendering.meta)
        loss.backward()
        for optimizer in self._all():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.strategy:
            self.strategy.after(step, rendering.meta)
        return float(loss.detach())

    def _all(self) -> list[torch.optim.Optimizer]:
        return [*self.optimizers.values(), *([self.network] if self.network else [])]

    def _set_rates(self, step: int) -> None:
        rates, progress = self.settings.rates, step / max(1, self.settings.steps)
        factor = rates.last + (1 - rates.last) * 0.5 * (
            1 + float(torch.cos(torch.tensor(torch.pi * progress)))
        )
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = factor * rates.of(name)
        if self.network:
            for group in self.network.param_groups:
                group["lr"] = factor * rates.of(group["rate"])

    def save(self, folder: Path, step: int, records: list[dict[str, float]], seen: str) -> None:
        tensors: dict[str, Tensor] = {f"scene.{k}": v for k, v in self.scene.state_dict().items()}
        for name, optimizer in [*self.optimizers.items(), ("network", self.network)]:
            states = optimizer.state_dict()["state"] if optimizer else {}
            for index, state in states.items():
                tensors |= {f"adam.{name}.{index}.{key}": torch.as_tensor(v) for key, v in state.items()}
        if self.strategy:
            tensors |= {f"strategy.{k}": v for k, v in self.strategy.state.items() if isinstance(v, Tensor)}
        metadata = {
            "step": str(step),
            "views": seen,
            "start": self.start,
            "settings": json.dumps(bound(self.settings)),
            "records": json.dumps(records),
        }
        save_tensors(folder / "fit.safetensors", tensors, metadata)

    def resume(self, folder: Path, seen: str) -> list[dict[str, float]]:
        """Take up the fit in `folder`, if there is one; its records so far."""
        path = folder / "fit.safetensors"
        if not path.exists():
            return []
        tensors, metadata = load_tensors(path)
        if json.loads(metadata["settings"]) != bound(self.settings):
            raise ValueError(
                f"{path}: expected a fit of the same settings, got another; choose another folder"
            )
        if metadata["views"] != seen or metadata["start"] != self.start:
            raise ValueError(
                f"{path}: expected a fit from the same start to the same views, got another; choose another folder"
            )
        self._restore(tensors)
        self.step = int(metadata["step"])
        return json.loads(metadata["records"])

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.scene.params.items():
            found = tensors[f"scene.params.{name}"]
            if found.shape != value.shape:  # densified since
                self.scene.params[name] = torch.nn.Parameter(found, requires_grad=value.requires_grad)
                if name in self.optimizers:
                    self.optimizers[name].param_groups[0]["params"] = [self.scene.params[name]]
        self.scene.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("scene.")})
        for name, optimizer in [*self.optimizers.items(), ("network", self.network)]:
            if optimizer is None:
                continue
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"adam.{name}."):
                    index, part = key.removeprefix(f"adam.{name}.").split(".")
                    state.setdefault(int(index), {})[part] = value
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        if self.strategy:
            self.strategy.state |= {k[9:]: v for k, v in tensors.items() if k.startswith("strategy.")}


class _Densification:
    """gsplat's `DefaultStrategy` on a scene: it clones, splits and prunes rows of all its parameters alike."""

    def __init__(self, run: _Run):
        try:
            from gsplat.strategy import DefaultStrategy
        except ImportError:
            raise MissingPackage(
                "densify: expected the package gsplat, found none; pip install gsplat"
            ) from None
        steps = run.settings.steps
        self.run = run
        self.strategy = DefaultStrategy(
            refine_start_iter=steps // 10, refine_stop_iter=3 * steps // 4, refine_every=max(10, steps // 20),
            reset_every=steps, absgrad=True, grow_grad2d=8e-4, verbose=False,
        )  # fmt: skip
        self.state: dict[str, Any] = self.strategy.initialize_state(scene_scale=1.0)

    def before(self, step: int, meta: dict[str, Any]) -> None:
        self.strategy.step_pre_backward(self.run.scene.params, self.run.optimizers, self.state, step, meta)

    def after(self, step: int, meta: dict[str, Any]) -> None:
        params = self.run.scene.params
        if "life" in params:  # of what lives for a moment, more would learn the few pictures of it by heart
            meta["means2d"].absgrad[:, params["body"] == LOOSE] = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * self.run.settings.seed + step)
            self.strategy.step_post_backward(
                self.run.scene.params, self.run.optimizers, self.state, step, meta, packed=False
            )
