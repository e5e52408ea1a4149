"""Gaussian splatting: forward, and forward with backward, by image size and number of Gaussians.

    python -m benchmarks.speed.rasterize [--device cuda]

One view, one thread, float32, three channels, every gradient. Beside the rasteriser that suits the device stands the same
arithmetic in plain torch, tile by tile, and on a GPU our own on the CPU. Writes `speed/rasterize.json`, after every row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.results_io import write_result
from benchmarks.speed.timing import take_turns
from dataengine.rasterize import rasterization, reference
from dataengine.rasterize.steps import Settings

Render = Callable[..., Tensor]
TILE = 16
CHECKED = 2000  # Gaussians at which all are compared with the definition in float64


@dataclass(frozen=True, kw_only=True)
class Rasterize:
    """Which image sides and numbers of Gaussians; `repeats` rounds in which the candidates take turns. `tiled_limit`: the
    torch tiles are left out where side ** 2 times Gaussians is more."""

    sides: tuple[int, ...] = (64, 128, 256)
    gaussians: tuple[int, ...] = (2_000, 10_000, 50_000)
    repeats: int = 3
    tiled_limit: float = 1e9
    device: str = "cpu"
    case: str = "speed/rasterize"


def draw(n: int, side: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """n Gaussians of 1 to 3 cm in a box of 1 m, 2 m before a camera in whose image the box is 4/5 wide."""
    generator = torch.Generator().manual_seed(n)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    view = torch.eye(4, dtype=torch.float64)
    view[2, 3] = 2.0
    focal = 1.6 * side
    scene = {
        "means": uniform(-0.5, 0.5, n, 3),
        "quats": torch.randn(n, 4, generator=generator, dtype=torch.float64),
        "scales": uniform(0.01, 0.03, n, 3),
        "opacities": uniform(0.05, 0.95, n),
        "colors": uniform(0, 1, n, 3),
        "viewmats": view[None],
        "Ks": torch.tensor([[[focal, 0, side / 2], [0, focal, side / 2], [0, 0, 1]]]).double(),
    }
    tensors: dict[str, Any] = {name: x.to(device, dtype) for name, x in scene.items()}
    return tensors | {"width": side, "height": side}


def ours(**scene: Any) -> Tensor:
    return rasterization(**scene, packed=False)[0]


def tiled(
    *, colors: Tensor, width: int, height: int, viewmats: Tensor, Ks: Tensor, **shape: Tensor
) -> Tensor:
    """The same in plain torch with autograd, one tile after the other, each with the Gaussians that reach it."""
    settings = Settings(
        width=width, height=height, near=0.01, far=1e10, radius_clip=0.0, eps2d=0.3, antialiased=False,
        absgrad=False, mode="RGB", packed=False, tile_size=TILE,
    )  # fmt: skip
    means, quats, scales, opacities = (x[None] for x in shape.values())
    seen = reference.project(settings, means, quats, scales, None, opacities, viewmats[None], Ks[None])
    order = seen.depths[0, 0].detach().argsort(stable=True)
    order = order[(seen.radii[0, 0, order] > 0).all(-1)]
    centres, conics = seen.means2d[0, 0, order], seen.conics[0, 0, order]
    opaque, colors = opacities[0, order], colors[order]
    low = ((centres - seen.radii[0, 0, order]).detach() / TILE).floor()
    high = ((centres + seen.radii[0, 0, order]).detach() / TILE).floor()
    across = torch.arange(TILE, device=means.device) + 0.5
    rows = []
    for y in range(-(-height // TILE)):
        row = []
        for x in range(-(-width // TILE)):
            place = torch.tensor([x, y], device=means.device)
            index = ((low <= place) & (high >= place)).all(-1).nonzero()[:, 0]
            pixels = torch.stack(torch.meshgrid(across + x * TILE, across + y * TILE, indexing="xy"), -1)
            row.append(
                _tile(pixels.view(-1, 1, 2), centres[index], conics[index], opaque[index], colors[index])
            )
        rows.append(torch.cat([tile.view(TILE, TILE, -1) for tile in row], 1))
    return torch.cat(rows)[None, :height, :width]


def _tile(pixels: Tensor, centres: Tensor, conics: Tensor, opaque: Tensor, colors: Tensor) -> Tensor:
    dx, dy = (centres - pixels).unbind(-1)
    a, b, c = conics.unbind(-1)
    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    alpha = (opaque * torch.exp(-sigma)).clamp(max=reference.MOST)
    alpha = torch.where((sigma >= 0) & (alpha >= reference.THRESHOLD), alpha, 0.0)
    left = (1 - alpha).cumprod(-1)
    weights = torch.where(left > reference.STOP, alpha, 0.0) * torch.nn.functional.pad(
        left[:, :-1], (1, 0), value=1.0
    )
    return weights @ colors


def train(render: Render, scene: dict[str, Any]) -> dict[str, Tensor]:
    """The image and the gradients of its product with fixed weights."""
    leaves = {k: x.detach().requires_grad_() for k, x in scene.items() if k in PARAMETERS}
    image = render(**(scene | leaves))
    image.backward(torch.linspace(-1, 1, image.numel(), device=image.device).to(image.dtype).view_as(image))
    return {"image": image.detach()} | {f"d {k}": x.grad for k, x in leaves.items() if x.grad is not None}


PARAMETERS = ("means", "quats", "scales", "opacities", "colors")


def errors(settings: Rasterize) -> dict[str, dict[str, float]]:
    """Largest difference to the definition in float64, of gradients relative to the largest, at the smallest image."""
    n, side = min(CHECKED, *settings.gaussians), min(settings.sides)
    exact = train(
        lambda **scene: rasterization(**scene, implementation="reference")[0],
        draw(n, side, settings.device, torch.float64),
    )
    found = {}
    for name, render in {"ours": ours, "tiled": tiled}.items():
        got = train(render, draw(n, side, settings.device))
        found[name] = {
            key: float((got[key].double() - true).abs().max() / (1 if key == "image" else true.abs().max()))
            for key, true in exact.items()
        }
    return found


def compare(settings: Rasterize, side: int, n: int) -> dict[str, float]:
    """Milliseconds of all, and how many times faster ours is; backward is training less forward."""
    scene = draw(n, side, settings.device)
    candidates: dict[str, tuple[Render, dict[str, Any]]] = {"ours": (ours, scene)}
    if side**2 * n <= settings.tiled_limit:
        candidates["tiled"] = tiled, scene
    if torch.device(settings.device).type != "cpu":
        candidates["cpu"] = ours, draw(n, side)
    calls: dict[str, Callable[[], object]] = {}
    for name, (render, inputs) in candidates.items():
        leaves = {k: x.detach().requires_grad_() for k, x in inputs.items() if k in PARAMETERS}
        calls[f"{name}_forward_ms"] = partial(render, **(inputs | leaves))
        calls[f"{name}_training_ms"] = partial(train, render, inputs)
    row = take_turns(calls, settings.repeats, settings.device)
    for name in candidates:
        row[f"{name}_backward_ms"] = row[f"{name}_training_ms"] - row[f"{name}_forward_ms"]
        if name != "ours":
            for part in ("forward", "training"):
                row[f"{part}_over_{name}"] = row[f"{name}_{part}_ms"] / row[f"ours_{part}_ms"]
    return row


def growth(rows: dict[str, dict[str, float]], settings: Rasterize) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of training as lists, for plots: by Gaussians at the middle side, by pixels at the middle number."""
    side, n = (sorted(sizes)[len(sizes) // 2] for sizes in (settings.sides, settings.gaussians))

    def listed(sizes: Sequence[int], keys: Sequence[str]) -> dict[str, list[float]]:
        names = [name for name in rows[keys[0]] if name.endswith("training_ms")]
        return {"size": [float(size) for size in sizes]} | {
            name: [rows[key][name] for key in keys if name in rows[key]] for name in names
        }

    return {
        f"gaussians at side {side}": listed(settings.gaussians, [f"{side} {k}" for k in settings.gaussians]),
        f"pixels at {n} gaussians": listed(
            [s * s for s in settings.sides], [f"{s} {n}" for s in settings.sides]
        ),
    }


def main(settings: Rasterize) -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), {}
    values: dict[str, Any] = {"errors": errors(settings), "rows": rows}
    print(values["errors"])
    path = None
    for side in settings.sides:
        for n in settings.gaussians:
            row = rows[f"{side} {n}"] = compare(settings, side, n)
            print(f"{side:4} px {n:6} Gaussians: {describe(row)}", flush=True)
            if len(rows) == len(settings.sides) * len(settings.gaussians):
                values["growth"] = growth(rows, settings)
            path = write_result(
                settings.case, values, seconds=time.perf_counter() - began, device=settings.device
            )
    print(path)


def describe(row: dict[str, float]) -> str:
    """One row in words."""
    parts = [f"forward {row['ours_forward_ms']:.1f} ms, backward {row['ours_backward_ms']:.1f} ms"]
    parts += [
        f"{row[f'forward_over_{name}']:.0f}x and with backward {row[f'training_over_{name}']:.0f}x {name}"
        for name in ("tiled", "cpu")
        if f"forward_over_{name}" in row
    ]
    return "; ".join(parts)


if __name__ == "__main__":
    main(tyro.cli(Rasterize))
