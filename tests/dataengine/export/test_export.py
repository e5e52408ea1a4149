"""`export` as a whole, the optional viewers, and full disks."""

import errno
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataengine import export as package
from dataengine.export import GaussianFilm, export, read_film, read_ply_sequence, read_splat
from dataengine.export.viewers import _for_rerun, _for_viser, log_rerun, show_viser
from dataengine.gaussians import Gaussians

WRITERS = ("write_ply", "write_splat", "write_page")


def test_all_formats_at_once(tmp_path, scene, cameras, same) -> None:
    shots = scene()
    written = export(
        shots, tmp_path, ("ply", "splat", "film", "page"), cameras=cameras(), fps=20, title="Lift"
    )
    assert list(written) == ["ply", "splat", "film", "page"]
    frames, fps = read_ply_sequence(written["ply"])
    film = read_film(written["film"])
    assert fps == film.fps == 20
    assert all(same(*pair) for pair in zip(frames, film, strict=True))
    assert len(read_splat(written["splat"] / "frame_0004.splat")) == 60
    assert "<h1>Lift</h1>" in written["page"].read_text()
    again = read_film(export(film, tmp_path / "again", "film")["film"])  # a film keeps its rate and cameras
    assert again.cameras is not None
    assert (again.fps, again.cameras.to_json()) == (20, cameras().to_json())


def test_frames_of_a_longer_scene_are_removed(tmp_path, scene) -> None:
    export(scene(frames=4), tmp_path, ("ply", "splat"))
    written = export(scene(frames=2), tmp_path, ("ply", "splat"))
    for name in ("ply", "splat"):
        assert sorted(p.stem for p in written[name].glob(f"*.{name}")) == ["frame_0000", "frame_0001"]


def test_a_generator_of_frames_is_enough(tmp_path, scene) -> None:
    written = export((shot for shot in scene()), tmp_path)
    assert sorted(written) == ["film", "page", "ply"]


def test_unknown_format(tmp_path, scene) -> None:
    with pytest.raises(ValueError, match="formats: expected some of ply, .* got 'plyy'; did you mean 'ply'"):
        export(scene(), tmp_path / "new", ["page", "plyy"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [*WRITERS, "write_film", "write_ply_sequence"])
def test_full_disk(tmp_path, scene, monkeypatch, name) -> None:
    """The disk fills up while a file is written over an older one: one sentence, and the older file stays."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shots = scene()
    what = {"write_page": shots, "write_film": GaussianFilm.from_frames(shots), "write_ply_sequence": shots}
    path = tmp_path / ("frame_0000.ply" if name == "write_ply_sequence" else "old")
    path.write_text("the older file")
    monkeypatch.setattr("dataengine.storage._sync", full)
    with pytest.raises(OSError, match=r"the disk is full, nothing was changed; free some space") as caught:
        getattr(package, name)(tmp_path if name == "write_ply_sequence" else path, what.get(name, shots[0]))
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "the older file"


@pytest.mark.parametrize(("viewer", "module"), [(show_viser, "viser"), (log_rerun, "rerun")])
def test_viewers_say_what_is_missing(scene, monkeypatch, viewer, module) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"{module}.*: expected the package, .*run pip install 'enerverse\[viewer\]'"
    ):
        viewer(scene())


def test_rerun_writes_a_recording(tmp_path, scene, cameras) -> None:
    pytest.importorskip("rerun")
    path = log_rerun(scene(), cameras(5), path=tmp_path / "a.rrd")
    assert path.read_bytes()[:3] == b"RRF"


def test_what_viewers_are_given() -> None:
    """A stick along its own x, a quarter turn about z: it lies along y."""
    stick = Gaussians(
        means=torch.tensor([[1.0, 2.0, 3.0]]),
        quats=torch.tensor([[2.0, 0.0, 0.0, 2.0]]),
        scales=torch.tensor([[0.5, 0.1, 0.1]]).log(),
        opacities=torch.zeros(1),
        harmonics=torch.zeros(1, 1, 3),
        body=torch.zeros(1, dtype=torch.long),
    )
    assert np.allclose(_for_viser(stick)["covariances"], np.diag([0.01, 0.25, 0.01]), atol=1e-6)
    assert _for_viser(stick)["opacities"].tolist() == [[0.5]]
    splats = SimpleNamespace(GaussianSplats3D=lambda centers, **parts: parts | {"centers": centers})
    told = _for_rerun(splats, stick)
    assert np.allclose(told["quaternions"], [[0, 0, 0.5**0.5, 0.5**0.5]])  # xyzw
    assert told["colors"].tolist() == [[128, 128, 128, 128]]
    older = SimpleNamespace(
        Ellipsoids3D=lambda **parts: parts,
        components=SimpleNamespace(FillMode=SimpleNamespace(Solid="solid")),
    )
    assert np.allclose(_for_rerun(older, stick)["half_sizes"], [[0.5, 0.1, 0.1]])
