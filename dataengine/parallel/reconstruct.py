"""Fit a scene to each of many episodes, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataengine.errors import closest
from dataengine.jsontext import through_json
from dataengine.lerobot.reader import EpisodeDataset
from dataengine.parallel.workers import fan_out

if TYPE_CHECKING:  # what loads torch is loaded where it is used: other tasks begin without it
    from dataengine.reconstruct import Reconstruction
    from dataengine.storage import AnyPath


def reconstruct_parallel(
    dataset: AnyPath,
    folder: AnyPath,
    episodes: Sequence[int] | None = None,
    settings: Reconstruction | None = None,
    *,
    views: Sequence[str] | None = None,
    workers: int = 2,
    address: str | None = None,
    retries: int = 2,
    progress: bool = True,
) -> list[Path]:
    """Fit a scene to each episode; ``folder/scene-000007/scene.safetensors`` is that of episode 7.

    Running again fits what is missing alone, and a fit that was stopped, or whose process died, goes on from its last
    checkpoint.

    Args:
        dataset: folder of an episode dataset with camera poses.
        folder: where the scenes shall lie; on a cluster both are folders that all its machines share.
        episodes: which; None for all.
        settings: how to fit.
        views: to which views; None for all.
        workers, address, retries, progress: as for :func:`dataengine.parallel.fan_out`.

    Returns:
        The paths of the scenes, which `dataengine.scene.Scene.load` reads, in the order of `episodes`.

    Raises:
        ValueError: an episode or a view that is not there.
        WorkError: episodes that cannot be fitted; the others are finished first. One of them may be that its folder holds
            a scene of other settings or pictures.
        ImportError, ConnectionError, OSError: as :func:`dataengine.parallel.fan_out` says.
    """
    from dataengine.reconstruct import Reconstruction

    source = EpisodeDataset(Path(dataset))
    chosen = range(len(source)) if episodes is None else episodes
    for index in chosen:
        if not 0 <= index < len(source):
            raise ValueError(f"episodes: expected 0 to {len(source) - 1}, got {index}")
    for view in views or ():
        if view not in source.views:
            raise ValueError(f"views: unknown view {view!r}; {closest(view, source.views)}")
    task = FitEpisode(
        Path(dataset).resolve(),
        Path(folder).resolve(),
        tuple(views) if views is not None else None,
        settings or Reconstruction(),
    )
    return fan_out(
        task,
        chosen,
        workers=workers,
        address=address,
        retries=retries,
        name=lambda index: f"episode {index}",
        progress=progress,
    )


@dataclass(frozen=True)
class FitEpisode:
    """A task: fit a scene to an episode, unless that is done.

    Attributes:
        dataset, folder, views, settings: as for :func:`reconstruct_parallel`.
    """

    dataset: Path
    folder: Path
    views: tuple[str, ...] | None
    settings: Reconstruction

    @cached_property
    def _source(self) -> EpisodeDataset:
        return EpisodeDataset(self.dataset)

    def __call__(self, index: int) -> Path:
        from dataengine.reconstruct import reconstruct
        from dataengine.views import Views

        folder = self.folder / f"scene-{index:06d}"
        path = folder / "scene.safetensors"
        self._claim(folder, index)
        if not path.exists():
            episode = self._source.episode(index, views=self.views)
            reconstruct(Views.from_episode(episode), self.settings, folder=folder).save(path)
        (folder / "fit.safetensors").unlink(missing_ok=True)  # its state, three times as large as the scene
        return path

    def _claim(self, folder: Path, index: int) -> None:
        """Note in a new folder what its scene is of; ValueError where it is of something else."""
        from dataengine.storage import read_json, write_json

        path, wanted = folder / "scene.json", self._description(index)
        if not path.exists():
            write_json(path, wanted)
        found = read_json(path)
        for key, value in wanted.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{folder}: expected a scene of the same {key}, got another; remove it or choose another folder"
                )

    def _description(self, index: int) -> dict[str, Any]:
        """What the scene depends on, as JSON: settings, names of views, and the episode by its digest."""
        from dataengine.digests import digest_episode
        from dataengine.fit import bound

        views = self.views or tuple(self._source.views)
        plan = asdict(self.settings) | {"fit": bound(self.settings.fit)}
        episode = digest_episode(self._source, index, self._source.cameras(index, views))
        return through_json({"settings": plan, "views": views, "episode": episode})
