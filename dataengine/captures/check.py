"""What is wrong with a capture, in sentences; and the repairs that its own geometry dictates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dataengine.cameras import Cameras
from dataengine.captures import geometry
from dataengine.captures.shots import Frames, check_hands, check_pose, flip
from dataengine.errors import closest
from dataengine.views import Views

MOMENTS = 3  # frames looked at where depth decides
POSES = 8  # frames whose poses are looked at
MISMATCH = (
    1.1  # factor between depth and poses beyond which they disagree: two wide views settle it within 3 %
)
SOUND = 0.3  # agreement of depth between views that no other reading of the poses comes near
MILLI = (0.9e-3, 1.1e-3)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with views.

    Attributes:
        kind: ``finite``, ``few``, ``mask``, ``axes``, ``depth``, or ``blind``, which is looked for where poses and depth
            are sound.
        sentence: argument, what was expected, what came, what to do.
        remedy: for ``axes`` how the poses are written, for ``depth`` the factor to multiply depth with, else None.
    """

    kind: str
    sentence: str
    remedy: Any = None

    def __str__(self) -> str:
        return self.sentence


def find_problems(views: Views, *, least: int = 2, axes: str = "opencv") -> list[Problem]:
    """Everything that is wrong with views; an empty list for sound ones.

    Found: numbers that are not finite, fewer than `least` views, pictures whose mask leaves nothing, poses written in
    other axes or the other way round, depth in millimetres or of another scale than the poses, views that see nothing of
    what others see. `axes` is how the poses were read, for the advice.

    Without depth, cameras in parallel get no verdict, a pair is only asked about OpenGL axes, and a rig that looks
    outwards is taken for one with OpenGL axes.
    """
    found = [*not_finite(views), *_empty_masks(views)]
    if len(views.names) < least:
        found.append(
            Problem(
                kind="few",
                sentence=f"views: expected at least {least} cameras, got {len(views.names)}; add views of the same frames",
            )
        )
    wrong = list(_wrong_axes(views, axes))
    wrong = wrong or list(_wrong_depth(views))
    return found + (
        wrong or list(_blind_views(views))
    )  # what overlaps is not known under wrong poses or depth


def check_views(views: Views, *, least: int = 2, axes: str = "opencv") -> None:
    """Raise one ``ValueError`` with the sentences of :func:`find_problems`, if there are any."""
    found = find_problems(views, least=least, axes=axes)
    if found:
        raise ValueError(" | ".join(problem.sentence for problem in found))


def not_finite(views: Views) -> Iterator[Problem]:
    """Which of images, depth and confidence hold a NaN or an infinity."""
    for name in ("images", "depth", "confidence"):
        value = getattr(views, name)
        if value is None or bool(torch.isfinite(value).all()):
            continue
        bad = ~torch.isfinite(value).flatten(2).all(-1)
        t, v = (int(n) for n in bad.nonzero()[0])
        yield Problem(
            kind="finite",
            sentence=f"{name}: expected finite numbers, got NaN or infinity in {int(bad.sum())} pictures, first in view "
            f"{views.names[v]!r}, frame {t}; repair (--repair) sets them to unknown",
        )


def _empty_masks(views: Views) -> Iterator[Problem]:
    if views.confidence is None:
        return
    empty = ~(views.confidence > 0).flatten(2).any(-1)
    if bool(empty.any()):
        t, v = (int(n) for n in empty.nonzero()[0])
        yield Problem(
            kind="mask",
            sentence=f"confidence: expected masks that keep some pixels, got {int(empty.sum())} that keep none, first in "
            f"view {views.names[v]!r}, frame {t}; turn the masks round or leave those pictures out",
        )


def _moments(views: Views, count: int) -> list[int]:
    return sorted({int(t) for t in np.linspace(0, len(views) - 1, min(count, len(views))).round()})


def _size(views: Views) -> tuple[int, int]:
    return views.cameras.width, views.cameras.height


