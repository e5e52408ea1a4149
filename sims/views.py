"""Pictures of several cameras: taken as shots of one moment, drawn at once or later, here or in another thread."""

# pyright: reportAttributeAccessIssue=false
# mujoco's names come from compiled modules without stubs.

from collections.abc import Mapping, Sequence

import mujoco
import numpy as np

from sims.rendering import SharedRenderer, Shot

Pictures = dict[str, dict[str, np.ndarray]]


class Views:
    """Cameras of one model, what is wanted of each, and the tables that turn geom ids into classes and bodies.

    ``spare`` holds shots to use again; views of the same model may share it.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        cameras: Sequence[str],
        modalities: Sequence[str],
        size: int,
        tables: Mapping[str, np.ndarray],
        spare: list[Shot] | None = None,
    ) -> None:
        self.modalities, self.size = tuple(modalities), size
        self._model, self._tables = model, tables
        self._cameras = {name: model.camera(name).id for name in cameras}
        # Shots are costly to make. Appending and popping is safe between threads.
        self.spare: list[Shot] = [] if spare is None else spare

    def shoot(self, data: mujoco.MjData) -> dict[str, Shot]:
        """What every camera sees now; costs microseconds and no OpenGL."""
        shots = {}
        for name, index in self._cameras.items():
            shot = self.spare.pop() if self.spare else Shot(self._model)
            shot.take(data, index)
            shots[name] = shot
        return shots

    def draw(self, shots: Mapping[str, Shot], renderer: SharedRenderer) -> Pictures:
        """The observation's pictures {"images", "depth", ...: {camera: picture}}; the shots are used up."""
        found: Pictures = {key_of(m): {} for m in self.modalities} if shots else {}
        for name, shot in shots.items():
            drawn = renderer.draw(shot, self.modalities, self.size)
            self.spare.append(shot)
            for modality in self.modalities:
                table, picture = self._tables.get(modality), drawn[modality]
                found[key_of(modality)][name] = picture if table is None else table[picture]
        return found


def key_of(modality: str) -> str:
    """Where an observation holds the pictures of a modality."""
    return "images" if modality == "rgb" else modality


class Drawer:
    """Draws shots with an OpenGL context of its own: make, use and close it in one thread."""

    def __init__(self, views: Views) -> None:
        self._views, self._renderer = views, SharedRenderer()

    def draw(self, shots: Mapping[str, Shot]) -> Pictures:
        """The pictures that the environment would have observed when the shots were taken, bit for bit."""
        return self._views.draw(shots, self._renderer)

    def close(self) -> None:
        """Free the context."""
        self._renderer.free()
