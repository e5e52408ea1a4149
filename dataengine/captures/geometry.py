"""What poses and depth say about their own conventions: focus of the optical axes, agreement of depth across views.

The tests here are blind to image content. A rig whose cameras look outwards, or nearly in parallel, gives no verdict
from its poses alone; depth settles both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Axes = Literal["opencv", "opengl", "world_to_camera", "opengl_world_to_camera"]
AXES: tuple[str, ...] = get_args(Axes)
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # y up, z back to y down, z forward; its own inverse

PARALLEL = 0.0075  # smallest eigenvalue of the focus system for two axes 10 degrees apart
FAR = 1e15  # what no number of a capture reaches
SAMPLES, PAIRS = 250, 20
CLOSE = 0.05  # two depths of one point agree within 5 %
SCALES = np.geomspace(1e-4, 1e4, 161)
SOUND = 0.3  # agreement of depth between views that no other reading of the poses comes near
CLEAR = 0.25  # and that no views reach by chance
DWARFED = 3.0  # times the distance between cameras beyond which depth lets views agree by chance
WORDS = {
    "opencv": "OpenCV axes (y down, z forward)",
    "opengl": "OpenGL axes (y up, z back)",
    "world_to_camera": "world-to-camera matrices",
    "opengl_world_to_camera": "world-to-camera matrices with OpenGL axes (y up, z back)",
}


def check_axes(axes: str, *more: str) -> None:
    """Raise ``ValueError`` unless `axes` is one of :data:`AXES` or `more`."""
    if axes not in (*AXES, *more):
        raise ValueError(
            f"axes: expected one of {', '.join((*AXES, *more))}, got {axes!r}; say how the poses are written"
        )


def inverse(poses: NDArray[Any]) -> Array:
    """Inverses of rigid matrices ``[..., 4, 4]``."""
    poses = np.asarray(poses, np.float64)
    out = np.zeros_like(poses)
    out[..., :3, :3] = np.swapaxes(poses[..., :3, :3], -1, -2)
    out[..., :3, 3] = -np.einsum("...ij,...j->...i", out[..., :3, :3], poses[..., :3, 3])
    out[..., 3, 3] = 1
    return out


def to_opencv(poses: NDArray[Any], axes: str) -> Array:
    """Poses ``[..., 4, 4]`` written in `axes` as camera-to-world with OpenCV axes; each conversion is its own inverse
    but for ``opengl_world_to_camera``."""
    check_axes(axes)
    poses = np.asarray(poses, np.float64)
    if "world_to_camera" in axes:
        poses = inverse(poses)
    return poses @ OPENGL if axes.startswith("opengl") else poses


def from_opencv(poses: NDArray[Any], axes: str) -> Array:
    """Poses ``[..., 4, 4]``, camera to world with OpenCV axes, as `axes` writes them: undoes :func:`to_opencv`."""
    check_axes(axes)
    poses = np.asarray(poses, np.float64)
    poses = poses @ OPENGL if axes.startswith("opengl") else poses
    return inverse(poses) if "world_to_camera" in axes else poses


def compose_axes(first: str, second: str) -> str:
    """The way of writing that equals two readings one after the other, but for a turn of the world: a second reading that
    inverts brings the axes that the first one turned to the side of the world."""
    back = "world_to_camera" in second
    inverted = ("world_to_camera" in first) != back
    turned = (first.startswith("opengl") and not back) != second.startswith("opengl")
    return {(0, 0): "opencv", (0, 1): "opengl", (1, 0): "world_to_camera", (1, 1): "opengl_world_to_camera"}[
        inverted, turned
    ]


def focus(poses: NDArray[Any]) -> Array | None:
    """The point ``[3]`` nearest to all optical axes, in least squares; None for axes within 10 degrees of parallel or
    cameras in one place."""
    centres, axes = poses[:, :3, 3], poses[:, :3, 2]
    if len(poses) < 2 or np.ptp(centres, axis=0).max() <= 1e-9 * max(1.0, np.abs(centres).max()):
        return None
    away = np.eye(3) - axes[:, :, None] * axes[:, None]
    system = away.mean(0)
    if np.linalg.eigvalsh(system)[0] < PARALLEL:
        return None
    return np.linalg.solve(system, np.einsum("nij,nj->i", away, centres) / len(poses))


def focus_score(poses: NDArray[Any], intrinsics: NDArray[Any], size: tuple[int, int]) -> float | None:
    """Share of cameras ``[N, 4, 4]`` that have the focus of all of them in their picture, `size` (width, height) pixels,
    each by the cosine of how far from its axis; None where there is no focus."""
    point = focus(poses)
    if point is None:
        return None
    local = np.einsum("nji,nj->ni", poses[:, :3, :3], point - poses[:, :3, 3])
    depth = local[:, 2]
    near = 0.02 * np.abs(depth).max()
    with np.errstate(divide="ignore", invalid="ignore"):
        pixels = np.einsum("nij,nj->ni", intrinsics, local / depth[:, None])[:, :2]
    central = depth / np.maximum(np.linalg.norm(local, axis=1), 1e-12)
    share = float((central * ((depth > near) & (pixels >= 0).all(1) & (pixels < size).all(1))).mean())
    # matrices read the wrong way round may all stand in one place far from the origin: there the other reading wins a tie
    centres = poses[:, :3, 3]
    spread = np.ptp(centres, axis=0).max() / max(np.abs(centres).max(), 1e-12)
    return share * (0.97 + 0.03 * min(1.0, float(spread)))


def depth_agreement(
    poses: NDArray[Any], intrinsics: NDArray[Any], depth: NDArray[Any], scales: NDArray[Any] = SCALES
) -> Array:
    """For every factor on the depth, the share of sampled points that two views see at the same depth.

    Args:
        poses: camera to world, OpenCV axes, ``[V, 4, 4]`` of one moment.
        intrinsics: ``[V, 3, 3]`` pixels.
        depth: ``[V, H, W]`` along the axis, 0 where not known.
        scales: ``[S]`` factors.

    Returns:
        ``[S]`` in [0, 1]; what is hidden from the other view never agrees, so 1 is not reached.
    """
    random = np.random.default_rng(0)
    pairs = [(i, j) for i in range(len(poses)) for j in range(len(poses)) if i != j]
    if len(pairs) > PAIRS:
        pairs = [pairs[k] for k in random.permutation(len(pairs))[:PAIRS]]
    agreed, total = np.zeros(len(scales)), 0
    for i, j in pairs:
        rows, columns = np.nonzero(depth[i] > 0)
        if not len(rows):
            continue
        chosen = random.permutation(len(rows))[:SAMPLES]
        rows, columns = rows[chosen], columns[chosen]
        points = _rays(intrinsics[i], rows, columns) * depth[i][rows, columns][:, None]
        turn = poses[j][:3, :3].T @ poses[i][:3, :3]
        step = poses[j][:3, :3].T @ (poses[i][:3, 3] - poses[j][:3, 3])
        local = scales[:, None, None] * (points @ turn.T) + step  # [S, N, 3]
        agreed += _agree(local, intrinsics[j], depth[j], scales).sum(1)
        total += len(rows)
    return agreed / max(total, 1)


def _rays(intrinsics: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any]) -> Array:
    """Points at depth 1 on the rays through pixel centres, ``[N, 3]`` in the camera."""
    pixels = np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))], 1)
    return pixels @ np.linalg.inv(intrinsics).T


def _agree(
    local: Array, intrinsics: NDArray[Any], depth: NDArray[Any], scales: NDArray[Any]
) -> NDArray[np.bool_]:
    """Which points ``[S, N, 3]`` in a camera lie where its own depth map, scaled, has something."""
    z = local[..., 2]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        pixels = (local / z[..., None]) @ intrinsics[:2].T
    height, width = depth.shape
    inside = (z > 0) & (pixels >= 0).all(-1) & (pixels[..., 0] < width) & (pixels[..., 1] < height)
    where = np.where(inside[..., None], pixels, 0).astype(np.int64)
    seen = depth[where[..., 1], where[..., 0]] * scales[:, None]
    return inside & (seen > 0) & (np.abs(z - seen) < CLOSE * seen)


def depth_factor(
    poses: NDArray[Any], intrinsics: NDArray[Any], depth: NDArray[Any]
) -> tuple[float, float, float]:
    """The factor by which depth must be multiplied to fit the poses; shares of agreement at that factor and at 1."""
    score = _credible(depth_agreement(poses, intrinsics, depth), poses, depth)
    best = SCALES[score.argmax()]
    fine = best * np.geomspace(0.88, 1.136, 41)
    finer = depth_agreement(poses, intrinsics, depth, np.append(fine, 1.0))
    top = finer[:-1] >= finer[:-1].max() - 0.02  # the middle of the plateau
    return float(np.exp(np.log(fine[top]).mean())), float(finer[:-1].max()), float(finer[-1])


def _credible(agreement: Array, poses: NDArray[Any], depth: NDArray[Any]) -> Array:
    """Agreement at each of :data:`SCALES`, 0 where it may be chance: cameras seem to stand in one place when depth is
    scaled far beyond the distance between them, and such views agree somewhere."""
    centres, known = poses[:, :3, 3], depth[depth > 0]
    apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1).max()
    dwarfed = SCALES * (np.median(known) if len(known) else 0.0) > DWARFED * apart
    return np.where(dwarfed & (agreement < SOUND), 0.0, agreement)


def score_axes(
    poses: NDArray[Any],
    intrinsics: NDArray[Any],
    size: tuple[int, int],
    depth: NDArray[Any] | None = None,
    candidates: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, float | None]:
    """How well poses fit their own geometry under each way of writing them.

    Args:
        poses: ``[V, 4, 4]`` as given.
        intrinsics: ``[V, 3, 3]`` pixels.
        size: (width, height) pixels.
        depth: ``[V, H, W]`` of any scale; then depth decides alone.
        candidates: name -> poses with OpenCV axes; None for every one of :data:`AXES`.

    Returns:
        name -> share in [0, 1], None where nothing can be said.
    """
    candidates = candidates or {axes: to_opencv(poses, axes) for axes in AXES}
    if depth is not None and len(poses) > 1:
        agreement = {name: depth_agreement(p, intrinsics, depth) for name, p in candidates.items()}
        return {name: float(_credible(agreement[name], p, depth).max()) for name, p in candidates.items()}
    return {name: focus_score(p, intrinsics, size) for name, p in candidates.items()}


def better_axes(
    scores: Mapping[str, float | None], given: str = "opencv", *, depth: bool = False
) -> str | None:
    """The way of writing that fits clearly better than the `given` one, or None.

    From poses alone: most cameras see the common focus, where at most half did. With depth: twice the agreement, of a
    quarter of the points at least: views that share nothing agree about up to a seventh by chance, views that do under
    the right reading about two fifths and more.
    """
    there = scores[given] or 0.0
    name = max(scores, key=lambda n: scores[n] or 0.0)
    best = scores[name] or 0.0
    clear = best > max(CLEAR, 2 * there + 0.05) if depth else there <= 0.5 and best >= 0.7
    return name if name != given and clear else None


def depth_reach(poses: NDArray[Any]) -> float:
    """The length scale of a rig ``[N, 4, 4]``: distance from its cameras to their focus, else the largest distance between
    two of them; 0 for one camera."""
    centres, point = poses[:, :3, 3], focus(poses)
    if point is not None:
        return float(np.linalg.norm(centres - point, axis=1).max())
    return float(np.linalg.norm(centres[:, None] - centres[None], axis=-1).max())


def sees(
    pose: NDArray[Any], intrinsics: NDArray[Any], size: tuple[int, int], points: NDArray[Any]
) -> NDArray[np.bool_]:
    """Which points ``[N, 3]`` of the world lie before a camera and within its picture of `size` (width, height)."""
    local = (points - pose[:3, 3]) @ pose[:3, :3]
    depth = local[:, 2]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        pixels = (local / depth[:, None]) @ intrinsics[:2].T
    return (depth > 0) & (pixels >= 0).all(1) & (pixels < size).all(1)


def sample_points(
    pose: NDArray[Any],
    intrinsics: NDArray[Any],
    size: tuple[int, int],
    depth: NDArray[Any] | None,
    reach: float,
    count: int = SAMPLES,
) -> Array:
    """Points ``[N, 3]`` that a camera may see: of its depth ``[H, W]``, or along its rays from a tenth to ten times
    `reach`."""
    random = np.random.default_rng(0)
    if depth is not None:
        rows, columns = np.nonzero(depth > 0)
        chosen = random.permutation(len(rows))[:count]
        rows, columns = rows[chosen], columns[chosen]
        length = depth[rows, columns]
    else:
        rows, columns = random.integers(0, size[1], count), random.integers(0, size[0], count)
        length = (reach or 1.0) * 10 ** random.uniform(-1, 1, count)
    return (_rays(intrinsics, rows, columns) * length[:, None]) @ pose[:3, :3].T + pose[:3, 3]
