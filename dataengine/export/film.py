"""A moving scene in one file: Gaussians once, poses of rigid bodies, and what else changes frame by frame."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dataengine import rotations
from dataengine.cameras import Cameras
from dataengine.export.checks import check_frames
from dataengine.gaussians import PARAMETERS, Gaussians
from dataengine.storage import AnyPath, load_tensors, save_tensors

FORMAT = "gaussian film"
FIXED, TRACKED = 0, -1  # of `motion`; a number b > 0 is the pose b - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class GaussianFilm:
    """T frames of N Gaussians, where most do not move; ``film[t]`` and ``film.at(t)`` are the Gaussians of a frame.

    Attributes:
        canonical: the Gaussians at frame 0.
        motion: int64 ``[N]``: 0 never changes, b > 0 moves with pose b - 1, -1 has its numbers in `tracks`.
        poses: float64 ``[T, n, 4, 4]`` rigid motions in the world from frame 0 to frame t, metres.
        tracks: by name of a parameter that changes, ``[T, L, ..]`` of the L Gaussians of motion -1, in their order.
        fps: frames per second.
        cameras: those the scene was seen by, fixed or of T frames, or None.

    Raises:
        ValueError: shapes that do not fit each other, a pose that does not exist, an unknown parameter.
    """

    canonical: Gaussians
    motion: Tensor
    poses: Tensor
    tracks: Mapping[str, Tensor] = field(default_factory=dict)
    fps: float = 10.0
    cameras: Cameras | None = None

    def __post_init__(self) -> None:
        n, frames = len(self.canonical), len(self.poses)
        if self.poses.ndim != 4 or not frames or self.poses.shape[2:] != (4, 4):
            raise ValueError(f"poses: expected [T, n, 4, 4], got {list(self.poses.shape)}")
        if tuple(self.motion.shape) != (n,):
            raise ValueError(f"motion: expected [{n}], got {list(self.motion.shape)}")
        low, high = (int(self.motion.min()), int(self.motion.max())) if n else (0, 0)
        if low < TRACKED or high > self.poses.shape[1]:
            raise ValueError(
                f"motion: expected -1 to {self.poses.shape[1]}, the number of poses, got {low} to {high}"
            )
        loose = int((self.motion == TRACKED).sum())
        for name, track in self.tracks.items():
            if name not in PARAMETERS:
                raise ValueError(f"tracks: expected some of {', '.join(PARAMETERS)}, got {name!r}")
            wanted = (frames, loose, *getattr(self.canonical, name).shape[1:])
            if tuple(track.shape) != wanted:
                raise ValueError(f"tracks[{name!r}]: expected {list(wanted)}, got {list(track.shape)}")
        if not math.isfinite(self.fps) or self.fps <= 0:
            raise ValueError(f"fps: expected frames per second above 0, got {self.fps!r}")
        if self.cameras is not None and self.cameras.frames not in (None, frames):
            raise ValueError(
                f"cameras: expected fixed ones or {frames} frames, got {self.cameras.frames}; cut the longer one"
            )

    @classmethod
    def from_frames(
        cls,
        frames: Iterable[Gaussians],
        *,
        fps: float = 10.0,
        cameras: Cameras | None = None,
        tolerance: float = 1e-5,
    ) -> GaussianFilm:
        """Find what moves in the frames of a scene, and what of it moves as a rigid body.

        A body (`body` > 0) gets poses, from how its Gaussians turn and where they are. Those of its Gaussians that the
        poses put further than `tolerance` from their place (metres), or turn by more than that in radians, and all else
        that changes, are kept number by number. So every frame comes back exactly but for rigid bodies, which come back
        within `tolerance`; with 0 everything comes back exactly and the file is larger.

        Raises:
            ValueError: no frames, frames of different Gaussians, NaN or infinite numbers.
        """
        shots = check_frames(frames)
        first = shots[0]
        changing = _changing(shots)
        moves = torch.stack(list(changing.values())).any(0)
        motion = torch.where(moves, TRACKED, FIXED)
        poses = []
        for body in first.body[moves & (first.body > 0)].unique().tolist() if tolerance > 0 else []:
            members = (first.body == body).nonzero().squeeze(1)
            pose, near = _fit_pose(shots, members, tolerance)
            follows = members[
                near & ~(changing["scales"] | changing["opacities"] | changing["harmonics"])[members]
            ]
            if len(follows):
                poses.append(pose)
                motion[follows] = len(poses)
        loose = motion == TRACKED
        tracks = {
            name: torch.stack([getattr(shot, name)[loose] for shot in shots])
            for name, changed in changing.items()
            if (changed & loose).any()
        }
        return cls(
            canonical=first,
            motion=motion,
            poses=torch.stack(poses, 1) if poses else torch.zeros(len(shots), 0, 4, 4, dtype=torch.float64),
            tracks=tracks,
            fps=float(fps),
            cameras=cameras,
        )

    def __len__(self) -> int:
        return len(self.poses)

    def __getitem__(self, frame: int) -> Gaussians:
        if not -len(self) <= frame < len(self):
            raise IndexError(f"frame: expected 0 to {len(self) - 1}, got {frame}")
        return self.at(frame % len(self))

    def __iter__(self) -> Iterator[Gaussians]:
        return (self.at(t) for t in range(len(self)))

    def at(self, frame: int) -> Gaussians:
        """The Gaussians of a frame; exactly those of the file where they do not follow a pose."""
        changed = {name: getattr(self.canonical, name) for name in self.tracks}
        loose = (self.motion == TRACKED).nonzero().squeeze(1)
        for name, track in self.tracks.items():
            changed[name] = changed[name].index_copy(0, loose, track[frame])
        rigid = (self.motion > 0).nonzero().squeeze(1)
        if len(rigid) and frame:
            pose = self.poses[frame, self.motion[rigid] - 1]
            means, quats = _move(self.canonical[rigid], pose)
            for name, value in (("means", means), ("quats", quats)):
                whole = changed.get(name, getattr(self.canonical, name))
                changed[name] = whole.index_copy(0, rigid, value)
        return self.canonical.replace(**changed)


def write_film(path: AnyPath, film: GaussianFilm, *, half: bool = False) -> Path:
    """Write one safetensors file and return its path; ``read_film`` gives the same film back.

    Args:
        path: of the file, ending in .safetensors by custom.
        film: what to write.
        half: keep tracks as differences from frame 0 in float16, where they are finite: half the size, to three digits.

    Raises:
        OSError: a full disk.
    """
    tensors = {f"canonical.{name}": value for name, value in film.canonical.parameters().items()}
    tensors |= {"canonical.body": film.canonical.body, "motion": film.motion, "poses": film.poses}
    loose = film.motion == TRACKED
    for name, track in film.tracks.items():
        difference = (track - getattr(film.canonical, name)[loose]).half() if half else None
        if difference is not None and difference.isfinite().all():
            tensors[f"differences.{name}"] = difference
        else:
            tensors[f"tracks.{name}"] = track
    cameras = {} if film.cameras is None else {"cameras": film.cameras.to_json()}
    return save_tensors(
        path, tensors, {"format": FORMAT, "version": "1", "fps": json.dumps(film.fps)} | cameras
    )


def read_film(path: AnyPath) -> GaussianFilm:
    """Read what ``write_film`` wrote.

    Raises FileNotFoundError where there is no file, ValueError for one that is cut off, of another format, or whose
    tensors are missing (named) or do not fit each other.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a {FORMAT}, got {metadata.get('format', 'another format')!r}")
    if metadata.get("version") != "1":
        raise ValueError(f"{path}: expected version 1, got {metadata.get('version')}; update this package")
    wanted = [*(f"canonical.{name}" for name in (*PARAMETERS, "body")), "motion", "poses"]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"{path}: expected the tensors of a film, missing {', '.join(missing)}")
    try:
        canonical = Gaussians(**{name: tensors[f"canonical.{name}"] for name in (*PARAMETERS, "body")})
        motion = tensors["motion"]
        tracks = {name[7:]: value for name, value in tensors.items() if name.startswith("tracks.")}
        for name, value in tensors.items():
            if name.startswith("differences."):
                start = getattr(canonical, name[12:])[motion == TRACKED]
                tracks[name[12:]] = start + value.to(start.dtype)
        return GaussianFilm(
            canonical=canonical,
            motion=motion,
            poses=tensors["poses"],
            tracks=tracks,
            fps=float(json.loads(metadata["fps"])),
            cameras=Cameras.from_json(metadata["cameras"]) if "cameras" in metadata else None,
        )
    except (ValueError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path}: expected parts that fit each other, got {error}; write it again") from None


