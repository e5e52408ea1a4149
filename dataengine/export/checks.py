"""What every writer asks of Gaussians before it opens a file, and clears away after it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataengine.gaussians import Gaussians


def check_finite(gaussians: Gaussians, what: str) -> Gaussians:
    """The same Gaussians, detached and on the CPU.

    Raises ValueError, beginning with `what`, for a NaN or an infinity; an opacity may be infinite, as 1 and 0 are.
    """
    gaussians = gaussians.detach().to("cpu")
    for name, value in gaussians.parameters().items():
        bad = value.isnan() if name == "opacities" else ~value.isfinite()
        if bad.any():
            count = int(bad.flatten(1).any(1).sum() if bad.ndim > 1 else bad.sum())
            raise ValueError(
                f"{what}: expected finite {name}, got NaN or infinity in {count} of {len(gaussians)} Gaussians; drop "
                "those"
            )
    return gaussians


def check_frames(frames: Iterable[Gaussians]) -> list[Gaussians]:
    """The frames of one scene, detached and on the CPU.

    Raises ValueError where there is none, or where one has another number of Gaussians, degree or body than the first.
    """
    checked: list[Gaussians] = []
    for t, frame in enumerate(frames):
        if not isinstance(frame, Gaussians):
            raise TypeError(f"frames[{t}]: expected Gaussians, got {type(frame).__name__}; pass scene.at(t)")
        checked.append(check_finite(frame, f"frames[{t}]"))
        first, frame = checked[0], checked[-1]
        if (len(frame), frame.degree) != (len(first), first.degree):
            raise ValueError(
                f"frames[{t}]: expected {len(first)} Gaussians of degree {first.degree} as in the first frame, got "
                f"{len(frame)} of degree {frame.degree}; a scene keeps its Gaussians"
            )
        if not frame.body.equal(first.body):
            raise ValueError(
                f"frames[{t}]: expected the bodies of the first frame, got others; keep the order of the Gaussians"
            )
    if not checked:
        raise ValueError("frames: expected at least one frame of Gaussians, got none")
    return checked


def remove_other_frames(written: Sequence[Path]) -> None:
    """Remove from the folder of the frames `written`, named ``frame_0000`` and on, all frames that are not of them."""
    folder, suffix = written[0].parent, written[0].suffix
    for path in folder.glob(f"frame_*{suffix}"):
        if re.fullmatch(r"frame_\d{4,}", path.stem) and path not in written:
            path.unlink()
