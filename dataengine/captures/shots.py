"""One record per picture of a capture, and how they become views: names, moments, poses checked one by one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from dataengine.cameras import RIGID_TOLERANCE, Cameras
from dataengine.captures import pictures
from dataengine.captures.geometry import OPENGL, better_axes, focus_score, score_axes, to_opencv
from dataengine.views import Views

Frames = Literal["equal", "common"]


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture as the files of a capture describe it.

    Attributes:
        label: its name in the capture, for errors.
        image: its file.
        pose: ``[4, 4]``, written however the capture writes it until :func:`orient`.
        intrinsics: ``[3, 3]`` pixels of a picture of `size`.
        size: (width, height) that the intrinsics are for.
        distortion: k1, k2, p1, p2 and perhaps k3 of OpenCV's model.
        view, moment: camera and time, once known.
        depth, mask, segmentation: files, or None.
        provenance: index into :data:`dataengine.episodes.PROVENANCE_LEGEND`.
    """

    label: str
    image: Path
    pose: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    size: tuple[int, int]
    distortion: tuple[float, ...] = ()
    view: str = ""
    moment: float = 0.0
    depth: Path | None = None
    mask: Path | None = None
    segmentation: Path | None = None
    provenance: int = 0


def orient(shots: Sequence[Shot], axes: str) -> list[Shot]:
    """The same shots with camera-to-world poses in OpenCV axes.

    Args:
        axes: how they are written, one of :data:`dataengine.captures.geometry.AXES`, or ``"auto"``: the way under which
            most cameras see one place, OpenCV axes where several do or none.

    Raises:
        ValueError: a pose that is not finite, not rigid or left-handed; the picture and the axis to flip are named.
    """
    for shot in shots:
        check_pose(shot.pose, shot.label)
    poses = np.stack([shot.pose for shot in shots])
    check_hands(poses if axes == "auto" else to_opencv(poses, axes), [shot.label for shot in shots])
    if axes == "auto":
        scores = score_axes(poses, np.stack([s.intrinsics for s in shots]), shots[0].size)
        axes = better_axes(scores) or "opencv"
    return [replace(shot, pose=pose) for shot, pose in zip(shots, to_opencv(poses, axes), strict=True)]


def check_pose(pose: NDArray[Any], label: str) -> None:
    """Raise ``ValueError`` unless a ``[4, 4]`` matrix is finite and rigid but for its hand."""
    if np.shape(pose) != (4, 4) or not np.isfinite(pose).all():
        got = f"the shape {list(np.shape(pose))}" if np.shape(pose) != (4, 4) else "NaN or infinity"
        raise ValueError(
            f"{label}: expected a pose of 4 x 4 finite numbers, got {got}; leave this picture out or mend it"
        )
    rotation = pose[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if error > RIGID_TOLERANCE or not np.allclose(pose[3], (0, 0, 0, 1), atol=RIGID_TOLERANCE):
        raise ValueError(
            f"{label}: expected a rigid pose with a last row of 0 0 0 1, got R R^T off by {error:.2g} and "
            f"{np.round(pose[3], 4).tolist()}; remove scale and shear, or transpose"
        )


def check_hands(poses: NDArray[Any], labels: Sequence[str]) -> None:
    """Raise ``ValueError`` that names the first left-handed pose and the axis whose sign is wrong."""
    left = np.linalg.det(poses[:, :3, :3]) < 0
    if left.any():
        axis = mirrored_axis(poses)
        what = "points up instead of down (Unity's axes)" if axis == "y" else "points backward"
        first = labels[int(left.argmax())]
        raise ValueError(
            f"{first}: expected a right-handed pose (det +1), got a left-handed one (det -1), as {int(left.sum())} of "
            f"{len(left)} are; flip its {axis} axis, which probably {what}: change the signs of that column of its "
            "camera-to-world matrix"
        )


def mirrored_axis(poses: NDArray[Any]) -> str:
    """The axis of left-handed cameras ``[N, 4, 4]`` that is probably wrong: z where they look away from each other's
    focus, else y, the axis on which drawing programs differ."""
    wide = np.tile([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]], (len(poses), 1, 1))  # sees 90 degrees
    seen = [focus_score(p, wide, (2, 2)) for p in (poses, poses @ OPENGL)]
    return "z" if (seen[1] or 0) > (seen[0] or 0) else "y"