def _depth_at(views: Views, t: int) -> NDArray[Any] | None:
    if views.depth is None:
        return None
    depth = views.depth[t].double().numpy(force=True)
    return np.where(np.isfinite(depth), depth, 0.0)


def _poses(views: Views) -> tuple[NDArray[Any], NDArray[Any]]:
    """Poses and intrinsics of several frames in one list, each fixed camera once."""
    moments = [0] if views.cameras.frames is None else _moments(views, POSES)
    cameras = [views.cameras.at(t) for t in moments]
    return np.concatenate([c.camera_to_world for c in cameras]), np.concatenate(
        [c.intrinsics for c in cameras]
    )


def _has_depth(views: Views) -> bool:
    return views.depth is not None and len(views.names) > 1 and bool((views.depth > 0).any())


def _axes_scores(views: Views) -> dict[str, float | None]:
    if not _has_depth(views):
        poses, intrinsics = _poses(views)
        return geometry.score_axes(poses, intrinsics, _size(views))
    moments = [(views.cameras.at(t), _depth_at(views, t)) for t in _moments(views, MOMENTS)]
    plain = [
        geometry.depth_agreement(now.camera_to_world, now.intrinsics, depth, np.ones(1))[0]
        for now, depth in moments
        if depth is not None
    ]
    if np.mean(plain) >= SOUND:
        return {"opencv": 1.0}
    rows = [
        geometry.score_axes(now.camera_to_world, now.intrinsics, _size(views), depth)
        for now, depth in moments
    ]
    return {name: float(np.mean([row[name] or 0.0 for row in rows])) for name in rows[0]}


def _wrong_axes(views: Views, given: str = "opencv") -> Iterator[Problem]:
    scores = _axes_scores(views)
    if not _has_depth(views) and len(views.names) < 3:  # two axes meet somewhere under most readings
        scores = {name: score for name, score in scores.items() if "world_to_camera" not in name}
    better = geometry.better_axes(scores, depth=_has_depth(views))
    if better is None:
        return
    what = (
        "points that two views see alike" if _has_depth(views) else "cameras that see the place all look at"
    )
    right = geometry.compose_axes(given, better)
    expected, got = geometry.WORDS[given], geometry.WORDS[right]
    yield Problem(
        kind="axes",
        sentence=f"camera_to_world: expected {expected}, got poses with {scores['opencv'] or 0:.0%} of {what}, and "
        f"{scores[better]:.0%} when read as {got}: looks like {got}; read them with axes {right!r}, or repair (--repair)",
        remedy=right,
    )


def _wrong_depth(views: Views) -> Iterator[Problem]:
    if views.depth is None:
        return
    known = views.depth[torch.isfinite(views.depth) & (views.depth > 0)]
    if not len(known):
        yield Problem(
            kind="finite",
            sentence="depth: expected metres above 0 somewhere, got none; leave depth out where none is known",
        )
        return
    median = float(known.median())
    factor, fitting, given = _fit_depth(views)
    counts = median > 100 and float((known - known.round()).abs().lt(1e-3).float().mean()) > 0.99
    far = median > 50 * max(geometry.depth_reach(_poses(views)[0]), 1e-9) and len(views.names) > 1
    clear = fitting >= 0.1 and fitting > 1.5 * given + 0.05 and abs(np.log(factor)) > np.log(MISMATCH)
    if clear and not MILLI[0] < factor < MILLI[1]:
        yield Problem(
            kind="depth",
            sentence=f"depth: expected the scale of the poses, got one that fits them times {factor:.4g} ({fitting:.0%} "
            f"of points agree between views then, {given:.0%} as it is); read it with depth scale {factor:.4g}, repair "
            "(--repair), or scale the poses",
            remedy=factor,
        )
    elif clear or (given < 0.1 and (counts or far)):
        why = "whole numbers" if counts else "far beyond the cameras' reach"
        yield Problem(
            kind="depth",
            sentence=f"depth: expected metres, got a median of {median:.4g}{', ' + why if counts or far else ''}: looks "
            "like millimetres; read it with depth scale 0.001, or repair (--repair)",
            remedy=1e-3,
        )