def as_film(
    frames: GaussianFilm | Iterable[Gaussians], fps: float | None = None, cameras: Cameras | None = None
) -> GaussianFilm:
    """`frames` as a film; the rate and the cameras of a film stay unless others are given."""
    if not isinstance(frames, GaussianFilm):
        return GaussianFilm.from_frames(frames, fps=10.0 if fps is None else fps, cameras=cameras)
    return GaussianFilm(
        canonical=frames.canonical,
        motion=frames.motion,
        poses=frames.poses,
        tracks=frames.tracks,
        fps=frames.fps if fps is None else float(fps),
        cameras=frames.cameras if cameras is None else cameras,
    )


def _changing(shots: list[Gaussians]) -> dict[str, Tensor]:
    """By parameter, which Gaussians change it after frame 0: bool ``[N]``."""
    found = {}
    for name in PARAMETERS:
        start = getattr(shots[0], name)
        changed = torch.zeros(len(start), dtype=torch.bool)
        for shot in shots[1:]:
            changed |= (getattr(shot, name) != start).reshape(len(start), -1).any(1)
        found[name] = changed
    return found


def _fit_pose(shots: list[Gaussians], members: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Rigid motions ``[T, 4, 4]`` of a body from frame 0, and which members follow them, bool ``[n]``."""
    first = shots[0][members].to(torch.float64)
    poses, near = [], torch.ones(len(members), dtype=torch.bool)
    back = F.normalize(first.quats, dim=1) * first.quats.new_tensor([1, -1, -1, -1])
    for shot in shots:
        now = shot[members].to(torch.float64)
        turns = rotations.multiply(F.normalize(now.quats, dim=1), back)
        turns = turns * torch.where(turns @ turns[0] < 0, -1.0, 1.0)[:, None]
        turn = F.normalize(turns.median(0).values, dim=0)  # a few that turn otherwise do not count
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = rotations.to_matrix(turn)
        pose[:3, 3] = (now.means - first.means @ pose[:3, :3].T).median(0).values
        if shot is shots[0]:
            pose = torch.eye(4, dtype=torch.float64)
        means, quats = _move(first, pose.expand(len(members), 4, 4))
        off = (F.normalize(quats, dim=1) * F.normalize(now.quats, dim=1)).sum(1).abs()
        angle = 2 * (1 - off.clamp(max=1).square()).sqrt()
        near &= ((means - now.means).norm(dim=1) <= tolerance) & (angle <= max(tolerance, 1e-6))
        poses.append(pose)
    return torch.stack(poses), near


def _move(gaussians: Gaussians, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Means and rotations of Gaussians after rigid motions ``[N, 4, 4]``, one each, in their own dtype."""
    means = torch.einsum("nij,nj->ni", pose[:, :3, :3], gaussians.means.double()) + pose[:, :3, 3]
    turn = rotations.from_matrix(pose[:, :3, :3])
    quats = rotations.multiply(turn, gaussians.quats.double())
    return means.to(gaussians.means.dtype), quats.to(gaussians.quats.dtype)
