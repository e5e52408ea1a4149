"""Datasets that were made from others: what every frame keeps of its source, and what is written beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataengine import rotations
from dataengine.digests import digest_episode, digest_generator
from dataengine.episodes import Bodies, Episode, EpisodeDataset, EpisodeWriter
from dataengine.fit import bound
from dataengine.jsontext import difference, through_json
from dataengine.lerobot import metadata
from dataengine.lerobot.layout import PROVENANCE_LEGEND
from dataengine.sources import Reading
from dataengine.storage import read_json, write_json
from dataengine.views import Views

if TYPE_CHECKING:
    from dataengine.generators import Generator
    from dataengine.multiview import Multiview

RECORD = Path("meta", "multiview.json")
RANGE = (0.02, 10.0)  # metres of depth that a source without a range of its own is kept in
NEAREST = 1e-3  # metres


def writer_arguments(
    dataset: EpisodeDataset, reading: Reading, settings: Multiview, episode: int
) -> dict[str, Any]:
    """Keyword arguments of the writer for the frames of `dataset` with the new views beside those that are read."""
    first = dataset.episode(episode, 0, 1, views=reading.names)
    seen = reading.views(first)
    new = settings.new_cameras(reading.cameras(dataset, episode)).names
    for name, values in (("state", first.state), ("action", first.action)):
        if not values.shape[1]:
            raise ValueError(f"{dataset.root}: expected {name} in every frame, found none; record with it")
    ids = seen.body_ids is not None and settings.flywheel.start.motion in ("auto", "rigid")
    return {
        "fps": dataset.fps,
        "views": (*reading.names, *new),
        "image_size": (seen.cameras.height, seen.cameras.width),
        "state_dim": first.state.shape[1],
        "action_dim": first.action.shape[1],
        "depth": seen.depth is not None,
        "cameras": True,
        "bodies": dataset.bodies,
        "body_ids": bool(dataset.bodies) and ids,
        "extra": {name: values.shape[1] for name, values in first.extra.items()},
        "robot_type": dataset.info.get("robot_type") or "unknown",
        "depth_range": _depth_range(dataset, reading),
    }


def _depth_range(dataset: EpisodeDataset, reading: Reading) -> tuple[float, float] | None:
    """In metres: from the nearest to the farthest that any view holds, so that codes of one range stay as they are."""
    found = [r for name in reading.names if (r := dataset.depth_range(name)) is not None]
    if not found:
        return None
    near, far = (
        reading.depth_scale * limit for limit in (min(r[0] for r in found), max(r[1] for r in found))
    )
    return max(near, NEAREST), far


def add_window(writer: EpisodeWriter, episode: Episode, views: Views) -> None:
    """Frames of `episode` with the pictures, depth and ids of `views`."""
    assert views.provenance is not None
    images = (views.images * 255).round().byte().numpy()
    near = writer.spec.depth_codec.near
    depth = None if views.depth is None else views.depth.clamp_min(near).numpy()
    ids = None if views.body_ids is None else views.body_ids.numpy()
    poses = None if episode.bodies is None else body_vectors(episode.bodies)

    def at(pictures: Any, t: int) -> dict[str, Any] | None:
        return None if pictures is None else dict(zip(views.names, pictures[t], strict=True))

    for t in range(len(views)):
        words = [PROVENANCE_LEGEND[int(code)] for code in views.provenance[t]]
        writer.add_frame(
            images=at(images, t) or {},
            state=episode.state[t],
            action=episode.action[t],
            task=episode.task,
            cameras=views.cameras.at(t),
            depth=at(depth, t) if writer.spec.depth else None,
            bodies=None if poses is None else dict(zip(writer.spec.bodies, poses[t], strict=True)),
            body_ids=at(ids, t) if writer.spec.body_ids else None,
            extra={name: values[t] for name, values in episode.extra.items()},
            provenance=dict(zip(views.names, words, strict=True)),
            timestamp=float(episode.timestamp[t]),
        )


def body_vectors(bodies: Bodies) -> np.ndarray:
    """Poses as ``[T, n, 7]``: x y z in metres, quaternion wxyz."""
    import torch

    turns = rotations.from_matrix(torch.from_numpy(bodies.poses[..., :3, :3])).numpy()
    return np.concatenate([bodies.poses[..., :3, 3], turns], -1)


class MadeDataset:
    """`meta/multiview.json`: settings that bind every episode, and the figures of each.

    Raises ValueError where the folder was made with other settings, from other data or by another generator.
    """

    def __init__(
        self, root: Path, source: EpisodeDataset, reading: Reading, settings: Multiview, generator: Generator | None
    ):  # fmt: skip
        self.path, self.root, self.source, self.reading = root / RECORD, root, source, reading
        self.bound = through_json(describe(source, settings, generator))
        self.probe: dict[str, Any] | None = None
        self.figures: list[dict[str, Any]] = []
        begun = any((root / "meta" / "episodes").glob("*/*.parquet"))
        if self.path.is_file():
            there = self._read()
            if begun or all(there[key] == value for key, value in self.bound.items()):
                self._take_up(there)
        elif begun:
            raise ValueError(
                f"out: expected a folder of this dataset's views, got {root}, which holds another dataset; name another"
            )

    def _read(self) -> dict[str, Any]:
        """What the file says; ValueError where it is not of this shape."""
        there = read_json(self.path)
        wanted = {*self.bound, "probe", "episodes"}
        rows = there.get("episodes") if isinstance(there, dict) else None
        fields = {"episode", "source", "frames", "input_psnr", "cover", "rounds", "seconds"}
        if not isinstance(rows, list) or wanted - set(there) or any(fields - set(row) for row in rows):
            raise ValueError(
                f"{self.path}: expected what a dataset was made from, as this version writes it, got something else; "
                "choose another folder"
            )
        return there

    def _take_up(self, there: dict[str, Any]) -> None:
        for key, value in self.bound.items():
            if there.get(key) != value:
                found, wanted = difference(there.get(key), value)
                raise ValueError(
                    f"{key}: expected {found} as in {self.root}, got {wanted}; choose another folder or the same settings"
                )
        self.figures, self.probe = there["episodes"], there["probe"]

    def check_finished(self, episodes: Sequence[int]) -> int:
        """How many of `episodes` are finished. Raises ValueError where what is there are not their first ones."""
        lengths = [meta.length for _, meta in sorted(metadata.read_episode_table(self.root).items())]
        wanted = [self.source.lengths[index] for index in episodes]
        named = [row["episode"] for row in self.figures[: len(lengths)]]
        if lengths != wanted[: len(lengths)] or named != list(episodes[: len(lengths)]):
            raise ValueError(
                f"{self.root}: expected its {len(lengths)} episodes to be the first of those asked for, got others; "
                "choose another folder"
            )
        for row in self.figures[: len(lengths)]:
            if row["source"] != self._digest(row["episode"]):
                raise ValueError(
                    f"{self.root}: expected episode {row['episode']} of {self.source.root} as it was, got another; choose "
                    "another folder"
                )
        del self.figures[len(lengths) :]  # of an episode that was not published
        return len(lengths)

    def _digest(self, episode: int) -> str:
        return digest_episode(self.source, episode, self.reading.cameras(self.source, episode))

    def add(self, episode: int, figures: dict[str, Any], frames: int, *, first: bool) -> None:
        """Figures of a window; those of an episode are means over its frames, seconds their sum."""
        if first:
            source = self._digest(episode)
            self.figures.append({"episode": episode, "source": source, "frames": frames, **figures})
            return
        row = self.figures[-1]
        share = frames / (row["frames"] + frames)
        for name, value in figures.items():
            row[name] = _mixed(row[name], value, 1.0 if name == "seconds" else share, add=name == "seconds")
        row["frames"] += frames

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.path, {**self.bound, "probe": self.probe, "episodes": self.figures})


def _mixed(old: Any, new: Any, share: float, *, add: bool) -> Any:
    if isinstance(old, dict):
        return {key: _mixed(old[key], new[key], share, add=add) for key in old}
    if old is None or new is None:
        return None
    return old + new if add else old + share * (new - old)


def describe(source: EpisodeDataset, settings: Multiview, generator: Generator | None) -> dict[str, Any]:
    """What all episodes of a made dataset have in common."""
    values = {name: getattr(settings, name) for name in ("views", "observed", "window", "size", "mend")}
    cameras = None if settings.cameras is None else json.loads(settings.cameras.to_json())
    wheel = asdict(settings.flywheel)
    wheel["start"]["fit"], wheel["refit"] = bound(settings.flywheel.start.fit), bound(settings.flywheel.refit)
    return {
        "dataset": source.root.resolve().name,
        "generator": "none" if generator is None else generator.name,
        "weights": digest_generator(generator),
        **values,
        "cameras": cameras,
        "flywheel": wheel,
    }
