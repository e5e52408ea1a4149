"""Films: every frame comes back, what does not move is kept once, damaged files are noticed."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dataengine.export import GaussianFilm, read_film, write_film
from dataengine.storage import load_tensors, save_tensors


@pytest.mark.parametrize("degree", [0, 3])
def test_exact_without_tolerance(tmp_path, scene, same, degree) -> None:
    shots = scene(degree=degree)
    film = GaussianFilm.from_frames(shots, fps=8, tolerance=0)
    back = read_film(write_film(tmp_path / "a.safetensors", film))
    assert len(back) == len(shots)
    assert all(same(*pair) for pair in zip(back, shots, strict=True))


def test_bodies_follow_poses(tmp_path, scene, cameras, same) -> None:
    shots = scene(200)
    film = GaussianFilm.from_frames(shots, fps=8, cameras=cameras())
    assert film.poses.shape == (5, 2, 4, 4)
    assert (film.motion > 0).equal(shots[0].body > 0)
    assert (film.motion == -1).equal(shots[0].body == -1)
    assert set(film.tracks) == {"means"}
    back = read_film(write_film(tmp_path / "a.safetensors", film))
    assert all(same(*pair) for pair in zip(back, film, strict=True))
    assert back.cameras is not None
    assert (back.fps, back.cameras.to_json()) == (8, cameras().to_json())
    rigid = shots[0].body > 0
    for found, wanted in zip(back, shots, strict=True):
        assert same(found[~rigid], wanted[~rigid])
        assert (found.means - wanted.means).abs().max() <= 1e-5
        alike = (F.normalize(found.quats, dim=1) * F.normalize(wanted.quats, dim=1)).sum(1).abs()
        assert alike.min() > 1 - 1e-6
    assert same(back[0], shots[0])
    assert same(back[-1], back.at(4))
    with pytest.raises(IndexError, match="frame: expected 0 to 4, got 5"):
        back[5]


def test_a_part_that_leaves_its_body_is_tracked(scene) -> None:
    shots = scene(100)
    astray = int((shots[0].body == 1).nonzero()[0])
    shots[3].means[astray, 0] += 0.01
    paints = int((shots[0].body == 2).nonzero()[0])
    shots[2].harmonics[paints] += 0.1
    film = GaussianFilm.from_frames(shots)
    assert film.motion[astray] == film.motion[paints] == -1
    assert int((film.motion > 0).sum()) == int((shots[0].body > 0).sum()) - 2
    assert film[3].means[astray].equal(shots[3].means[astray])
    assert film[2].harmonics.equal(shots[2].harmonics)


def test_static_things_that_move_and_one_frame(scene, same) -> None:
    shots = scene(20, rigid=0, loose=0)
    assert GaussianFilm.from_frames(shots).tracks == {}
    shots[2].opacities[4] = 3.0
    film = GaussianFilm.from_frames(shots)
    assert film.motion.nonzero().tolist() == [[4]]
    assert all(same(*pair) for pair in zip(film, shots, strict=True))
    assert len(GaussianFilm.from_frames(shots[:1])) == 1


def test_a_body_of_one_gaussian_and_double_precision(scene, same) -> None:
    shots = [shot[shot.body == 1][:1].to(torch.float64) for shot in scene()]
    film = GaussianFilm.from_frames(shots)
    assert film.motion.tolist() == [1]
    assert film[2].means.dtype == torch.float64
    assert (film[2].means - shots[2].means).abs().max() < 1e-6


def test_half_is_smaller_and_near(tmp_path, scene) -> None:
    shots = scene(3000, loose=0.6)
    film = GaussianFilm.from_frames(shots)
    whole, half = write_film(tmp_path / "a", film), write_film(tmp_path / "b", film, half=True)
    back = read_film(half)
    saved = film.tracks["means"].numel() * 2  # bytes
    assert whole.stat().st_size - half.stat().st_size == pytest.approx(saved, rel=0.01)
    assert max(float((a.means - b.means).abs().max()) for a, b in zip(back, film, strict=True)) < 3e-4


def test_half_keeps_what_it_cannot_hold(tmp_path, scene) -> None:
    shots = scene()
    shots[0].opacities[:2] = shots[1].opacities[0] = torch.inf
    film = GaussianFilm.from_frames(shots)
    back = read_film(write_film(tmp_path / "a", film, half=True))
    assert back[1].opacities.equal(shots[1].opacities)


def test_bad_frames(scene, gaussians) -> None:
    shots = scene()
    with pytest.raises(ValueError, match="frames: expected at least one frame"):
        GaussianFilm.from_frames([])
    with pytest.raises(
        ValueError, match=r"frames\[1\]: expected 60 Gaussians of degree 0 .* got 60 of degree 1"
    ):
        GaussianFilm.from_frames([shots[0], scene(degree=1)[1]])
    with pytest.raises(ValueError, match=r"frames\[1\]: expected the bodies of the first frame"):
        GaussianFilm.from_frames([shots[0], shots[1].replace(body=shots[1].body * 0)])
    with pytest.raises(TypeError, match=r"frames\[0\]: expected Gaussians, got str"):
        GaussianFilm.from_frames(["a"])  # type: ignore[list-item]
    shots[2].quats[3, 1] = torch.inf
    with pytest.raises(
        ValueError, match=r"frames\[2\]: expected finite quats, got NaN or infinity in 1 of 60"
    ):
        GaussianFilm.from_frames(shots)


def test_bad_parts(scene, cameras) -> None:
    film = GaussianFilm.from_frames(scene())
    for changes, sentence in [
        ({"motion": film.motion[:-1]}, r"motion: expected \[60\], got \[59\]"),
        ({"motion": film.motion + 1}, "motion: expected -1 to 2, the number of poses, got 0 to 3"),
        ({"poses": film.poses[0]}, r"poses: expected \[T, n, 4, 4\]"),
        ({"tracks": {"means": film.tracks["means"][:1]}}, r"tracks\['means'\]: expected \[5, 12, 3\]"),
        ({"tracks": {"colours": film.tracks["means"]}}, "tracks: expected some of means, quats"),
        ({"fps": float("nan")}, "fps: expected frames per second above 0"),
        ({"cameras": cameras(4)}, "cameras: expected fixed ones or 5 frames, got 4"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            replace(film, **changes)


def test_damaged_files(tmp_path, scene) -> None:
    path = write_film(tmp_path / "a.safetensors", GaussianFilm.from_frames(scene()))
    tensors, metadata = load_tensors(path)
    with pytest.raises(FileNotFoundError, match="found none"):
        read_film(tmp_path / "b.safetensors")
    cases = [
        ({}, {"format": "pt"}, "expected a gaussian film, got 'pt'"),
        ({}, {"version": "2"}, "expected version 1, got 2; update this package"),
        ({"poses": None, "canonical.quats": None}, {}, "missing canonical.quats, poses"),
        ({"motion": tensors["motion"][:3]}, {}, r"expected parts that fit each other, got motion"),
        ({"canonical.means": tensors["canonical.means"][:3]}, {}, r"fit each other, got quats: expected shape \[3, 4\]"),
        ({}, {"cameras": "{}"}, "fit each other, got cameras json"),
        ({}, {"fps": "fast"}, "fit each other"),
        ({"differences.colours": tensors["poses"]}, {}, "fit each other"),
    ]  # fmt: skip
    for changes, words, sentence in cases:
        changed = {name: value for name, value in (tensors | changes).items() if value is not None}
        save_tensors(tmp_path / "c.safetensors", changed, metadata | words)
        with pytest.raises(ValueError, match=sentence):
            read_film(tmp_path / "c.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        read_film(path)
