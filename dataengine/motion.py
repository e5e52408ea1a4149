"""How Gaussians move: each model poses the canonical Gaussians of a scene at a frame.

A model moves only what is its own: rigid bodies (`body` > 0) or loose Gaussians (`body` -1). Static ones never move, or a
few views would let motion explain what is a matter of shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataengine import rotations
from dataengine.errors import closest
from dataengine.gaussians import LOOSE, Gaussians
from dataengine.paths import Course, Motion, Polynomial, Rigid

PLANES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # of x, y, z, t


class HexPlane(Motion):
    """Loose Gaussians displaced by a small field of space and time.

    Features are the product of what six planes (xy xz yz xt yt zt) hold at the place, at two resolutions; a small
    network turns them into a shift, a turn and a change of size (Cao and Johnson 2023, arXiv 2301.09632; its use for
    Gaussians: Wu et al. 2023, arXiv 2310.08528).

    Args:
        low, high: ``[3]`` box of the loose Gaussians, metres.
        frames: T of the scene.
        resolution: cells of a side of the coarser planes; time has one cell for every two frames.
        channels, width: of the planes and of the network.
        smoothness: weight of the squared second difference of the planes along time, and of the first in space.
    """

    name = "hexplane"
    LESSONS, PUPILS, LESSON_RATE = 600, 2048, 5e-3  # steps, Gaussians of one, learning rate: some seconds
    low: Tensor
    high: Tensor

    def __init__(
        self, low: Tensor, high: Tensor, frames: int, *, resolution: int = 16, channels: int = 16, width: int = 64,
        smoothness: float = 1e-3, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self._settings = {
            "frames": frames, "resolution": resolution, "channels": channels, "width": width, "smoothness": smoothness,
            "seed": seed,
        }  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        margin = 0.1 * (high - low).clamp_min(0.05)
        self.register_buffer("low", (low - margin).float())
        self.register_buffer("high", (high + margin).float())
        self.frames, self.smoothness = frames, smoothness
        steps = max(2, frames // 2)
        self.planes = nn.ParameterList()
        for scale in (1, 2):
            sides = (resolution * scale,) * 3 + (steps * scale,)
            for a, b in PLANES:
                shape = (1, channels, sides[b], sides[a])
                # Planes of time start at one: at first nothing moves.
                start = torch.ones(shape) if b == 3 else 0.1 + 0.4 * torch.rand(shape, generator=generator)
                self.planes.append(nn.Parameter(start))
        layers = [nn.Linear(2 * channels, width), nn.Linear(width, width), nn.Linear(width, 9)]
        # Not ReLU: the features are small and positive, so it begins on one side of its kink, and may die there.
        self.net = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        for layer in layers:
            bound = layer.in_features**-0.5
            layer.weight.data.uniform_(-bound, bound, generator=generator)
            layer.bias.data.zero_()
        layers[-1].weight.data.mul_(0.01)

    def settings(self) -> dict[str, Any]:
        return self._settings

    def forward(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Gaussians:
        loose = (gaussians.body == LOOSE).nonzero().squeeze(-1)
        if not len(loose):
            return gaussians
        shift, turn, grow = self._change(gaussians.means[loose], frame)
        turned = rotations.multiply(rotations.from_vector(turn), gaussians.quats[loose])
        return gaussians.replace(
            means=gaussians.means.index_add(0, loose, shift),
            quats=gaussians.quats.index_copy(0, loose, turned),
            scales=gaussians.scales.index_add(0, loose, grow),
        )

    @torch.enable_grad()
    def follow(self, gaussians: Gaussians, own: Mapping[str, Tensor], course: Course) -> None:
        """Taught the course by example before anything is rendered: a displacement of more than a Gaussian's own size has
        no gradient in a picture."""
        loose = (gaussians.body == LOOSE).nonzero().squeeze(-1)
        if not len(loose):
            return
        means, shifts = gaussians.means.detach()[loose], course.shifts[:, loose]
        turns = rotations.unwrap(rotations.to_vector(course.turns[:, loose]))
        far = shifts.square().mean().sqrt().clamp_min(1e-6)
        optimizer = torch.optim.Adam(self.parameters(), lr=self.LESSON_RATE)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.LESSONS)
        generator = torch.Generator().manual_seed(self._settings["seed"])
        for _ in range(self.LESSONS):
            frame, one = (torch.randint(n, (self.PUPILS,), generator=generator) for n in shifts.shape[:2])
            shift, turn, grow = self._change(means[one], frame[:, None])
            wrong = (shift - shifts[frame, one]) / far, turn - turns[frame, one], grow
            loss = torch.stack([x.square().mean() for x in wrong]).sum() + self.penalty(gaussians, own, 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()

    def _change(self, means: Tensor, frame: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shift in metres, rotation vector and change of the logarithmic scales, ``[n, 3]`` each, at places ``[n, 3]`` and
        a frame, or one of each ``[n, 1]``."""
        return self.net(self._features(means, frame)).split(3, -1)

    def _features(self, means: Tensor, frame: int | Tensor) -> Tensor:
        place = 2 * (means.detach() - self.low) / (self.high - self.low) - 1
        time = place.new_zeros(len(place), 1) + 2 * frame / max(1, self.frames - 1) - 1
        at = torch.cat([place, time], -1)
        found = []
        for scale in range(2):
            product: Any = 1.0
            for plane, (a, b) in zip(self.planes[6 * scale : 6 * scale + 6], PLANES, strict=True):
                grid = at[:, (a, b)].view(1, 1, -1, 2)
                product = (
                    product * F.grid_sample(plane, grid, align_corners=True, padding_mode="border")[0, :, 0]
                )
            found.append(product)
        return torch.cat(found).T

    def penalty(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Tensor:
        total = gaussians.means.new_zeros(())
        for index, plane in enumerate(self.planes):
            if PLANES[index % 6][1] == 3:
                total = total + plane.diff(n=2, dim=2).square().mean() if plane.shape[2] > 2 else total
            else:
                total = total + plane.diff(dim=2).square().mean() + plane.diff(dim=3).square().mean()
        return self.smoothness * total


class Tracked(Motion):
    """Loose Gaussians with a place and a turn of their own at every frame, held together by their neighbours.

    Rigidity as in Dynamic 3D Gaussians (Luiten et al. 2023, arXiv 2308.09713, eq. 8): what lies beside a Gaussian keeps
    its place in the Gaussian's own axes from one frame to the next.

    Args:
        frames: T of the scene.
        neighbours: how many nearest Gaussians count.
        rigidity: weight of that loss, in squared centimetres.
    """

    name = "tracked"

    def __init__(self, frames: int, *, neighbours: int = 8, rigidity: float = 0.5):
        super().__init__()
        self.frames, self.neighbours, self.rigidity = frames, neighbours, rigidity
        self._found: tuple[Tensor, Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("frames", "neighbours", "rigidity")}

    def start(self, gaussians: Gaussians, born: Tensor) -> dict[str, Tensor]:
        n = len(gaussians)
        return {
            "steps": gaussians.means.new_zeros(n, self.frames - 1, 6),
            "home": gaussians.means.detach().clone(),
        }

    def forward(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Gaussians:
        loose = (gaussians.body == LOOSE).nonzero().squeeze(-1)
        if frame == 0 or not len(loose):
            return gaussians
        shift, turn = own["steps"][loose, frame - 1].split(3, -1)
        turned = rotations.multiply(rotations.from_vector(turn), gaussians.quats[loose])
        return gaussians.replace(
            means=gaussians.means.index_add(0, loose, shift),
            quats=gaussians.quats.index_copy(0, loose, turned),
        )

    @torch.no_grad()
    def follow(self, gaussians: Gaussians, own: Mapping[str, Tensor], course: Course) -> None:
        steps = torch.cat([course.shifts, rotations.to_vector(course.turns)], -1)[1:].movedim(0, 1)
        own["steps"].copy_(torch.where((gaussians.body == LOOSE)[:, None, None], steps, own["steps"]))

    def penalty(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Tensor:
        loose = (gaussians.body == LOOSE).nonzero().squeeze(-1)
        if frame == 0 or len(loose) < 2:
            return super().penalty(gaussians, own, frame)
        near = self._neighbours(own["home"][loose])
        now, before = (self(gaussians, own, f) for f in (frame, frame - 1))
        turn = rotations.to_matrix(
            rotations.multiply(
                F.normalize(before.quats[loose], dim=-1),
                F.normalize(now.quats[loose], dim=-1) * now.quats.new_tensor([1, -1, -1, -1]),
            )
        )
        gap_now, gap_before = (x.means[loose][near] - x.means[loose][:, None] for x in (now, before))
        stretched = torch.einsum("nij,nkj->nki", turn, gap_now) - gap_before
        return self.rigidity * (stretched / 0.01).square().sum(-1).mean()

    def _neighbours(self, home: Tensor) -> Tensor:
        """Indices ``[n, k]`` of the others that were nearest where the Gaussians began, found once for the same ones."""
        if self._found is None or not torch.equal(self._found[0], home):
            k = min(self.neighbours, len(home) - 1)
            rows = [torch.cdist(part, home).topk(k + 1, largest=False).indices for part in home.split(1024)]
            self._found = home.detach().clone(), torch.cat(rows)[:, 1:]
        return self._found[1]


class Together(Motion):
    """Rigid bodies by one model and everything loose by another."""

    name = "together"

    def __init__(self, *parts: Motion):
        super().__init__()
        self.parts: Sequence[Motion] = nn.ModuleList(parts)  # type: ignore[assignment]

    def settings(self) -> dict[str, Any]:
        return {"parts": [describe_motion(part) for part in self.parts]}

    def start(self, gaussians: Gaussians, born: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found |= part.start(gaussians, born)
        return found

    def forward(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Gaussians:
        for part in self.parts:
            gaussians = part(gaussians, own, frame)
        return gaussians

    def penalty(self, gaussians: Gaussians, own: Mapping[str, Tensor], frame: int) -> Tensor:
        return torch.stack([part.penalty(gaussians, own, frame) for part in self.parts]).sum()


GENERIC: dict[str, Callable[[Gaussians, int], Motion]] = {
    "static": lambda gaussians, frames: Motion(),
    "polynomial": lambda gaussians, frames: Polynomial(frames),
    "hexplane": lambda gaussians, frames: HexPlane(*_box(gaussians), frames),
    "tracked": lambda gaussians, frames: Tracked(frames),
}
MODELS = ("rigid", "bodies", *GENERIC)
FOLLOWING = ("hexplane", "tracked")  # those that begin best on a course that tracking found


def _box(gaussians: Gaussians) -> tuple[Tensor, Tensor]:
    loose = gaussians.means[gaussians.body == LOOSE]
    loose = loose if len(loose) else gaussians.means
    return loose.amin(0).detach(), loose.amax(0).detach()


def check_model(name: str, *more: str) -> None:
    """Raise ValueError, which names the closest, unless `name` is one of :data:`MODELS` or `more`."""
    known = (*more, *MODELS)
    if name not in known:
        raise ValueError(f"motion: expected one of {', '.join(known)}, got {name!r}; {closest(name, known)}")


def make_motion(
    name: str, gaussians: Gaussians, frames: int, poses: Tensor | None = None, *, learn: bool = False
) -> Motion:
    """The model `name` of :data:`MODELS` for such Gaussians over `frames` frames; `rigid` and `bodies` need `poses`
    [T, n, 4, 4], which `rigid` corrects where it may `learn` and `bodies`, whose poses were only guessed, always.

    Raises ValueError for an unknown name (the closest is given) and for a rigid model without poses.
    """
    check_model(name)
    if name in GENERIC:
        return GENERIC[name](gaussians, frames)
    if poses is None:
        raise ValueError(
            f"motion: expected poses of the bodies for {name}, got none; use hexplane or polynomial"
        )
    if name == "bodies":
        return Together(Rigid(poses, learn=True), Polynomial(frames))
    return Rigid(poses, learn=learn)


def describe_motion(motion: Motion) -> dict[str, Any]:
    """A model's name and settings as JSON."""
    return {"name": motion.name, **motion.settings()}


def restore_motion(
    described: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "motion."
) -> Motion:
    """The model that `describe_motion` described, whose state is to be loaded from `tensors` afterwards."""
    settings = {key: value for key, value in described.items() if key != "name"}
    name = described["name"]
    if name == "together":
        parts = enumerate(settings["parts"])
        return Together(*(restore_motion(part, tensors, f"{prefix}parts.{i}.") for i, part in parts))
    if name == "rigid":
        return Rigid(tensors[f"{prefix}poses"], **settings)
    if name == "hexplane":
        return HexPlane(tensors[f"{prefix}low"], tensors[f"{prefix}high"], **settings)
    plain = {"static": Motion, "polynomial": Polynomial, "tracked": Tracked}
    if name not in plain:
        raise ValueError(f"motion: expected one of {', '.join((*MODELS, 'together'))}, got {name!r}")
    return plain[name](**settings)
