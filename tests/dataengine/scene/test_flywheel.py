"""The flywheel and its generators, on a world that is known."""

import dataclasses
import json

import pytest
import torch

from dataengine.fit import Fit
from dataengine.flywheel import (
    CONTROLS,
    Flywheel,
    first_fit,
    flywheel,
    judge,
    look,
    record,
    with_controls,
    write_log,
)  # fmt: skip
from dataengine.generators import ConstantFill, Identity, Oracle, Restorer, fill_depth, train_restorer
from dataengine.quality import ALIKE
from dataengine.reconstruct import Reconstruction
from tests.dataengine.scene.conftest import FRAMES, ring, world

SETTINGS = Flywheel(
    rounds=1,
    start=Reconstruction(complete=False, fit=Fit(steps=12, quiet=True)),
    refit=Fit(steps=16, quiet=True),
)


def test_every_control_runs_and_the_oracle_is_the_best(few, unseen, anchors, tmp_path):
    logs = with_controls(few, {}, anchors.cameras, SETTINGS, held_out=unseen, anchors=anchors)
    assert set(logs) == {*CONTROLS, "planes"}
    first = {log[0]["psnr"] for log in logs.values()}
    assert len(first) == 1  # all go on from one fit
    last = {name: log[-1]["psnr"] for name, log in logs.items()}
    assert max(last, key=lambda name: last[name]) == "oracle"
    assert last["oracle"] > first.pop() + 1
    kept = json.loads(write_log(tmp_path / "log.json", logs, SETTINGS).read_text())
    assert {
        "psnr",
        "ssim",
        "moving_psnr",
        "input_psnr",
        "cover",
        "depth_cm",
        "reprojection",
        "seconds",
    } <= set(kept["logs"]["oracle"][1])


def refuse(word):
    raise AssertionError(f"{word} is no JSON")


def test_what_is_written_of_pictures_that_are_the_same_is_json(few, tmp_path):
    """A scene that shows exactly what was seen, and a round that measured nothing."""
    scene = world()
    renders = look(scene, few.cameras, len(few))
    same = dataclasses.replace(few, images=renders.images, depth=None)
    log = [record(scene, same, same, 0, 0.0) | judge(renders, Identity().repair(renders, few, None), same)]
    assert log[0]["psnr"] == log[0]["anchor_psnr_after"] == ALIKE
    log.append(log[0] | {"depth_cm": float("nan"), "cover": [float("inf")]})
    settings = dataclasses.replace(SETTINGS, tolerance=float("inf"))
    text = write_log(tmp_path / "log.json", {"same": log}, settings).read_text()
    told = json.loads(text, parse_constant=refuse)
    assert told["logs"]["same"][0] == log[0]
    assert (told["logs"]["same"][1]["depth_cm"], told["logs"]["same"][1]["cover"]) == (None, [None])
    assert told["settings"]["tolerance"] is None


class Painter:
    """A generator that is sure of nonsense."""

    name = "painter"

    def repair(self, renders, references, anchors):
        repaired = ConstantFill().repair(renders, references, anchors)
        return dataclasses.replace(repaired, images=torch.ones_like(repaired.images))


def test_a_log_is_drawn_beside_it(few, anchors, tmp_path):
    turned = flywheel(few, Identity(), anchors.cameras, SETTINGS, gate=False)
    write_log(tmp_path / "log.json", {"identity": turned.log}, SETTINGS)
    drawn = (tmp_path / "log.svg").read_text()
    assert "PSNR on cameras fitted to, dB" in drawn
    assert drawn.count("<svg") == 1


def test_a_round_that_makes_things_worse_is_undone(few, unseen, anchors):
    scene = first_fit(few, SETTINGS)
    turned = flywheel(
        few, Painter(), anchors.cameras, dataclasses.replace(SETTINGS, rounds=3), scene=scene, held_out=unseen
    )
    assert [record["kept"] for record in turned.log] == [True, False]
    assert len(turned.scene) == turned.log[0]["gaussians"]
    assert turned.views.names == few.names  # what the painter made is not kept


def test_generated_views_say_so_and_count_less(few, anchors):
    turned = flywheel(few, ConstantFill(), anchors.cameras, SETTINGS, gate=False)
    assert turned.views.names == (*few.names, *anchors.names)
    assert turned.views.observed.tolist() == [[True, True, False, False]] * len(few)
    assert turned.views.confidence is not None
    assert turned.views.confidence[:, :2].min() == 1
    assert turned.views.confidence[:, 2:].max() == SETTINGS.weight
    assert turned.log[1]["gaussians"] > turned.log[0]["gaussians"]  # holes were filled


def test_the_oracle_needs_the_truth(few, anchors):
    with pytest.raises(ValueError, match="anchors: expected the true pictures at the anchor cameras"):
        flywheel(few, Oracle(), anchors.cameras, SETTINGS)


def test_holes_of_depth_are_filled_from_around_them(few, anchors):
    renders = look(first_fit(few, SETTINGS), anchors.cameras, len(few))
    filled, known = fill_depth(renders), renders.alpha > 0.5
    assert torch.equal(filled[known], renders.depth[known])
    assert (filled > 0).all()
    assert filled.max() <= renders.depth[known].max() * 1.001


def test_a_restorer_learns_to_repair_and_comes_back_from_its_file(few, anchors, tmp_path):
    renders = look(first_fit(few, SETTINGS), anchors.cameras, len(few))
    model = train_restorer([(renders, anchors)], steps=60, batch=4, width=8, quiet=True)
    repaired = model.repair(renders, few, None)

    def miss(images):
        return float((images - anchors.images).abs().mean())

    assert miss(repaired.images) < 0.8 * miss(renders.images)
    again = Restorer.load(model.save(tmp_path / "restorer.safetensors")).repair(renders, few, None)
    assert torch.equal(repaired.images, again.images)
    assert torch.equal(repaired.confidence, again.confidence)
    untrained = Restorer(8).repair(renders, few, None)
    torch.testing.assert_close(untrained.images, renders.images)  # before training it changes nothing


def test_identity_gives_back_what_was_rendered(few, anchors):
    renders = look(first_fit(few, SETTINGS), anchors.cameras, len(few))
    assert torch.equal(Identity().repair(renders, few, None).images, renders.images)


@pytest.mark.parametrize("change", [{"rounds": -1}, {"rounds": 1.5}, {"weight": 0.0}, {"tolerance": -1.0}])
def test_bad_settings_are_refused(change):
    with pytest.raises(ValueError, match="rounds, weight, tolerance: expected"):
        Flywheel(**change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"cameras": ring(2, side=32)},
            r"cameras: expected pictures of 24 x 24 .*pass cameras.scaled_to\(24, 24\)",
        ),
        ({"settings": 3}, r"settings: expected a Flywheel, got 3; pass Flywheel\(rounds=...\)"),
        ({"scene": world(2)}, f"scene: expected {FRAMES} frames like the views, got 2"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_a_fit(few, anchors, change, sentence):
    given = {"views": few, "generator": None, "cameras": anchors.cameras, "settings": SETTINGS} | change
    with pytest.raises(ValueError, match=sentence):
        flywheel(**given)