def _fit_depth(views: Views) -> tuple[float, float, float]:
    """Median over moments of the factor that depth needs, agreement with it, and agreement without."""
    if not _has_depth(views):
        return 1.0, 0.0, 0.0
    rows = []
    for t in _moments(views, MOMENTS):
        now, depth = views.cameras.at(t), _depth_at(views, t)
        assert depth is not None
        rows.append(geometry.depth_factor(now.camera_to_world, now.intrinsics, depth))
    return tuple(np.median(rows, axis=0).tolist())  # type: ignore[return-value]


def _blind_views(views: Views) -> Iterator[Problem]:
    """Views that share nothing with any other at any of a few moments."""
    count = len(views.names)
    shared = np.eye(count, dtype=bool)
    for t in _moments(views, MOMENTS):
        now, depth = views.cameras.at(t), _depth_at(views, t)
        reach = geometry.depth_reach(now.camera_to_world)
        for i in range(count):
            own = None if depth is None or not (depth[i] > 0).any() else depth[i]
            points = geometry.sample_points(
                now.camera_to_world[i], now.intrinsics[i], _size(views), own, reach
            )
            for j in range(count):
                seen = geometry.sees(now.camera_to_world[j], now.intrinsics[j], _size(views), points)
                shared[i, j] |= bool(seen.mean() > 0.005)
    alone = ~np.any((shared | shared.T) & ~np.eye(count, dtype=bool), axis=1)
    if count > 1 and alone.any():
        names = [name for name, blind in zip(views.names, alone.tolist(), strict=True) if blind]
        yield Problem(
            kind="blind",
            sentence=f"views: expected every view to overlap another one, got {names} that see nothing of the others; "
            "check their poses or name the other views alone (--observed)",
            remedy=names,
        )


def check_points(views: Views, points: NDArray[Any]) -> None:
    """Raise ``ValueError`` where fewer than half of a reconstruction's points ``[N, 3]`` lie within any picture."""
    if len(points) < 10:
        return
    seen = np.zeros(len(points), bool)
    for t in _moments(views, POSES):
        now = views.cameras.at(t)
        for pose, intrinsics in zip(now.camera_to_world, now.intrinsics, strict=True):
            seen |= geometry.sees(pose, intrinsics, _size(views), points)
    if seen.mean() < 0.5:
        raise ValueError(
            f"points3D: expected most points before the cameras, got {1 - seen.mean():.0%} of {len(points)} outside all "
            "pictures; take points and poses of one model, or read them with axes 'auto'"
        )


def repair(
    views: Views, *, axes: str = "auto", depth_scale: float | Literal["auto"] = "auto", least: int = 2,
    check: bool = True, given: str = "opencv",
) -> tuple[Views, list[str]]:  # fmt: skip
    """Views with what can be put right put right, and a sentence for everything that was changed.

    Args:
        views: poses as somebody wrote them, read in the axes `given`.
        axes: how they are written, one of :data:`dataengine.captures.geometry.AXES`; ``"auto"`` lets the geometry say.
        depth_scale: what to multiply depth with; ``"auto"``: 0.001 or the factor to the poses where that is plain.
        least: views asked for.
        check: refuse what is left.
        given: how a reader has read them already, such as ``"opengl"`` for a ``transforms.json``; `axes` then says how the
            file itself writes them.

    Raises:
        ValueError: the sentences of what is left, such as too few views, empty masks, or views that overlap no other.
    """
    axes, depth_scale = find_conventions(views, axes=axes, depth_scale=depth_scale, given=given)
    done = []
    views = _finite(views, done)
    if axes != given:
        views = _oriented(views, axes, given)
        done.append(f"camera_to_world: read as {geometry.WORDS[axes]}, not as {geometry.WORDS[given]}")
    if views.depth is not None and depth_scale != 1.0:
        views = replace(views, depth=views.depth * depth_scale)
        done.append(f"depth: multiplied by {depth_scale:.4g}")
    if check:
        check_views(views, least=least, axes=axes)
    return views, done


