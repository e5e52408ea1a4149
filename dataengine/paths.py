"""Motion by formula: none, that of rigid bodies, and polynomials of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataengine import rotations
from dataengine.gaussians import LOOSE, Gaussians


@dataclass(frozen=True, eq=False, kw_only=True)
class Course:
    """Where Gaussians are at every frame, as far as something else than the fit knows.

    Attributes:
        shifts: ``[T, N, 3]`` metres from where they are at frame 0.
        turns: ``[T, N, 4]`` since frame 0, quaternions.
    """

    shifts: Tensor
    turns: Tensor

    @classmethod
    def of(cls, motion: Motion, gaussians: Gaussians, frames: int) -> Course:
        """The course of `gaussians` under a motion that gives them no numbers of their own."""
        there = [motion(gaussians, {}, frame) for frame in range(frames)]
        back = gaussians.quats * gaussians.quats.new_tensor([1, -1, -1, -1])
        return cls(
            shifts=torch.stack([g.means - gaussians.means for g in there]),
            turns=torch.stack([rotations.multiply(g.quats, back) for g in there]),
        )


class Motion(nn.Module):
    """Poses Gaussians at a frame; this one leaves them where they are.

    `start` gives the numbers that every Gaussian has of its own, as parameters of the scene beside those of the
    Gaussians, so that densification copies and drops them alike. `penalty` is what a fit adds to its loss.
    """

    name = "static"

    def start(self, gaussians: Gaussians, born: Tensor) -> dict[str, Tensor]:
        """Initial parameters ``[N, ..]`` by name, of Gaussians that were seen at frames `born` ``[N]``."""
        return {}

    def forward(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Gaussians:
        return gaussians

    def penalty(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Tensor:
        return gaussians.means.new_zeros(())

    def follow(self, gaussians: Gaussians, own: Mapping[str, Tensor], course: Course) -> None:
        """Begin, in place, with loose Gaussians on their `course`; this motion and those of a formula do not."""

    def settings(self) -> dict[str, Any]:
        """What `restore_motion` needs beside the tensors, as JSON."""
        return {}


class Rigid(Motion):
    """Every body b moves as one: mean(t) = R(t) R(0)^T (mean - p(0)) + p(t), and turns alike.

    Args:
        poses: ``[T, n, 4, 4]`` body to world, metres; Gaussians lie where the bodies are at frame 0.
        learn: correct every pose but those of frame 0 by a small rigid motion of its own.
        smoothness: weight of the squared acceleration of the corrections (metres and radians per frame squared).
    """

    name = "rigid"
    poses: Tensor

    def __init__(self, poses: Tensor, *, learn: bool = False, smoothness: float = 1e-2):
        super().__init__()
        if poses.ndim != 4 or poses.shape[-2:] != (4, 4):
            raise ValueError(f"poses: expected [T, n, 4, 4], got {list(poses.shape)}")
        self.register_buffer("poses", poses.float())
        shape = (len(poses) - 1, poses.shape[1], 6)
        self.correction = nn.Parameter(torch.zeros(shape), requires_grad=learn)
        self.smoothness = smoothness

    def settings(self) -> dict[str, Any]:
        return {"learn": self.correction.requires_grad, "smoothness": self.smoothness}

    def pose(self, frame: int) -> tuple[Tensor, Tensor]:
        """Rotations as quaternions ``[n, 4]`` and positions ``[n, 3]`` of the bodies, corrected."""
        quats = rotations.from_matrix(self.poses[frame, :, :3, :3])
        positions = self.poses[frame, :, :3, 3]
        if frame == 0:
            return quats, positions
        shift, turn = self.correction[frame - 1].split(3, -1)
        return rotations.multiply(rotations.from_vector(turn), quats), positions + shift

    def forward(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Gaussians:
        moved = (gaussians.body > 0).nonzero().squeeze(-1)
        if frame == 0 or not len(moved):
            return gaussians
        (q0, p0), (q1, p1) = self.pose(0), self.pose(frame)
        body = gaussians.body[moved] - 1
        turn = rotations.multiply(q1, q0 * q0.new_tensor([1, -1, -1, -1]))
        local = gaussians.means[moved] - p0.index_select(0, body)
        means = torch.einsum(
            "nij,nj->ni", rotations.to_matrix(turn).index_select(0, body), local
        ) + p1.index_select(0, body)
        quats = rotations.multiply(turn.index_select(0, body), gaussians.quats[moved])
        return gaussians.replace(
            means=gaussians.means.index_copy(0, moved, means),
            quats=gaussians.quats.index_copy(0, moved, quats),
        )

    def penalty(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Tensor:
        if not self.correction.requires_grad or len(self.correction) < 2:
            return super().penalty(gaussians, own, frame)
        path = torch.cat([self.correction.new_zeros(1, *self.correction.shape[1:]), self.correction])
        return self.smoothness * path.diff(n=2, dim=0).square().sum(-1).mean()


class Polynomial(Motion):
    """Loose Gaussians on a cubic path of time, each alive around the frame at which it was seen.

    mean(t) = mean + sum over k <= degree of b_k (t - tau)^k, turned by omega (t - tau), with the opacity times
    exp(-((t - tau) / s)^2): the motion of SpacetimeGaussians (Li et al. 2023, arXiv 2312.16812, eq. 6-9). t in frames
    over `frames`. tau is fixed, b, omega and s are learned.

    Args:
        frames: T of the scene.
        lifetime: initial s in frames.
        speed: weight of the mean squared displacement over one frame, in pixels of 1 cm.
    """

    name = "polynomial"

    def __init__(self, frames: int, *, degree: int = 3, lifetime: float = 0.4, speed: float = 1e-3):
        super().__init__()
        self.frames, self.degree, self.lifetime, self.speed = frames, degree, lifetime, speed

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("frames", "degree", "lifetime", "speed")}

    def start(self, gaussians: Gaussians, born: Tensor) -> dict[str, Tensor]:
        n, zeros = len(gaussians), gaussians.means.new_zeros
        return {
            "path": zeros(n, self.degree, 3),
            "turn": zeros(n, 3),
            "life": torch.full_like(gaussians.opacities, self.lifetime).log(),
            "born": born.to(gaussians.means.dtype),
        }

    def forward(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Gaussians:
        loose = (gaussians.body == LOOSE).nonzero().squeeze(-1)
        if not len(loose):
            return gaussians
        passed = frame - own["born"][loose]
        powers = torch.stack([(passed / self.frames) ** (k + 1) for k in range(self.degree)], -1)
        shift = torch.einsum("nk,nkj->nj", powers, own["path"][loose])
        turn = rotations.from_vector(own["turn"][loose] * (passed / self.frames)[:, None])
        alive = F.logsigmoid(gaussians.opacities[loose]) - (passed / own["life"][loose].exp()).square()
        return gaussians.replace(
            means=gaussians.means.index_add(0, loose, shift),
            quats=gaussians.quats.index_copy(0, loose, rotations.multiply(turn, gaussians.quats[loose])),
            opacities=gaussians.opacities.index_copy(0, loose, _logit_of_log(alive)),
        )

    def penalty(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Tensor:
        loose = gaussians.body == LOOSE
        if not loose.any():
            return super().penalty(gaussians, own, frame)
        return self.speed * (own["path"][loose][:, 0] / self.frames / 0.01).square().sum(-1).mean()


def _logit_of_log(log: Tensor) -> Tensor:
    """logit(p) of log p, finite however small p is."""
    log = log.clamp(-40.0, -1e-6)
    return log - torch.log(-torch.expm1(log))
