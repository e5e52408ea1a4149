"""The page: its bytes decoded here, its script run by node, and its picture where there is a browser."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dataengine import rotations
from dataengine.export import GaussianFilm, write_page
from dataengine.gaussians import Gaussians

NODE, BROWSER = shutil.which("node"), os.environ.get("CHROMIUM") or shutil.which("chromium")
VIEWER = resources.files("dataengine.export") / "viewer.js"


def read_page(path: Path) -> tuple[dict, bytes]:
    """The description and the bytes that a page holds."""
    text = path.read_text(encoding="utf-8")
    parts = {
        name: re.search(rf'<script type="[^"]*" id="{name}">(.*?)</script>', text, re.S) for name in ("manifest", "data")
    }  # fmt: skip
    assert parts["manifest"] is not None
    assert parts["data"] is not None
    return json.loads(parts["manifest"][1]), base64.b64decode(parts["data"][1], validate=True)


def numbers(manifest: dict, data: bytes, name: str, rows: int, offset: int) -> np.ndarray:
    """Rows of a channel as the header of `encode` says, float64 ``[rows, width]``."""
    channel = manifest["channels"][name]
    kind, width = ("<u2" if channel["bits"] == 16 else "u1"), channel["width"]
    raw = np.frombuffer(data, kind, rows * width, offset).reshape(rows, width)
    low, high = np.array(channel["low"]), np.array(channel["high"])
    return low + raw / (2 ** channel["bits"] - 1) * (high - low)


def decode(manifest: dict, data: bytes, t: int) -> dict[str, np.ndarray]:
    """Frame t of a page, in the page's order; scales as logarithms."""
    count, still, rigid, loose = (manifest[key] for key in ("count", "still", "rigid", "loose"))
    assert still + rigid + loose == count
    now = {}
    for name, channel in manifest["channels"].items():
        now[name] = numbers(manifest, data, name, count, channel["offset"])
        if channel["track"] >= 0:
            size = loose * channel["width"] * channel["bits"] // 8
            now[name][count - loose :] = numbers(manifest, data, name, loose, channel["track"] + t * size)
    n = manifest["bodies"]
    poses = np.frombuffer(data, "<f4", 7 * n * manifest["frames"], manifest["poseOffset"])
    body = np.frombuffer(data, "<u2", rigid, manifest["bodyOffset"])
    pose = torch.tensor(poses.reshape(manifest["frames"], n, 7)[t][body].astype(np.float64))
    rows = slice(still, still + rigid)
    turn, shift = pose[:, :4], pose[:, 4:]
    means, quats = (torch.tensor(now[name][rows]) for name in ("means", "quats"))
    now["means"][rows] = (torch.einsum("nij,nj->ni", rotations.to_matrix(turn), means) + shift).numpy()
    now["quats"][rows] = rotations.multiply(turn, quats).numpy()
    return now


def page_order(film: GaussianFilm) -> torch.Tensor:
    return torch.where(film.motion > 0, 1, torch.where(film.motion < 0, 2, 0)).argsort(stable=True)