def flip(axis: str, poses: NDArray[Any]) -> NDArray[np.float64]:
    """Poses ``[..., 4, 4]`` with one camera axis, ``"x"``, ``"y"`` or ``"z"``, turned round: left hand to right."""
    if axis not in ("x", "y", "z"):
        raise ValueError(
            f"axis: expected 'x', 'y' or 'z', got {axis!r}; name the axis that points the wrong way"
        )
    signs = np.ones(4)
    signs["xyz".index(axis)] = -1
    return np.asarray(poses, np.float64) * signs


def number_in(text: str) -> float:
    """The last number in a file name's stem; -1 without one."""
    found = re.findall(r"\d+", Path(text).stem)
    return float(found[-1]) if found else -1.0


def folder_of(shot: Shot) -> str:
    """The folder of a picture within its capture, as the name of a camera."""
    return Path(shot.label).parent.name


def prefix_of(shot: Shot) -> str:
    """A file name without its last number: ``cam01_0007`` is of ``cam01``."""
    return re.sub(r"[_\-.]*(frame[_\-]*)?\d+$", "", Path(shot.label).stem) or "camera"


def name_by_pose(shots: Sequence[Shot]) -> dict[str, str]:
    """label -> ``camera_000`` and so on, one for each distinct pose."""
    known: dict[bytes, str] = {}
    return {
        shot.label: known.setdefault(np.round(shot.pose, 6).tobytes(), f"camera_{len(known):03d}")
        for shot in shots
    }


def name_in_time(shots: Sequence[Shot]) -> list[Shot]:
    """Give shots with moments their cameras: by name where all have one, else by folder, file name or pose, whichever
    gives every camera the same moments; one moving camera where no two share a moment."""
    if all(shot.view for shot in shots):
        return list(shots)
    by_pose = name_by_pose(shots)
    rules: list[Callable[[Shot], str]] = [
        folder_of,
        prefix_of,
        lambda s: by_pose[s.label],
        lambda s: "camera",
    ]
    options = [[replace(s, view=rule(s)) for s in shots] for rule in rules]
    unique = [o for o in options if len({(s.view, s.moment) for s in o}) == len(o)]
    for option in unique:
        if len({s.view for s in option}) * len({s.moment for s in option}) == len(option):
            return option
    return unique[0] if unique else [replace(s, view=s.label) for s in shots]


def name_still(shots: Sequence[Shot]) -> list[Shot]:
    """Every picture its own view of one moment: by its camera's name, its file's or its folder's, whichever differs
    everywhere, else by its whole path."""
    whole = [re.sub(r"[/\\]+", "_", str(Path(s.label).with_suffix(""))).strip("._") for s in shots]
    options = [
        [s.view for s in shots],
        [Path(s.label).stem for s in shots],
        [folder_of(s) for s in shots],
        whole,
    ]
    names = next((o for o in options if all(o) and len(set(o)) == len(o)), whole)
    return [replace(s, view=name, moment=0.0) for s, name in zip(shots, names, strict=True)]


def arrange(shots: Sequence[Shot], frames: Frames) -> tuple[list[str], list[list[Shot]]]:
    """Camera names, and the shots as ``[T][V]``; ``frames="common"`` keeps the moments that all cameras have.

    Raises:
        ValueError: two pictures of one camera and moment; cameras with different moments under ``"equal"``.
    """
    if frames not in ("equal", "common"):
        raise ValueError(
            f"frames: expected 'equal' or 'common', got {frames!r}; 'common' cuts to the shared moments"
        )
    table: dict[str, dict[float, Shot]] = defaultdict(dict)
    for shot in shots:
        if shot.moment in table[shot.view]:
            other = table[shot.view][shot.moment].label
            raise ValueError(
                f"{shot.label}: expected one picture of camera {shot.view!r} at {shot.moment:g}, got {other} too; name "
                "the cameras or remove one"
            )
        table[shot.view][shot.moment] = shot
    names = list(table)
    shared = sorted(set.intersection(*(set(row) for row in table.values())))
    counts = {name: len(row) for name, row in table.items()}
    if frames == "equal" and any(count != len(shared) for count in counts.values()):
        few, many = min(counts, key=lambda n: counts[n]), max(counts, key=lambda n: counts[n])
        raise ValueError(
            f"frames: expected all cameras to have the same moments, got {counts[many]} of {many!r} and {counts[few]} of "
            f"{few!r} with {len(shared)} shared; cut to those with frames 'common' (--common-frames)"
        )
    if not shared:
        raise ValueError(
            f"frames: expected moments that all of {names} share, got none; check the times or names"
        )
    return names, [[table[name][moment] for name in names] for moment in shared]