def find_conventions(
    views: Views, *, axes: str = "auto", depth_scale: float | Literal["auto"] = "auto", given: str = "opencv"
) -> tuple[str, float]:
    """How poses that were read in the axes `given` are written and what depth must be multiplied with, as told or, for
    ``"auto"``, as the geometry says.

    Raises ValueError for axes that are not known and a factor that is not above 0.
    """
    geometry.check_axes(axes, "auto")
    geometry.check_axes(given)
    views = _finite(views, [])
    if axes == "auto":
        axes = next((p.remedy for p in _wrong_axes(views, given)), given)
    if depth_scale == "auto":
        depth_scale = next((p.remedy for p in _wrong_depth(_oriented(views, axes, given)) if p.remedy), 1.0)
    if not 0 < float(depth_scale) < np.inf:
        raise ValueError(
            f"depth_scale: expected a factor above 0, got {depth_scale}; 0.001 turns millimetres into metres"
        )
    return axes, float(depth_scale)


def _oriented(views: Views, axes: str, given: str) -> Views:
    written = geometry.from_opencv(views.cameras.camera_to_world, given)
    poses = geometry.to_opencv(written, axes)
    return replace(views, cameras=replace(views.cameras, camera_to_world=poses))


def _finite(views: Views, done: list[str]) -> Views:
    """Depth that is not finite becomes unknown (0), pixels that are not become black and count nothing."""
    changes: dict[str, Any] = {}
    if views.depth is not None and not bool(torch.isfinite(views.depth).all()):
        changes["depth"] = torch.nan_to_num(views.depth, nan=0.0, posinf=0.0, neginf=0.0)
        done.append("depth: set to unknown where it was not finite")
    bad = ~torch.isfinite(views.images).all(-1)
    counts = views.confidence
    if counts is not None and not bool(torch.isfinite(counts).all()):
        bad |= ~torch.isfinite(counts)
    if bool(bad.any()):
        changes["images"] = torch.nan_to_num(views.images, nan=0.0, posinf=1.0, neginf=0.0)
        full = torch.ones_like(views.images[..., 0]) if counts is None else torch.nan_to_num(counts)
        changes["confidence"] = full * ~bad
        done.append(f"images: {int(bad.sum())} pixels that were not finite count nothing")
    return replace(views, **changes) if changes else views