def pixel_covariance(means, quats, scales, cameras) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres ``[V, N, 2]`` and covariances ``[V, N, 2, 2]`` in pixels, with the 0.3 of the rasteriser, float64."""
    means, quats, scales = (torch.as_tensor(x).double() for x in (means, quats, scales))
    centres, depth = (torch.tensor(x) for x in cameras.project(means.numpy()))
    view = torch.tensor(cameras.world_to_camera)
    local = torch.einsum("vij,nj->vni", view[:, :3, :3], means) + view[:, None, :3, 3]
    axes = view[:, None, :3, :3] @ (rotations.to_matrix(quats) * scales.exp()[:, None])
    focal = torch.tensor(cameras.intrinsics)[:, (0, 1), (0, 1)]
    jacobian = torch.zeros(*depth.shape, 2, 3, dtype=torch.float64)
    jacobian[..., 0, 0], jacobian[..., 1, 1] = focal[:, None, 0] / depth, focal[:, None, 1] / depth
    jacobian[..., 2] = -focal[:, None] * local[..., :2] / depth[..., None].square()
    spread = jacobian @ axes
    return centres, spread @ spread.mT + 0.3 * torch.eye(2)


@pytest.mark.parametrize("degree", [0, 3])
def test_embedded_numbers_are_those_of_the_scene(tmp_path, scene, cameras, degree) -> None:
    shots = scene(300, degree=degree)
    film = GaussianFilm.from_frames(shots)
    manifest, data = read_page(write_page(tmp_path / "a.html", shots, cameras(), 8))
    order = page_order(film)
    assert (manifest["frames"], manifest["fps"], manifest["count"]) == (5, 8, 300)
    extent = np.ptp(np.concatenate([shot.means.numpy() for shot in shots]), 0).max()
    for t, shot in enumerate(shots):
        wanted, found = shot[order], decode(manifest, data, t)
        assert np.abs(found["means"] - wanted.means.numpy()).max() < 1.2 * extent / 65535
        assert np.abs(found["colors"] - wanted.colors.numpy()).max() < 3 / 255
        assert np.abs(found["opacities"][:, 0] - wanted.opacities.sigmoid().numpy()).max() < 0.502 / 255
        if degree:
            kept = wanted.harmonics[:, 1:].flatten(1).numpy()
            assert np.abs(found["harmonics"] - kept).max() < 0.502 / 255 * np.ptp(kept)
        there = pixel_covariance(wanted.means, wanted.quats, wanted.scales, cameras())
        here = pixel_covariance(found["means"], found["quats"], found["scales"], cameras())
        assert (here[0] - there[0]).abs().max() < 0.02  # pixels
        size = there[1].flatten(2).norm(dim=-1)
        assert ((here[1] - there[1]).flatten(2).norm(dim=-1) / size).max() < 0.01


def test_size_of_a_usual_scene(tmp_path, scene) -> None:
    """10,000 Gaussians over 16 frames: 15 % move as bodies, or as loose ones."""
    viewer = len(VIEWER.read_bytes())
    sizes = [
        write_page(tmp_path / "a.html", scene(10_000, 16, **kind)).stat().st_size
        for kind in ({"rigid": 0.15, "loose": 0}, {"rigid": 0, "loose": 0.15})
    ]
    assert sizes[0] < 340_000 + viewer
    assert sizes[1] < 600_000 + viewer


def test_still_scene_empty_scene_and_degree(tmp_path, gaussians) -> None:
    manifest, data = read_page(write_page(tmp_path / "a.html", [gaussians(10, 2)], degree=1))
    assert (manifest["still"], manifest["degree"], manifest["cameras"]) == (10, 1, None)
    assert manifest["channels"]["harmonics"]["width"] == 9
    assert len(data) == 10 * (20 + 4 + 9) + 2 + 2  # colours and opacities are padded to whole words
    manifest, _ = read_page(write_page(tmp_path / "b.html", [gaussians(0)]))
    assert manifest["count"] == 0
    with pytest.raises(ValueError, match="degree: expected 0, 1, 2 or 3, got 4"):
        write_page(tmp_path / "c.html", [gaussians(1)], degree=4)
    with pytest.raises(ValueError, match="expected at least one frame"):
        write_page(tmp_path / "c.html", [])


def test_text_cannot_leave_its_place(tmp_path, gaussians, cameras) -> None:
    rude, name = "</script><b>{{data}}&", "<b>{{data}}&"
    views = cameras()
    views = type(views)((name, "side"), views.intrinsics, views.camera_to_world, 64, 48)
    path = write_page(tmp_path / "a.html", [gaussians(3)], views, title=rude)
    text = path.read_text()
    assert text.count(html.escape(rude)) == 2
    assert rude not in text
    manifest, _ = read_page(path)
    assert [view["name"] for view in manifest["cameras"]["views"]] == [name, "side"]
    assert text.count("</script>") == 3
    assert not re.search(r"https?://|src=|href=", text)  # nothing to fetch


def test_cameras_and_up(tmp_path, gaussians, cameras) -> None:
    manifest, _ = read_page(write_page(tmp_path / "a.html", [gaussians(3)] * 4, cameras(4)))
    assert manifest["up"] == [0, 0, 1]
    first, second = manifest["cameras"]["views"]
    assert np.allclose(first["poses"], cameras(4).camera_to_world[:, 0, :3].reshape(4, 12))
    assert second["lenses"] == [[60, 62, 33, 23]]
    tilted = cameras()
    flipped = tilted.camera_to_world.copy()
    flipped[:, :3, :3] = np.diag([1.0, 1, 1])  # y points down, as in pictures
    views = type(tilted)(tilted.names, tilted.intrinsics, flipped, 64, 48)
    assert read_page(write_page(tmp_path / "b.html", [gaussians(3)], views))[0]["up"] == [0, -1, 0]


def test_every_id_of_the_script_is_on_the_page() -> None:
    page = (resources.files("dataengine.export") / "page.html").read_text(encoding="utf-8")
    asked = set(re.findall(r'find\("(\w+)"\)', VIEWER.read_text(encoding="utf-8")))
    assert len(asked) > 10
    assert asked <= set(re.findall(r'id="(\w+)"', page))


RUN = """
const fs = require("fs");
const viewer = require(process.argv[2]);
const { manifest, data, frames, eye, forward } = JSON.parse(fs.readFileSync(0));
const bytes = new Uint8Array(Buffer.from(data, "base64"));
const scene = viewer.decodeScene(manifest, Uint8Array.from(bytes));
const shots = frames.map((t) => {
  viewer.poseScene(scene, t);
  const order = new Uint32Array(scene.count);
  const visible = viewer.sortByDepth(scene.now.means, scene.count, eye, forward, 0.01, order, {});
  const now = Object.fromEntries(Object.entries(scene.now).map(([name, values]) => [name, [...values]]));
  return { now, order: [...order.subarray(0, visible)] };
});
const view = viewer.cameraView(manifest, 1, 0);
const before = viewer.cameraView(manifest, 1, 0);
viewer.orbit(view, manifest.up, 0.4, -0.2);
const whole = viewer.wholeView(manifest), lens = viewer.fitLens(view.lens, 200, 100);
process.stdout.write(JSON.stringify({ shots, before, view, whole, lens }));
"""


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_script_decodes_poses_and_sorts_as_python_does(tmp_path, scene, cameras) -> None:
    shots = scene(400, degree=1)
    for t, shot in enumerate(shots):  # every kind of track
        shot.harmonics[shot.body == -1] += 0.05 * t
        shot.scales[shot.body == -1] += 0.1 * t
        shot.opacities[shot.body == -1] -= 0.2 * t
    manifest, data = read_page(write_page(tmp_path / "a.html", shots, cameras()))
    (tmp_path / "run.js").write_text(RUN)
    frames, eye, forward = [4, 0, 2], [0.1, -1.0, 0.2], [0.0, 1.0, 0.0]
    asked = {"manifest": manifest, "data": base64.b64encode(data).decode(), "frames": frames}
    done = subprocess.run(
        [str(NODE), str(tmp_path / "run.js"), str(VIEWER)],
        input=json.dumps(asked | {"eye": eye, "forward": forward}),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for t, shot in zip(frames, told["shots"], strict=True):
        wanted = decode(manifest, data, t)
        for name in ("means", "quats", "scales", "colors", "opacities"):
            found = np.reshape(shot["now"][name], wanted[name].shape)
            there = np.exp(wanted["scales"]) if name == "scales" else wanted[name]
            assert np.abs(found - there).max() < 1e-5, name
        channel = manifest["channels"]["harmonics"]
        raw = np.reshape(shot["now"]["harmonics"], wanted["harmonics"].shape) / 255
        low, high = channel["low"][0], channel["high"][0]
        assert np.abs(low + raw * (high - low) - wanted["harmonics"]).max() < 1e-6
        depth = (wanted["means"] - eye) @ forward
        assert sorted(shot["order"]) == np.flatnonzero(depth >= 0.01).tolist()
        sorted_depth = depth[shot["order"]]
        assert np.diff(sorted_depth).max() < np.ptp(sorted_depth) / 65535 + 1e-5  # farthest first
    assert told["before"]["eye"] == [4.5, 0, 0]
    assert told["before"]["forward"] == [-1, 0, 0]
    for name in ("view", "whole"):
        view = told[name]
        axes = np.array([view["right"], view["down"], view["forward"]])
        assert np.allclose(axes @ axes.T, np.eye(3), atol=1e-9)
        assert np.linalg.det(axes) > 0
        assert view["down"][2] < 0 < view["eye"][2]  # upright, and seen from above
    target = [
        np.add(v["eye"], np.multiply(v["forward"], v["distance"])) for v in (told["before"], told["view"])
    ]
    assert np.allclose(*target)
    assert told["lens"]["scale"] == pytest.approx(100 / 48)


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_script_is_javascript() -> None:
    done = subprocess.run([str(NODE), "--check", str(VIEWER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def composed(gaussians: Gaussians, cameras, view: int) -> np.ndarray:
    """What a camera sees on black, by the definition: float64 ``[H, W, 3]``, degree 0."""
    centres, covariance = pixel_covariance(gaussians.means, gaussians.quats, gaussians.scales, cameras)
    depth = cameras.project(gaussians.means.double().numpy())[1][view]
    rows, columns = np.mgrid[: cameras.height, : cameras.width] + 0.5
    pixels = torch.tensor(np.stack([columns, rows], -1))
    image = torch.zeros(*pixels.shape[:2], 3, dtype=torch.float64)
    for i in np.argsort(-depth):
        gap = pixels - centres[view, i]
        power = torch.einsum("hwi,ij,hwj->hw", gap, covariance[view, i].inverse(), gap)
        alpha = (gaussians.opacities[i].double().sigmoid() * (-0.5 * power).exp()).clamp_max(0.999)
        alpha = torch.where(alpha < 1 / 255, 0.0, alpha)[..., None]
        image = alpha * gaussians.colors[i].double() + (1 - alpha) * image
    return image.numpy()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium, or its path in CHROMIUM")
def test_browser_draws_the_scene(tmp_path, scene, cameras) -> None:
    import cv2

    shots = [
        shot.replace(scales=shot.scales + 1.0, harmonics=shot.harmonics.clamp(-1.7, 1.7))
        for shot in scene(80)
    ]
    views = cameras().scaled_to(512, 384)
    page = write_page(tmp_path / "a.html", shots, views)
    for view, t in (("front", 0), ("side", 3)):
        picture = tmp_path / f"{view}.png"
        where = f"{page.as_uri()}#camera={view}&frame={t}&background=black&bare"
        subprocess.run(
            [str(BROWSER), "--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
             "--hide-scrollbars", f"--user-data-dir={tmp_path / view}", "--window-size=512,384",
             "--virtual-time-budget=2500", f"--screenshot={picture}", where],
            capture_output=True, timeout=120, check=True,
        )  # fmt: skip
        found = cv2.imread(str(picture))[..., ::-1] / 255
        wanted = composed(shots[t], views, views.names.index(view)).clip(0, 1)
        assert wanted.max() > 0.5
        assert -10 * np.log10(np.square(found - wanted).mean()) > 40  # dB; frames 0 and 3 differ by far more


def test_unit_quaternions_survive_any_length(tmp_path, gaussians) -> None:
    long = gaussians(5)
    long = long.replace(quats=long.quats * 1000)
    found = decode(*read_page(write_page(tmp_path / "a.html", [long])), 0)["quats"]
    assert np.abs(found - F.normalize(long.quats, dim=1).numpy()).max() < 2e-5