def gather(
    names: Sequence[str], grid: Sequence[Sequence[Shot]], *, fps: float, depth_scale: float | None = None
) -> Views:
    """Read every file of shots ``[T][V]`` (OpenCV axes) into views; lens distortion is taken out, what that uncovers at
    the border counts 0. Cameras that stand still become fixed ones.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged or of another shape; it is named.
    """
    read = [[_load(shot, depth_scale) for shot in row] for row in grid]
    first = read[0][0][0].shape
    for row, loaded in zip(grid, read, strict=True):
        for shot, arrays in zip(row, loaded, strict=True):
            if arrays[0].shape != first:
                got, like = arrays[0].shape, grid[0][0].label
                raise ValueError(
                    f"{shot.label}: expected {first[1]} x {first[0]} pixels like {like}, got {got[1]} x {got[0]}; resize "
                    "the pictures to one size"
                )
    intrinsics = np.array([[arrays[1] for arrays in row] for row in read])
    poses = np.array([[shot.pose for shot in row] for row in grid])
    intrinsics, poses = (a[0] if (np.ptp(a, axis=0) < 1e-9).all() else a for a in (intrinsics, poses))

    def stacked(k: int, dtype: torch.dtype, fill: float) -> torch.Tensor | None:
        if all(arrays[k] is None for row in read for arrays in row):
            return None
        full = np.full(first[:2], fill, np.float32)
        return torch.from_numpy(
            np.stack([np.stack([full if a[k] is None else a[k] for a in row]) for row in read])
        ).to(dtype)

    images = stacked(0, torch.float32, 0)
    assert images is not None
    return Views(
        cameras=Cameras(tuple(names), intrinsics, poses, first[1], first[0]),
        images=images.clamp(0, 1),
        depth=stacked(2, torch.float32, 0),
        confidence=stacked(3, torch.float32, 1),
        body_ids=stacked(4, torch.long, 0),
        provenance=torch.tensor([[shot.provenance for shot in row] for row in grid]),
        fps=fps,
    )


def _load(shot: Shot, depth_scale: float | None) -> list[Any]:
    """Image, intrinsics for its size, depth, confidence, ids; None for what is not there."""
    image = pictures.read_image(shot.image)
    height, width = image.shape[:2]
    ratio = np.array([width / shot.size[0], height / shot.size[1]])
    if abs(ratio[0] / ratio[1] - 1) > 0.02:
        raise ValueError(
            f"{shot.label}: expected {shot.size[0]} x {shot.size[1]} pixels as its camera says, got {width} x {height}; "
            "cropping changes a camera, so write the intrinsics of the cropped picture"
        )
    intrinsics = shot.intrinsics * np.array([[ratio[0]], [ratio[1]], [1.0]])
    depth = None if shot.depth is None else _fit(pictures.read_depth(shot.depth, depth_scale), width, height)
    counts = None if shot.mask is None else _fit(pictures.read_mask(shot.mask), width, height)
    ids = None if shot.segmentation is None else _fit(pictures.read_ids(shot.segmentation), width, height)
    maps = pictures.undistortion(intrinsics, shot.distortion, (width, height))
    if maps is not None:
        image = pictures.remap(image, maps, smooth=True)
        covered = pictures.remap(np.ones((height, width), np.float32), maps, smooth=True) > 0.999
        counts = covered * (1.0 if counts is None else pictures.remap(counts, maps, smooth=False))
        counts = None if counts.all() and shot.mask is None else counts.astype(np.float32)
        depth = None if depth is None else pictures.remap(depth, maps, smooth=False)
        ids = None if ids is None else pictures.remap(ids.astype(np.float32), maps, smooth=False)
    return [image, intrinsics, depth, counts, ids]


def _fit(pixels: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    """Depth, masks and ids are often smaller than their picture; nearest values, so that edges stay edges."""
    if pixels.shape == (height, width):
        return pixels
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_NEAREST)
