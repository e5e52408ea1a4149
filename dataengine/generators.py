"""Generators repair what a scene shows from cameras that saw nothing: the interface, the plain ones, and a small network.

A generator gets renders and gives back pictures, depth and how far each pixel may be trusted. The plain ones are the
controls of the flywheel: whatever they reach needs no generative model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dataengine.cameras import Cameras
from dataengine.errors import closest
from dataengine.storage import AnyPath, load_tensors, save_tensors
from dataengine.views import Views

RESTORER = Path(__file__).parent / "weights" / "restorer.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class Renders:
    """What a scene shows from V cameras: images ``[T, V, H, W, 3]``, depth and alpha ``[T, V, H, W]``; depth is that of
    the covered part of a pixel and 0 where nothing is. The cameras, for generators that ask where a view looks from."""

    images: Tensor
    depth: Tensor
    alpha: Tensor
    cameras: Cameras | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Repaired:
    """Images ``[T, V, H, W, 3]`` in [0, 1], depth ``[T, V, H, W]`` metres or 0 where not known, and confidence
    ``[T, V, H, W]`` in [0, 1]."""

    images: Tensor
    depth: Tensor
    confidence: Tensor


class Generator(Protocol):
    """Anything that repairs renders. `references` are the real views of the scene, of the same frames. One with weights
    that is no `nn.Module` has an attribute `digest` that tells them from others (see `dataengine.digests`)."""

    name: str

    def repair(self, renders: Renders, references: Views, anchors: Views | None) -> Repaired:
        """Repair `renders`; `anchors` is the truth at those cameras where it is known, for the oracle alone."""
        ...


class Identity:
    """Renders as they are: a scene that learns from itself."""

    name = "self_distillation"

    def repair(self, renders: Renders, references: Views, anchors: Views | None) -> Repaired:
        return Repaired(images=renders.images, depth=_covered(renders), confidence=renders.alpha)


class ConstantFill:
    """The mean colour of the real views wherever nothing is seen."""

    name = "constant_fill"

    def repair(self, renders: Renders, references: Views, anchors: Views | None) -> Repaired:
        mean = references.images.mean((0, 1, 2, 3))
        images = renders.images + (1 - renders.alpha[..., None]) * mean
        return Repaired(
            images=images.clamp(0, 1), depth=fill_depth(renders), confidence=torch.ones_like(renders.alpha)
        )


class Oracle:
    """The truth: what no generator can beat."""

    name = "oracle"

    def repair(self, renders: Renders, references: Views, anchors: Views | None) -> Repaired:
        if anchors is None:
            raise ValueError(
                "anchors: expected the true pictures at the anchor cameras for the oracle, got none"
            )
        depth = anchors.depth if anchors.depth is not None else fill_depth(renders)
        return Repaired(images=anchors.images, depth=depth, confidence=torch.ones_like(renders.alpha))


def _covered(renders: Renders) -> Tensor:
    return torch.where(renders.alpha > 0.5, renders.depth, 0.0)


def fill_depth(renders: Renders) -> Tensor:
    """Depth with holes filled from around them, coarse to fine (push-pull): ``[T, V, H, W]`` metres."""
    known = (renders.alpha > 0.5).float().flatten(0, 1)[:, None]
    depth = renders.depth.flatten(0, 1)[:, None] * known
    return _pull(depth, known).view_as(renders.depth)


def _pull(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted values where there are any, else those of the next coarser level."""
    if min(values.shape[-2:]) < 2:
        total = weight.sum((-2, -1), keepdim=True).clamp_min(1e-6)
        return (values.sum((-2, -1), keepdim=True) / total).expand_as(values)
    coarse, share = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (values, weight))
    below = _pull(torch.where(share > 0, coarse / share.clamp_min(1e-6), 0.0), (share > 0).float())
    up = F.interpolate(below, size=values.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(weight > 0, values / weight.clamp_min(1e-6), up)


class Restorer(nn.Module):
    """A small UNet that repairs renders of one family of scenes after a minute of training on other scenes of it.

    It reads colour, alpha and filled inverse depth, and gives residuals of colour and inverse depth and its own expected
    error, from which the confidence follows. Deterministic: where the truth is open, it gives the mean of what may be.
    Squares of 2 x 2 pixels are folded into channels, for holes are wide and full resolution costs most of the time.

    Args:
        width: channels of the finest level; level l has ``(l + 1) * width``.
    """

    name = "restorer"
    FOLD, LEVELS = 2, 3

    def __init__(self, width: int = 32):
        super().__init__()
        self.width = width
        widths = [width * (level + 1) for level in range(self.LEVELS + 1)]
        steps = list(itertools.pairwise(widths))
        self.enter = _convs(5 * self.FOLD**2, width)
        self.down = nn.ModuleList([_convs(fine, coarse, 2) for fine, coarse in steps])
        self.up = nn.ModuleList([_convs(coarse + fine, fine) for fine, coarse in reversed(steps)])
        self.leave = nn.Conv2d(width, 5 * self.FOLD**2, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a tenth faster on CPUs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 5, H, W] -> colour [B, 3, H, W], inverse depth [B, 1, H, W], expected error of colour [B, 1, H, W]."""
        (height, width), multiple = x.shape[-2:], self.FOLD * 2**self.LEVELS
        padded = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        found = self.enter(F.pixel_unshuffle(padded, self.FOLD).contiguous(memory_format=torch.channels_last))
        finer = []
        for down in self.down:
            finer.append(found)
            found = down(found)
        for up in self.up:
            found = up(torch.cat([F.interpolate(found, scale_factor=2.0), finer.pop()], 1))
        out = F.pixel_shuffle(self.leave(found), self.FOLD)[..., :height, :width]
        return x[:, :3] + out[:, :3], x[:, 4:] + out[:, 3:4], F.softplus(out[:, 4:] - 3)

    @torch.no_grad()
    def repair(self, renders: Renders, references: Views, anchors: Views | None) -> Repaired:
        shape = renders.alpha.shape
        device = self.leave.weight.device
        parts = [self(part.to(device)) for part in _inputs(renders).split(64)]
        images, inverse, error = (
            torch.cat(part).to(renders.alpha.device) for part in zip(*parts, strict=True)
        )
        return Repaired(
            images=images.clamp(0, 1).movedim(1, -1).view(*shape, 3),
            depth=1 / inverse.clamp_min(0.02).view(shape),
            confidence=(1 - error / 0.25).clamp(0, 1).view(shape),
        )

    def save(self, path: AnyPath) -> Path:
        return save_tensors(path, self.state_dict(), {"width": str(self.width)})

    @classmethod
    def load(cls, path: AnyPath) -> Restorer:
        """Read what `save` wrote; ValueError for another file."""
        tensors, metadata = load_tensors(path)
        if "width" not in metadata:
            raise ValueError(f"{path}: expected a restorer, got another file; train one with train_restorer")
        model = cls(int(metadata["width"]))
        model.load_state_dict(tensors)
        return model.eval()


def _convs(into: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, 3, stride, 1), nn.GroupNorm(4, out), nn.SiLU(),
        nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(4, out), nn.SiLU(),
    )  # fmt: skip


def _inputs(renders: Renders) -> Tensor:
    """[T V, 5, H, W]: colour, alpha, inverse depth without holes."""
    inverse = 1 / fill_depth(renders).clamp_min(0.05)
    stacked = torch.cat([renders.images, renders.alpha[..., None], inverse[..., None]], -1)
    return stacked.flatten(0, 1).movedim(-1, 1)


def train_restorer(
    pairs: Sequence[tuple[Renders, Views]], *, steps: int = 800, batch: int = 8, rate: float = 3e-3, width: int = 32,
    seed: int = 0, quiet: bool = False,
) -> Restorer:  # fmt: skip
    """Train a restorer on renders and the truth at their cameras, of scenes that it will not be judged on.

    Loss: L1 of colour, L1 of inverse depth where it is known, and L1 between the expected and the present error.
    """
    if not pairs:
        raise ValueError("pairs: expected renders with their truth, got none")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Restorer(width)
    inputs = torch.cat([_inputs(renders) for renders, _ in pairs])
    colors = torch.cat([truth.images.flatten(0, 1).movedim(-1, 1) for _, truth in pairs])
    depth = torch.cat([_true_depth(truth) for _, truth in pairs])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in tqdm(range(steps), desc="restorer", disable=quiet or None, leave=False):
        index = torch.randint(len(inputs), (batch,), generator=generator)
        x, color, far = inputs[index], colors[index], depth[index]
        if torch.rand((), generator=generator) < 0.5:
            x, color, far = x.flip(-1), color.flip(-1), far.flip(-1)
        ours, inverse, error = model(x)
        miss = (ours - color).abs().mean(1, keepdim=True)
        known = (far > 0).float()
        loss = miss.mean() + 0.2 * ((inverse - 1 / far.clamp_min(0.05)).abs() * known).mean()
        loss = loss + 0.2 * (error - miss.detach()).abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _true_depth(truth: Views) -> Tensor:
    depth = truth.images.new_zeros(truth.images.shape[:-1]) if truth.depth is None else truth.depth
    return depth.flatten(0, 1)[:, None]


def load_restorer(path: AnyPath | None = None) -> Restorer:
    """The restorer in a file that `Restorer.save` wrote, or the shipped one.

    Raises FileNotFoundError where there is none, ValueError for another file.
    """
    place = RESTORER if path is None else Path(path)
    if not place.is_file():
        raise FileNotFoundError(
            f"{place}: expected the weights of a restorer, found none; train one with train_restorer, or take the "
            "generator fill or none"
        )
    return Restorer.load(place)


GENERATORS: dict[str, Callable[[], Generator | None]] = {
    "none": lambda: None,
    "fill": ConstantFill,
    "restorer": load_restorer,
}
"""By the names that a user gives: renders as they are, the mean colour in holes, the shipped network."""


def make_generator(name: str) -> Generator | None:
    """The generator called `name`, None for ``none``; ValueError names the closest one where there is none."""
    if name not in GENERATORS:
        raise ValueError(
            f"generator: expected one of {', '.join(GENERATORS)}, got {name!r}; {closest(name, GENERATORS)}"
        )
    return GENERATORS[name]()


def default_generator() -> str:
    """``restorer`` where its weights are there, else ``none``."""
    return "restorer" if RESTORER.is_file() else "none"
