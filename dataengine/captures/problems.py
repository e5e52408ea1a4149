"""What is wrong with a capture, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataengine.captures import geometry
from dataengine.views import Views

MOMENTS = 3  # frames looked at where depth decides
POSES = 8  # frames whose poses are looked at
MISMATCH = (
    1.1  # factor between depth and poses beyond which they disagree: two wide views settle it within 3 %
)
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
    wrong = list(wrong_axes(views, axes))
    wrong = wrong or list(wrong_depth(views))
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
        geometry.depth_agreement(cameras.camera_to_world, cameras.intrinsics, depth, np.ones(1))[0]
        for cameras, depth in moments
        if depth is not None
    ]
    if np.mean(plain) >= geometry.SOUND:
        return {"opencv": 1.0}
    rows = [
        geometry.score_axes(cameras.camera_to_world, cameras.intrinsics, _size(views), depth)
        for cameras, depth in moments
    ]
    return {name: float(np.mean([row[name] or 0.0 for row in rows])) for name in rows[0]}


def wrong_axes(views: Views, given: str = "opencv") -> Iterator[Problem]:
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


def wrong_depth(views: Views) -> Iterator[Problem]:
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
    clear = (
        fitting >= geometry.CLEAR and fitting > 1.5 * given + 0.05 and abs(np.log(factor)) > np.log(MISMATCH)
    )
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
    """Views outside the largest group of which each shares something with another, at any of a few moments."""
    from scipy.sparse.csgraph import connected_components

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
    _, group = connected_components(shared | shared.T)
    sizes = np.bincount(group)
    alone = (group != sizes.argmax()) | ((sizes.max() == 1) & (count > 1))
    if alone.any():
        names = [name for name, blind in zip(views.names, alone.tolist(), strict=True) if blind]
        yield Problem(
            kind="blind",
            sentence=f"views: expected views that overlap in one chain, got {names} that see nothing of the others; "
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
