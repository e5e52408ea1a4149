"""Bring cameras that started at different moments to one clock, by what moves in them.

Two fixed cameras see a movement in the same epipolar plane at the same time, so the change from frame to frame is summed
per plane ("motion barcodes": Ben-Artzi, Werman and Peleg 2015, arXiv 1506.07866; Kasten et al. 2016) and its rises and
falls are correlated over all planes at once. Cameras that move, and plain signals, are compared by their total.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dataengine.cameras import Cameras
from dataengine.views import Views

Array = NDArray[np.float64]
LEAST = 8  # frames
PLANES = 64
STRONG = 0.4  # how far above chance a correlation counts in full
TRUST = 0.2
NOISE = 1.5 / 255  # changes below are sensor or codec noise


@dataclass(frozen=True, eq=False, kw_only=True)
class Offsets:
    """How late each of V streams is.

    Attributes:
        names: V streams.
        frames: ``[V]``; what the first stream shows at frame t, stream v shows at ``t + frames[v]``.
        confidence: ``[V]`` in [0, 1]: how far the best offset stands out from the next best, along the surest chain of
            streams to the first one. 0 where nothing moves.
    """

    names: tuple[str, ...]
    frames: Array
    confidence: Array

    def __str__(self) -> str:
        rows = zip(self.names, self.frames, self.confidence, strict=True)
        return ", ".join(f"{name} {late:+.2f} frames ({sure:.2f})" for name, late, sure in rows)


def estimate_offsets(
    streams: Views | Mapping[str, NDArray[Any]], *, max_offset: int | None = None
) -> Offsets:
    """How many frames each camera lags behind the first one.

    Args:
        streams: views, or name -> signal ``[T]`` of each stream (of any lengths) whose rises and falls are to coincide.
        max_offset: largest offset looked for, in frames; None: one second of views, a third of the shortest signal.

    Returns:
        Offsets to a fraction of a frame. All streams are placed together, so that a pair that is unsure of itself follows
        from the sure ones.

    Raises:
        ValueError: fewer than two streams or 8 frames, a signal that is not finite.
    """
    names = streams.names if isinstance(streams, Views) else tuple(streams)
    lengths = [len(streams)] * len(names) if isinstance(streams, Views) else [len(streams[n]) for n in names]
    if len(names) < 2 or min(lengths) < LEAST:
        raise ValueError(
            f"streams: expected at least 2 of at least {LEAST} frames, got {len(names)} of {min(lengths, default=0)}; "
            "record longer ones"
        )
    third = max(2, min(lengths) // 3)
    reach = min(round(streams.fps), third) if isinstance(streams, Views) else third
    reach = reach if max_offset is None else int(max_offset)
    if not 1 <= reach <= min(lengths) - 4:
        raise ValueError(
            f"max_offset: expected 1 to {min(lengths) - 4} frames, got {reach}; leave room for an overlap"
        )
    pairs = list(itertools.combinations(range(len(names)), 2))
    found = dict(zip(pairs, _curves(streams, names, pairs, reach), strict=True))
    curves = {pair: curve for pair, (curve, _) in found.items()}
    sure = {pair: _distinct(curve, chance) for pair, (curve, chance) in found.items()}
    whole = _place(curves, sure, len(names), reach)
    return Offsets(
        names=names, frames=_refine(curves, sure, whole, reach), confidence=_chain(curves, sure, whole, reach)
    )


def align(views: Views, offsets: Offsets, *, trust: float = TRUST) -> Views:
    """Views cut to their common window, each moved by its offset to the nearest frame; poses of a moving camera go
    with its pictures.

    Raises:
        ValueError: other views than those of the offsets, a confidence below `trust`, or no frame in common.
    """
    if offsets.names != views.names:
        raise ValueError(
            f"offsets: expected those of {list(views.names)}, got {list(offsets.names)}; estimate them on these views"
        )
    weak = [f"{s:.2f} for {n!r}" for n, s in zip(offsets.names, offsets.confidence, strict=True) if s < trust]
    if weak:
        raise ValueError(
            f"offsets: expected a confidence of at least {trust}, got {', '.join(weak)}; leave those views out with "
            "select, or pass trust=0 to move them anyway"
        )
    late = np.rint(offsets.frames).astype(int)
    starts, count = late - late.min(), len(views) - int(np.ptp(late))
    if count < 1:
        raise ValueError(
            f"offsets: expected a common window, got none of {len(views)} frames for {offsets}; record longer"
        )
    parts = [
        views.select([n]).at(slice(s, s + count)) for n, s in zip(views.names, starts.tolist(), strict=True)
    ]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.join(part)
    return replace(joined, fps=views.fps)


def _curves(
    streams: Views | Mapping[str, NDArray[Any]],
    names: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    reach: int,
) -> list[tuple[Array, float]]:
    """The correlation ``[2 reach + 1]`` of every pair over offsets of the second behind the first, and what chance makes
    of it: little where many epipolar planes must agree, much for two short totals."""
    if not isinstance(streams, Views):
        signals = [_signal(name, streams[name])[None] for name in names]
        return [_totals(signals[i], signals[j], reach) for i, j in pairs]
    change = [_change(streams.images[:, v].numpy(force=True)) for v in range(len(names))]
    fixed = [_stands_still(streams.cameras, v) for v in range(len(names))]
    curves = []
    for i, j in pairs:
        planes = _planes(streams.cameras, i, j) if fixed[i] and fixed[j] else None
        if planes is None:
            totals = [np.sqrt(change[v].sum(1))[None] for v in (i, j)]
            curves.append(_totals(totals[0], totals[1], reach))
        else:
            first, second = (_barcode(change[v], plane) for v, plane in zip((i, j), planes, strict=True))
            curves.append((correlate(np.diff(first), np.diff(second), reach), 0.05))
    return curves


def _totals(first: Array, second: Array, reach: int) -> tuple[Array, float]:
    length = min(first.shape[1], second.shape[1])
    return correlate(np.diff(first), np.diff(second), reach), 2.2 / np.sqrt(length)


def _signal(name: str, values: Any) -> Array:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        got = f"the shape {list(values.shape)}" if values.ndim != 1 else "NaN or infinity"
        raise ValueError(
            f"streams[{name!r}]: expected [T] finite numbers, got {got}; reduce it to one number per frame"
        )
    return values


def _change(images: NDArray[Any]) -> Array:
    """How much every pixel changes from frame to frame, ``[T - 1, H W]``; sensor noise is left out."""
    grey = np.stack([cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), 1.0) for image in images.mean(-1)])
    change = np.abs(np.diff(grey, axis=0)).reshape(len(grey) - 1, -1).astype(np.float64)
    return np.where(change > NOISE, change, 0.0)


def _stands_still(cameras: Cameras, view: int) -> bool:
    poses = cameras.camera_to_world
    return poses.ndim == 3 or bool((np.ptp(poses[:, view], axis=0) < 1e-4).all())


def _planes(cameras: Cameras, i: int, j: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """The epipolar plane of every pixel of both cameras, -1 for planes that the other does not see; None for cameras in
    one place, or whose pictures share no plane."""
    now = cameras.at(0)
    first, second = now.camera_to_world[i], now.camera_to_world[j]
    base = second[:3, 3] - first[:3, 3]
    length = np.linalg.norm(base)
    middle = first[:3, 2] + second[:3, 2]
    up = middle - base * (middle @ base) / max(length, 1e-12) ** 2
    if length < 1e-6 or np.linalg.norm(up) < 1e-3:
        return None
    up = up / np.linalg.norm(up)
    side = np.cross(base / length, up)
    points = now.unproject(np.ones((len(now.names), now.height, now.width)))
    angles = []
    for view, pose in ((i, first), (j, second)):
        rays = (points[view] - pose[:3, 3]).reshape(-1, 3)
        angles.append(np.arctan2(rays @ side, rays @ up))
    low, high = max(a.min() for a in angles), min(a.max() for a in angles)
    if high <= low:
        return None
    count = min(PLANES, cameras.height)
    first_planes, second_planes = (
        np.floor((a - low) / (high - low) * count).astype(np.int64) for a in angles
    )
    return tuple(np.where((p >= 0) & (p < count), p, -1) for p in (first_planes, second_planes))  # type: ignore[return-value]


def _barcode(change: Array, planes: NDArray[np.int64]) -> Array:
    """Change summed per epipolar plane, ``[planes, T - 1]``."""
    inside = planes >= 0
    where = planes[inside]
    count = int(where.max(initial=0)) + 1
    rows = [np.bincount(where, frame[inside], max(count, PLANES)) for frame in change]
    return np.stack(rows, 1).astype(np.float64)


def correlate(first: NDArray[Any], second: NDArray[Any], reach: int) -> Array:
    """Pooled correlation ``[2 reach + 1]`` of signals ``[N, T]`` over offsets of the second, up to `reach`.

    Every overlap is centred by itself and counts by the root of its share, so that chance in short ones does not win.
    """
    a, b = first.shape[1], second.shape[1]
    out = np.zeros(2 * reach + 1)
    for k, lag in enumerate(range(-reach, reach + 1)):
        start, stop = max(0, -lag), min(a, b - lag)
        if stop - start < 3:
            continue
        x, y = first[:, start:stop], second[:, start + lag : stop + lag]
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
        scale = np.sqrt((x * x).sum(1) * (y * y).sum(1)).sum()
        out[k] = (x * y).sum() / scale * np.sqrt((stop - start) / min(a, b)) if scale > 1e-12 else 0.0
    return out


def _distinct(curve: Array, chance: float) -> float:
    """How far the peak of a correlation stands out from all that is two or more frames away, and from chance."""
    peak = int(curve.argmax())
    height = curve[peak]
    if height <= 0:
        return 0.0
    rest = np.delete(curve, range(max(0, peak - 1), min(len(curve), peak + 2)))
    alone = np.clip(1 - max(rest.max(initial=0.0), 0) / height, 0, 1)
    return float(alone * np.clip((height - chance) / STRONG, 0, 1))


def _place(
    curves: Mapping[tuple[int, int], Array], sure: Mapping[tuple[int, int], float], count: int, reach: int
) -> NDArray[np.int64]:
    """Whole offsets ``[V]`` with the largest sum of correlations, each weighed by how sure its pair is; the first is 0."""

    def score(places: Mapping[int, int], view: int, at: int) -> float:
        total = 0.0
        for other, there in places.items():
            if other == view:
                continue
            pair, lag = ((view, other), there - at) if view < other else ((other, view), at - there)
            total += (sure[pair] + 1e-3) * curves[pair][lag + reach] if abs(lag) <= reach else -1.0
        return total

    best, chosen = -np.inf, np.zeros(count, np.int64)
    for pair in sorted(sure, key=lambda p: -sure[p])[:3]:
        for lag in np.argsort(-curves[pair])[:3] - reach:
            places = {pair[0]: 0, pair[1]: int(lag)}
            while len(places) < count:
                free = [v for v in range(count) if v not in places]
                options = [
                    (score(places, v, at), v, at) for v in free for at in range(-2 * reach, 2 * reach + 1)
                ]
                _, view, at = max(options)
                places[view] = at
            for _, view in itertools.product(range(3), range(count)):
                places[view] = max(
                    range(-2 * reach, 2 * reach + 1), key=lambda at, v=view: score(places, v, at)
                )
            total = sum(score(places, v, at) for v, at in places.items())
            if total > best:
                best, chosen = total, np.array([places[v] - places[0] for v in range(count)])
    return chosen


def _near(curve: Array, lag: int, reach: int) -> int | None:
    """The index of the highest of three values about a lag, None outside."""
    k = lag + reach
    if not 0 <= k < len(curve):
        return None
    low = max(0, k - 1)
    return low + int(curve[low : k + 2].argmax())


def _refine(
    curves: Mapping[tuple[int, int], Array],
    sure: Mapping[tuple[int, int], float],
    whole: NDArray[np.int64],
    reach: int,
) -> Array:
    """Fractions of a frame: a parabola through the peak of every pair, all pairs made to agree by least squares."""
    count = len(whole)
    rows, values = [np.eye(count)[0] * 10], [0.0]
    for (i, j), curve in curves.items():
        k = _near(curve, int(whole[j] - whole[i]), reach)
        if k is None or curve[k] <= 0:
            continue
        peak = float(k - reach)
        if 0 < k < len(curve) - 1 and (bend := curve[k - 1] - 2 * curve[k] + curve[k + 1]) < 0:
            peak += float(np.clip(0.5 * (curve[k - 1] - curve[k + 1]) / bend, -0.5, 0.5))
        weight = curve[k] * (sure[i, j] + 1e-3)
        rows.append(weight * (np.eye(count)[j] - np.eye(count)[i]))
        values.append(weight * (peak - (whole[j] - whole[i])))
    shift = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[
        0
    ]  # streams without a pair stay where they are
    return whole + shift - shift[0]


def _chain(
    curves: Mapping[tuple[int, int], Array],
    sure: Mapping[tuple[int, int], float],
    whole: NDArray[np.int64],
    reach: int,
) -> Array:
    """The confidence of every stream: the weakest pair on the surest chain to the first one, for pairs that peak where the
    streams were placed."""
    count = len(whole)
    links = np.zeros((count, count))
    for (i, j), curve in curves.items():
        k = _near(curve, int(whole[j] - whole[i]), reach)
        links[i, j] = links[j, i] = 0.0 if k is None or abs(k - curve.argmax()) > 1 else sure[i, j]
    reached = links[0].copy()
    reached[0] = links[0].max()
    for _ in range(count):
        reached = np.maximum(reached, np.minimum(reached[:, None], links).max(0))
    return reached
