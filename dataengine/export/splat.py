"""The .splat files of antimatter15/splat and the web viewers that took over its layout.

32 bytes a Gaussian: position and standard deviations as six little-endian float32, then as bytes red, green, blue and
opacity, and the unit rotation wxyz as 128 + 128 q. Without harmonics above degree 0, largest Gaussians first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from dataengine.export.checks import check_finite
from dataengine.gaussians import SH0, Gaussians
from dataengine.storage import AnyPath, atomic_write

_ROW = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("color", "u1", 4), ("quat", "u1", 4)])
_SMALLEST = 1e-12  # metres, so that a logarithm stays finite


def write_splat(path: AnyPath, gaussians: Gaussians) -> Path:
    """Write Gaussians by volume times opacity, largest first, as such viewers show a file while it loads.

    Colours lose their dependence on direction; colours, opacities and rotations have 8 bits. Raises ValueError for NaN
    or infinite numbers, OSError on a full disk.
    """
    gaussians = check_finite(gaussians, "gaussians")
    opacities = gaussians.opacities.double().sigmoid()
    weight = opacities.log() + gaussians.scales.double().sum(1)
    gaussians = gaussians[weight.argsort(descending=True, stable=True)]
    table = np.zeros(len(gaussians), _ROW)
    table["mean"] = gaussians.means.numpy()
    table["scale"] = gaussians.scales.double().exp().clamp_min(_SMALLEST).numpy()
    shades = torch.cat([gaussians.colors.double(), gaussians.opacities.double().sigmoid()[:, None]], 1)
    table["color"] = (shades.clamp(0, 1) * 255).round().numpy()
    unit = F.normalize(gaussians.quats.double(), dim=1)
    table["quat"] = (unit * 128 + 128).round().clamp(0, 255).numpy()
    with atomic_write(path) as temporary:
        table.tofile(temporary)
    return Path(path)


def read_splat(path: AnyPath) -> Gaussians:
    """The Gaussians of a .splat file in its order, degree 0, everything static, float32.

    Raises FileNotFoundError where there is none, ValueError for a file of another format or a part of one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a .splat file, found none; check the path")
    content = path.read_bytes()
    if len(content) % _ROW.itemsize:
        raise ValueError(
            f"{path}: expected a multiple of {_ROW.itemsize} bytes, got {len(content)}; it is cut off or no .splat file"
        )
    table = np.frombuffer(content, _ROW)
    if (
        not (np.isfinite(table["mean"]).all() and np.isfinite(table["scale"]).all())
        or (table["scale"] < 0).any()
    ):
        raise ValueError(f"{path}: expected finite positions and sizes, got others; it is no .splat file")
    color = torch.from_numpy(table["color"].astype(np.float32)) / 255
    opacity = color[:, 3].clamp(0.5 / 255, 1 - 0.5 / 255)  # the ends of the bytes 0 and 255
    quats = torch.from_numpy((table["quat"].astype(np.float32) - 128) / 128)
    empty = quats.square().sum(1, keepdim=True) == 0
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0])
    return Gaussians(
        means=torch.from_numpy(table["mean"].copy()),
        quats=F.normalize(torch.where(empty, identity, quats), dim=1),
        scales=torch.from_numpy(table["scale"].clip(_SMALLEST)).log(),
        opacities=opacity.logit(),
        harmonics=((color[:, :3] - 0.5) / SH0)[:, None],
        body=torch.zeros(len(table), dtype=torch.long),
    )
