"""Live viewers, both of the extra `viewer`: viser, in a browser, and Rerun, whose recordings can be kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataengine import rotations
from dataengine.cameras import Cameras
from dataengine.errors import MissingPackage
from dataengine.export.film import FIXED, GaussianFilm, as_film
from dataengine.gaussians import Gaussians
from dataengine.storage import AnyPath, atomic_write

_WIRE = 0.12  # metres: depth of the pyramid that stands for a camera


def show_viser(
    frames: GaussianFilm | Iterable[Gaussians],
    cameras: Cameras | None = None,
    fps: float | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    block: bool = True,
) -> Any:
    """Serve the scene with viser at http://host:port and return the server.

    What never moves is sent once; a slider and a play button choose the frame; a click on a camera looks through it.

    Args:
        frames: a film, or the Gaussians of each frame.
        cameras, fps: by default those of the film; cameras that move are shown at frame 0.
        host, port: where to listen; viser takes the next free port.
        block: serve until interrupted; otherwise return at once, and ``server.stop()`` ends it.

    Raises:
        ImportError: viser is missing. ValueError: as ``GaussianFilm.from_frames``.
    """
    try:
        import viser
    except ImportError as error:
        raise _missing("viser", error) from error
    film = as_film(frames, fps, cameras)
    server = viser.ViserServer(host=host, port=port, verbose=block)
    server.scene.set_up_direction("+z")
    moving = film.motion != FIXED
    if not moving.all():
        server.scene.add_gaussian_splats("/still", **_for_viser(film.canonical[~moving]))
    shots: list[Any] = []
    if moving.any():
        for t in range(len(film)):
            splats = _for_viser(film.at(t)[moving])
            shots.append(server.scene.add_gaussian_splats(f"/frame/{t}", **splats, visible=t == 0))
    if film.cameras is not None:
        _add_cameras(server, film.cameras.at(0))
    if len(shots) > 1:
        _add_timeline(server, shots, film.fps)
    while block:
        time.sleep(1)
    return server


def log_rerun(
    frames: GaussianFilm | Iterable[Gaussians],
    cameras: Cameras | None = None,
    fps: float | None = None,
    *,
    path: AnyPath | None = None,
    name: str = "scene",
) -> Any:
    """Log the scene to Rerun: to the file `path` (.rrd) or, without one, to a viewer that is started.

    Frames lie on the timelines `frame` and `time` (seconds). Releases without splats get ellipsoids of one standard
    deviation. Returns the recording, or the path.

    Raises:
        ImportError: rerun-sdk is missing. ValueError: as ``GaussianFilm.from_frames``. OSError: a full disk.
    """
    rerun = import_rerun()
    film = as_film(frames, fps, cameras)
    recording = rerun.RecordingStream(name)
    if path is None:
        recording.spawn()
        _log(rerun, recording, film)
        return recording
    with atomic_write(path) as temporary:
        recording.save(temporary)
        _log(rerun, recording, film)
        recording.flush()
        recording.disconnect()
    return Path(path)


def import_rerun() -> Any:
    """The package rerun; MissingPackage, an ImportError in one sentence, where it is not installed."""
    try:
        import rerun
    except ImportError as error:
        raise _missing("rerun-sdk", error) from error
    return rerun


def _missing(package: str, error: ImportError) -> MissingPackage:
    return MissingPackage(
        f"{package}: expected the package, got {error}; run pip install 'enerverse[viewer]'"
    )


def _for_viser(gaussians: Gaussians) -> dict[str, NDArray[Any]]:
    axes = rotations.to_matrix(gaussians.quats) * gaussians.scales.exp()[:, None]
    arrays = {
        "centers": gaussians.means,
        "covariances": axes @ axes.mT,
        "rgbs": gaussians.colors.clamp(0, 1),
        "opacities": gaussians.opacities.sigmoid()[:, None],
    }
    return {name: value.float().numpy() for name, value in arrays.items()}


def _add_cameras(server: Any, cameras: Cameras) -> None:
    wxyz = rotations.from_matrix(torch.from_numpy(cameras.camera_to_world[:, :3, :3])).numpy()
    places = cameras.camera_to_world[:, :3, 3]
    for index, name in enumerate(cameras.names):
        fov = 2 * np.arctan(0.5 * cameras.height / cameras.intrinsics[index, 1, 1])
        wire = server.scene.add_camera_frustum(
            f"/cameras/{name}",
            fov=float(fov),
            aspect=cameras.width / cameras.height,
            scale=_WIRE,
            wxyz=wxyz[index],
            position=places[index],
        )

        @wire.on_click
        def _(event: Any, wxyz: Any = wxyz[index], place: Any = places[index], fov: float = fov) -> None:
            event.client.camera.wxyz, event.client.camera.position = wxyz, place
            event.client.camera.fov = float(fov)


def _add_timeline(server: Any, shots: list[Any], fps: float) -> None:
    """A slider and a play button; a thread of its own turns the pages."""
    slider = server.gui.add_slider("frame", min=0, max=len(shots) - 1, step=1, initial_value=0)
    playing = server.gui.add_checkbox("play", initial_value=False)
    shown = [0]

    @slider.on_update
    def _(event: Any) -> None:
        with server.atomic():
            shots[shown[0]].visible = False
            shots[slider.value].visible = True
        shown[0] = slider.value

    def turn_pages() -> None:
        while True:
            time.sleep(1 / fps)
            if playing.value:
                slider.value = (slider.value + 1) % len(shots)

    threading.Thread(target=turn_pages, daemon=True).start()


def _log(rerun: Any, recording: Any, film: GaussianFilm) -> None:
    recording.log("world", rerun.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
    moving = film.motion != FIXED
    if not moving.all():
        recording.log("world/still", _for_rerun(rerun, film.canonical[~moving]), static=True)
    for t in range(len(film)):
        recording.set_time("frame", sequence=t)
        recording.set_time("time", duration=t / film.fps)
        if moving.any():
            recording.log("world/moving", _for_rerun(rerun, film.at(t)[moving]))
        if film.cameras is not None and (t == 0 or film.cameras.frames is not None):
            _log_cameras(rerun, recording, film.cameras.at(t), static=film.cameras.frames is None)


def _for_rerun(rerun: Any, gaussians: Gaussians) -> Any:
    xyzw = torch.nn.functional.normalize(gaussians.quats.float(), dim=1).roll(-1, 1).numpy()
    colors = torch.cat([gaussians.colors, gaussians.opacities.sigmoid()[:, None]], 1).float().clamp(0, 1)
    parts = {"quaternions": xyzw, "colors": (colors * 255).round().byte().numpy()}
    centers, scales = gaussians.means.float().numpy(), gaussians.scales.float().exp().numpy()
    if hasattr(rerun, "GaussianSplats3D"):
        return rerun.GaussianSplats3D(centers, scales=scales, **parts)
    return rerun.Ellipsoids3D(
        centers=centers, half_sizes=scales, fill_mode=rerun.components.FillMode.Solid, **parts
    )


def _log_cameras(rerun: Any, recording: Any, cameras: Cameras, *, static: bool) -> None:
    for index, name in enumerate(cameras.names):
        pose, where = cameras.camera_to_world[index], f"world/cameras/{name}"
        transform = rerun.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3])
        recording.log(where, transform, static=static)
        lens = rerun.Pinhole(
            image_from_camera=cameras.intrinsics[index],
            resolution=[cameras.width, cameras.height],
            image_plane_distance=_WIRE,
        )
        recording.log(where, lens, static=static)
