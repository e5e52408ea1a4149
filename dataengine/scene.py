"""A 4D scene: Gaussians, how they move, and how they look from a camera."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataengine.cameras import Cameras
from dataengine.gaussians import PARAMETERS, Gaussians
from dataengine.motion import Motion, describe_motion, restore_motion
from dataengine.rasterize import rasterization
from dataengine.storage import AnyPath, load_tensors, save_tensors

VERSION = 1
FIXED = (
    "body",
    "born",
    "home",
)  # parameters that are not learned: densification copies and drops them like the others


@dataclass(frozen=True, eq=False, kw_only=True)
class Rendering:
    """Pictures of V cameras at one frame.

    Attributes:
        images: ``[V, H, W, 3]``, in [0, 1] up to rounding.
        depth: ``[V, H, W]`` expected depth in metres, 0 where nothing is.
        alpha: ``[V, H, W]`` how much of a pixel is covered.
        meta: what the rasteriser says, for densification.
    """

    images: Tensor
    depth: Tensor
    alpha: Tensor
    meta: dict[str, Any]


class Scene(nn.Module):
    """Gaussians over T frames.

    Attributes:
        params: everything that a Gaussian has of its own, ``[N, ..]`` by name: the parameters of `Gaussians`, `body`, and
            those of the motion. Densification adds and drops rows of all of them.
        motion: poses the Gaussians at a frame.
        frames: T.
        background: colour ``[3]`` behind everything.
    """

    background: Tensor

    def __init__(self, gaussians: Gaussians, motion: Motion, frames: int, born: Tensor | None = None):
        super().__init__()
        if frames < 1:
            raise ValueError(f"frames: expected at least 1, got {frames}")
        self.motion, self.frames = motion, frames
        born = torch.zeros(len(gaussians), dtype=torch.long) if born is None else born
        own = gaussians.parameters() | motion.start(gaussians, born)
        self.params = nn.ParameterDict(
            {
                name: nn.Parameter(value.detach().clone(), requires_grad=name not in FIXED)
                for name, value in own.items()
            }
        )
        self.params["body"] = nn.Parameter(gaussians.body.clone(), requires_grad=False)
        self.register_buffer("background", torch.zeros(3))

    def __len__(self) -> int:
        return len(self.params["means"])

    @property
    def canonical(self) -> Gaussians:
        """The Gaussians before they are posed."""
        return Gaussians(**{name: self.params[name] for name in (*PARAMETERS, "body")})

    @property
    def own(self) -> Mapping[str, Tensor]:
        """What the motion keeps of every Gaussian."""
        return {name: value for name, value in self.params.items() if name not in (*PARAMETERS, "body")}

    def at(self, frame: int) -> Gaussians:
        """The Gaussians at a frame, 0 to T - 1."""
        if not 0 <= frame < self.frames:
            raise IndexError(f"frame: expected 0 to {self.frames - 1}, got {frame}")
        return self.motion(self.canonical, self.own, frame)

    def penalty(self, frame: int) -> Tensor:
        """What the motion adds to the loss of a frame."""
        return self.motion.penalty(self.canonical, self.own, frame)

    def render(self, cameras: Cameras, frame: int, **options: Any) -> Rendering:
        """What `cameras` see at a frame; `options` go to the rasteriser."""
        return render(self.at(frame), cameras.at(frame), self.background, **options)

    @torch.no_grad()
    def body_ids(self, cameras: Cameras, frame: int, count: int) -> Tensor:
        """Which of `count` rigid bodies covers most of each pixel, int64 ``[V, H, W]``: 1 + i the i-th, 0 none of them."""
        gaussians = self.at(frame)
        marks = F.one_hot(gaussians.body.clamp_min(0), count + 1).float()
        return _rasterize(gaussians, cameras, marks)[0].argmax(-1)

    def with_more(self, gaussians: Gaussians, frame: int = 0) -> Scene:
        """A scene with these Gaussians besides, seen at `frame`; those it had keep what they learned."""
        born = torch.full((len(gaussians),), frame)
        added = gaussians.parameters() | self.motion.start(gaussians, born) | {"body": gaussians.body}
        scene = copy.deepcopy(self)
        for name, value in self.params.items():
            both = torch.cat([value.detach(), added[name].to(value.dtype)])
            scene.params[name] = nn.Parameter(both, requires_grad=value.requires_grad)
        return scene

    def save(self, path: AnyPath) -> Path:
        """Write the scene to one safetensors file."""
        described = {"version": VERSION, "frames": self.frames, "motion": describe_motion(self.motion)}
        return save_tensors(path, self.state_dict(), {"scene": json.dumps(described)})

    @classmethod
    def load(cls, path: AnyPath) -> Scene:
        """Read what `save` wrote. ValueError for a file of another kind or version."""
        tensors, metadata = load_tensors(path)
        try:
            described = json.loads(metadata["scene"])
            version = described["version"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}: expected a scene, got another file; write one with Scene.save"
            ) from None
        if version != VERSION:
            raise ValueError(f"{path}: expected version {VERSION}, got {version}; fit the scene again")
        try:
            return cls._restore(described, tensors)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected a whole scene, got one that does not fit together ({error}); write it again"
            ) from None

    @classmethod
    def _restore(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scene:
        params = {
            name.removeprefix("params."): t for name, t in tensors.items() if name.startswith("params.")
        }
        gaussians = Gaussians(**{name: params[name] for name in (*PARAMETERS, "body")})
        motion = restore_motion(described["motion"], tensors)
        scene = cls(gaussians, motion, described["frames"])
        for name, value in params.items():
            scene.params[name] = nn.Parameter(value, requires_grad=name not in FIXED)
        scene.load_state_dict(tensors)
        return scene


def render(gaussians: Gaussians, cameras: Cameras, background: Tensor, **options: Any) -> Rendering:
    """What V `cameras` of one moment see of `gaussians` before `background` ``[3]``."""
    options |= {"sh_degree": gaussians.degree, "render_mode": "RGB+ED"}
    colors, alphas, meta = _rasterize(gaussians, cameras, gaussians.harmonics, **options)
    images = colors[..., :3] + (1 - alphas) * background
    return Rendering(images=images, depth=colors[..., 3], alpha=alphas[..., 0], meta=meta)


def _rasterize(gaussians: Gaussians, cameras: Cameras, colors: Tensor, **options: Any) -> Any:
    views, matrices = (
        torch.as_tensor(x, dtype=torch.float32, device=gaussians.means.device)
        for x in (cameras.world_to_camera, cameras.intrinsics)
    )
    return rasterization(
        gaussians.means, gaussians.quats, gaussians.scales.exp(), gaussians.opacities.sigmoid(), colors,
        views, matrices, cameras.width, cameras.height, packed=False, **options,
    )  # fmt: skip