def build_views(
    images: Mapping[str, NDArray[Any]],
    intrinsics: Mapping[str, NDArray[Any]],
    poses: Mapping[str, NDArray[Any]],
    *,
    axes: str = "opencv",
    flip_axis: str | None = None,
    depth: Mapping[str, NDArray[Any]] | None = None,
    depth_scale: float = 1.0,
    masks: Mapping[str, NDArray[Any]] | None = None,
    segmentation: Mapping[str, NDArray[Any]] | None = None,
    frames: Frames = "equal",
    fps: float = 10.0,
    least: int = 2,
    check: bool = True,
) -> Views:
    """Views from arrays by camera name, with everything named that does not fit.

    Args:
        images: name -> ``[T, H, W, 3]``, bytes or floats in [0, 1].
        intrinsics: name -> ``[3, 3]`` or ``[T, 3, 3]`` pixels, centres at +0.5.
        poses: name -> ``[4, 4]`` or ``[T, 4, 4]``, written in `axes`.
        axes: one of :data:`dataengine.captures.geometry.AXES`, or ``"auto"``.
        flip_axis: the camera axis, ``"x"``, ``"y"`` or ``"z"``, that left-handed poses have the wrong way round.
        depth, masks, segmentation: name -> ``[T, H, W]``; depth times `depth_scale` is metres, masks keep where above 0.
        frames: ``"common"`` cuts longer cameras to the shortest instead of refusing them.
        fps: frames per second.
        least: views asked for.
        check: refuse what :func:`find_problems` finds.

    Raises:
        ValueError: the argument, the view and the frame at fault.
    """
    geometry.check_axes(axes, "auto")
    names = tuple(images)
    parts: dict[str, Mapping[str, Any] | None] = {"intrinsics": intrinsics, "poses": poses, "depth": depth}
    parts |= {"masks": masks, "segmentation": segmentation}
    for argument, part in parts.items():
        for name in names if part is not None else ():
            if name not in (part or {}):
                raise ValueError(
                    f"{argument}: expected the views {list(names)}, missing {name!r}; {closest(name, part or {})}"
                )
    count = _frame_count({name: len(images[name]) for name in names}, frames)

    def stack(part: Mapping[str, Any] | None, dtype: torch.dtype) -> torch.Tensor | None:
        if part is None:
            return None
        return torch.stack([torch.as_tensor(np.asarray(part[n])[:count]) for n in names], 1).to(dtype)

    shapes = {name: np.shape(images[name])[1:] for name in names}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"images: expected pictures of one size, got {shapes}; resize them and scale the intrinsics"
        )
    raw = torch.stack([torch.as_tensor(np.asarray(images[n])[:count]) for n in names], 1)
    cameras = _cameras(names, intrinsics, poses, count, shapes[names[0]][:2], flip_axis)
    scaled = stack(depth, torch.float32)
    kept = stack(masks, torch.float32)
    views = Views(
        cameras=cameras,
        images=raw / 255 if raw.dtype == torch.uint8 else raw.float(),
        depth=None if scaled is None else scaled * depth_scale,
        confidence=None if kept is None else (kept > 0).float(),
        body_ids=stack(segmentation, torch.long),
        fps=fps,
    )
    if axes == "auto":
        axes = next((p.remedy for p in _wrong_axes(views)), "opencv")
    if axes != "opencv":
        views = replace(
            views, cameras=replace(cameras, camera_to_world=geometry.to_opencv(cameras.camera_to_world, axes))
        )
    if check:
        check_views(views, least=least, axes=axes)
    return views


def _frame_count(counts: Mapping[str, int], frames: Frames) -> int:
    if not counts:
        raise ValueError("images: expected at least one view, got none; pass name -> [T, H, W, 3]")
    few, many = min(counts, key=lambda n: counts[n]), max(counts, key=lambda n: counts[n])
    if counts[few] != counts[many] and frames != "common":
        raise ValueError(
            f"images: expected all views to have the same number of frames, got {counts[many]} of {many!r} and "
            f"{counts[few]} of {few!r}; cut the longer ones with frames 'common', and check with "
            "estimate_offsets that they start together"
        )
    return counts[few]


def _cameras(
    names: tuple[str, ...],
    intrinsics: Mapping[str, NDArray[Any]],
    poses: Mapping[str, NDArray[Any]],
    count: int,
    size: tuple[int, ...],
    axis: str | None,
) -> Cameras:
    moving = any(np.ndim(part[n]) == 3 for part in (intrinsics, poses) for n in names)

    def stack(part: Mapping[str, NDArray[Any]], side: int) -> NDArray[np.float64]:
        arrays = [np.asarray(part[n], np.float64) for n in names]
        if not moving:
            return np.stack(arrays)
        return np.stack(
            [np.broadcast_to(a[:count] if a.ndim == 3 else a, (count, side, side)) for a in arrays], 1
        )

    given = stack(poses, 4)
    flat = given.reshape(-1, 4, 4)
    labels = [f"poses[{n!r}]" for n in names]
    if moving:
        labels = [f"poses[{n!r}], frame {t}" for t in range(count) for n in names]
    for pose, label in zip(flat, labels, strict=True):
        check_pose(pose, label)
    if axis is not None:
        left = np.linalg.det(flat[:, :3, :3]) < 0
        flat = np.where(left[:, None, None], flip(axis, flat), flat)
    check_hands(flat, labels)
    return Cameras(names, stack(intrinsics, 3), flat.reshape(given.shape), size[1], size[0])
