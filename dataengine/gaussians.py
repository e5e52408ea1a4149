"""Gaussians: what a scene is made of, at one moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

STATIC, LOOSE = 0, -1  # of `body`: what never moves, and what moves in a way of its own
SH0 = 0.28209479177387814  # the spherical harmonic of degree 0: a colour is 0.5 + SH0 * coefficient
PARAMETERS = ("means", "quats", "scales", "opacities", "harmonics")


@dataclass(frozen=True, eq=False, kw_only=True)
class Gaussians:
    """N Gaussians, parametrised as 3D Gaussian Splatting does (Kerbl et al. 2023, arXiv 2308.04079), so that every number
    is a free one.

    Attributes:
        means: ``[N, 3]`` metres in the world.
        quats: ``[N, 4]`` rotations, wxyz, of any length.
        scales: ``[N, 3]`` natural logarithms of the standard deviations in metres.
        opacities: ``[N]`` logits.
        harmonics: ``[N, K, 3]`` spherical harmonics of the colour, K = (degree + 1) ** 2.
        body: int64 ``[N]``: 0 static, b > 0 the rigid body b - 1 of the scene, -1 moves in a way of its own.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    harmonics: Tensor
    body: Tensor

    def __post_init__(self) -> None:
        n = len(self.means)
        wanted = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,), "body": (n,)}
        for name, shape in wanted.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name}: expected shape {list(shape)}, got {list(found)}")
        if self.harmonics.ndim != 3 or tuple(self.harmonics.shape[::2]) != (n, 3):
            raise ValueError(f"harmonics: expected shape [{n}, K, 3], got {list(self.harmonics.shape)}")
        if self.harmonics.shape[1] not in (1, 4, 9, 16):
            raise ValueError(f"harmonics: expected 1, 4, 9 or 16 coefficients, got {self.harmonics.shape[1]}")

    @classmethod
    def from_points(
        cls,
        points: Tensor,
        colors: Tensor,
        size: float | Tensor,
        *,
        body: Tensor | None = None,
        opacity: float = 0.9,
        degree: int = 0,
    ) -> Gaussians:
        """Round Gaussians at `points` [N, 3] metres, of `colors` [N, 3] in [0, 1] and standard deviation `size` (a number
        or [N], metres)."""
        n, device = len(points), points.device
        sizes = torch.as_tensor(size, dtype=points.dtype, device=device).expand(n)
        harmonics = points.new_zeros(n, (degree + 1) ** 2, 3)
        harmonics[:, 0] = (colors - 0.5) / SH0
        return cls(
            means=points.clone(),
            quats=torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=points.dtype, device=device).repeat(n, 1),
            scales=sizes.log()[:, None].repeat(1, 3),
            opacities=points.new_full((n,), opacity).logit(),
            harmonics=harmonics,
            body=points.new_zeros(n, dtype=torch.long) if body is None else body.long(),
        )

    @classmethod
    def cat(cls, parts: Sequence[Gaussians]) -> Gaussians:
        """All of them in a row; ValueError where there are none or their degrees differ."""
        if not parts or len({part.degree for part in parts}) > 1:
            degrees = [part.degree for part in parts]
            raise ValueError(f"parts: expected Gaussians of one degree of harmonics, got degrees {degrees}")
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def __len__(self) -> int:
        return len(self.means)

    @property
    def degree(self) -> int:
        """Of the spherical harmonics: 0 to 3."""
        return int(self.harmonics.shape[1] ** 0.5) - 1

    @property
    def colors(self) -> Tensor:
        """The colour without its dependence on direction, ``[N, 3]``; 0 to 1 where the Gaussians were fitted well."""
        return 0.5 + SH0 * self.harmonics[:, 0]

    def parameters(self) -> dict[str, Tensor]:
        """The free numbers by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def __getitem__(self, index: Any) -> Gaussians:
        """Those of a mask, of indices or of a slice, in that order."""
        return Gaussians(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def replace(self, **changes: Tensor) -> Gaussians:
        return replace(self, **changes)

    def to(self, *arguments: Any) -> Gaussians:
        """On another device, or in another floating dtype (`body` stays int64)."""
        moved = {name: value.to(*arguments) for name, value in self.parameters().items()}
        return Gaussians(**moved, body=self.body.to(moved["means"].device))

    def detach(self) -> Gaussians:
        return Gaussians(
            **{name: value.detach() for name, value in self.parameters().items()}, body=self.body
        )
