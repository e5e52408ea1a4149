"""Trying a generator on hidden pixels, and what a folder is bound to."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from dataengine.digests import digest, digest_episode, digest_generator, digest_views
from dataengine.episodes import EpisodeDataset
from dataengine.fit import Fit, fit
from dataengine.flywheel import Flywheel
from dataengine.generators import ConstantFill, Repaired, Restorer
from dataengine.multiview import Multiview, multiview
from dataengine.probe import BLOCKS, HIDDEN, hidden_blocks, hide, probe
from dataengine.reconstruct import Reconstruction, begin, measure
from dataengine.scenes import make_scene, read_parts
from tests.dataengine.scene.conftest import capture, ring, save_dataset, world

QUICK = Flywheel(
    rounds=2,
    start=Reconstruction(complete=False, fit=Fit(steps=40, quiet=True)),
    refit=Fit(steps=40, quiet=True),
)


class Knowing:
    """Sees what the cameras would: the truth from any camera."""

    name = "knowing"

    def repair(self, renders, references, anchors):
        seen = capture(renders.cameras)
        return Repaired(images=seen.images, depth=seen.depth, confidence=torch.ones_like(seen.depth))


class Painter:
    """Sure that all is white."""

    name = "painter"

    def repair(self, renders, references, anchors):
        white = torch.ones_like(renders.images)
        return dataclasses.replace(ConstantFill().repair(renders, references, anchors), images=white)


def test_hidden_blocks_are_the_same_at_every_frame_and_differ_by_view(few):
    mask = hidden_blocks(few)
    assert mask.shape == few.images.shape[:-1]
    assert torch.equal(mask[0], mask[-1])
    assert not torch.equal(mask[0, 0], mask[0, 1])
    assert mask[0].float().mean().item() == pytest.approx(HIDDEN / BLOCKS**2)


def test_nothing_of_what_is_hidden_reaches_a_fit(few):
    mask = hidden_blocks(few)
    spoiled = dataclasses.replace(
        few, images=torch.where(mask[..., None], 1 - few.images, few.images),
        depth=torch.where(mask, few.depth + 1, few.depth), body_ids=torch.where(mask, 1, few.body_ids),
    )  # fmt: skip
    plans = [hide(views, mask) for views in (few, spoiled)]
    mean = few.images.mean((0, 1, 2, 3))
    plans = [
        dataclasses.replace(p, images=torch.where(mask[..., None], mean, p.images)) for p in plans
    ]  # the mean itself tells
    scenes = [begin(plan, QUICK.start) for plan in plans]
    for scene, plan in zip(scenes, plans, strict=True):
        fit(scene, plan, QUICK.start.fit)
    for key, value in scenes[0].state_dict().items():
        assert torch.equal(value, scenes[1].state_dict()[key]), key


def test_a_generator_that_helps_is_turned_and_one_that_spoils_is_not(few, anchors):
    good = probe(few, anchors.cameras, Knowing(), QUICK)
    assert good.rounds >= 1
    assert good.hidden_psnr[good.rounds] > good.hidden_psnr[0] + 1
    assert good.last_word
    assert good.repaired_psnr > good.hidden_psnr[good.rounds]
    bad = probe(few, anchors.cameras, Painter(), QUICK)
    assert bad.rounds == 0
    assert not bad.last_word
    assert bad.hidden_psnr[1] < bad.hidden_psnr[0]


def test_confidence_says_which_pixels_are_measured(few):
    wrong = few.images.clone()
    wrong[:, :, 10:14] = 0
    counted = torch.ones_like(few.images[..., 0])
    counted[:, :, 10:14] = 0
    spoiled = dataclasses.replace(few, images=wrong)
    assert measure(world(), spoiled)["psnr"] < 30
    assert measure(world(), dataclasses.replace(spoiled, confidence=counted))["psnr"] > 60


@pytest.mark.parametrize(("generator", "sign"), [(Painter(), 1), (Knowing(), 2)])
def test_a_made_dataset_keeps_what_the_trial_said(few, tmp_path, generator, sign):
    source = save_dataset(tmp_path / "d", [few])
    settings = Multiview(views=3, flywheel=QUICK)
    report = multiview(source, tmp_path / "out", settings, generator, progress=False)
    told = json.loads((tmp_path / "out" / "meta" / "multiview.json").read_text())
    assert told["probe"] == report.probe
    assert told["episodes"][0]["rounds"] <= told["probe"]["rounds"]
    assert set(EpisodeDataset(tmp_path / "out").episode(0).provenance["view_00"].tolist()) == {sign}
    assert (told["probe"]["rounds"] > 0) == (sign == 2)


def test_the_trial_is_not_made_again(few, tmp_path, monkeypatch):
    source = save_dataset(tmp_path / "d", [few, few])
    settings = Multiview(views=3, flywheel=QUICK)
    multiview(source, tmp_path / "out", settings, ConstantFill(), episodes=[0], progress=False)
    monkeypatch.delattr("dataengine.multiview.probe")
    report = multiview(source, tmp_path / "out", settings, ConstantFill(), progress=False)
    assert (report.made, report.before) == (1, 1)


class Recording(Knowing):
    """Keeps what it was given."""

    name = "recording"

    def __init__(self):
        self.references = []

    def repair(self, renders, references, anchors):
        assert anchors is None
        self.references.append(references)
        return super().repair(renders, references, anchors)


def test_a_generator_is_shown_nothing_of_what_is_hidden(few, anchors):
    generator, mask = Recording(), hidden_blocks(few)
    probe(few, anchors.cameras, generator, QUICK)
    assert len(generator.references) >= 2  # in the rounds and at the end
    for seen in generator.references:
        assert (seen.images[mask] == few.images.mean((0, 1, 2, 3))).all()
        assert (seen.depth[mask] == 0).all()
        assert torch.equal(seen.images[~mask], few.images[~mask])


def test_pixels_that_count_for_nothing_are_no_truth(few, anchors):
    mask = hidden_blocks(few)
    known = mask.clone()
    known[:, 0] = False  # of the first view nothing that is hidden is known
    views = dataclasses.replace(few, confidence=torch.where(mask & ~known, 0.0, 1.0))
    spoiled = torch.where((mask & ~known)[..., None], 1 - few.images, few.images)
    rows = [
        probe(one, anchors.cameras, Knowing(), dataclasses.replace(QUICK, rounds=0)).hidden_psnr
        for one in (views, dataclasses.replace(views, images=spoiled))
    ]
    assert rows[0] == pytest.approx(rows[1], abs=0.5)  # the mean colour differs, the truth does not


def test_without_rounds_a_generator_is_tried_too(few, tmp_path):
    source = save_dataset(tmp_path / "d", [few])
    settings = Multiview(views=3, flywheel=dataclasses.replace(QUICK, rounds=0))
    report = multiview(source, tmp_path / "out", settings, Painter(), progress=False)
    assert report.probe["last_word"] is False
    assert set(EpisodeDataset(tmp_path / "out").episode(0).provenance["view_00"].tolist()) == {1}


@pytest.mark.parametrize("content", ["[]", "null", '{"episodes": null}', "without source"])
def test_a_record_of_another_shape_is_refused(few, tmp_path, content):
    source = save_dataset(tmp_path / "d", [few])
    settings = Multiview(views=3, flywheel=QUICK)
    multiview(source, tmp_path / "out", settings, progress=False)
    path = tmp_path / "out" / "meta" / "multiview.json"
    if content == "without source":
        told = json.loads(path.read_text())
        del told["episodes"][0]["source"]
        content = json.dumps(told)
    path.write_text(content)
    with pytest.raises(
        ValueError, match="as this version writes it, got something else; choose another folder"
    ):
        multiview(source, tmp_path / "out", settings, progress=False)


def test_pictures_of_other_writers_are_part_of_the_digest(few, tmp_path):
    """Equal numbers, other videos, and no checksums beside them."""
    found = []
    for name, images in (("a", few.images), ("b", 1 - few.images)):
        dataset = save_dataset(tmp_path / name / "d", [dataclasses.replace(few, images=images)])
        meta = dataclasses.replace(dataset.meta(0), checksums={})
        dataset.meta = lambda index, meta=meta: meta
        found.append(digest_episode(dataset, 0, few.cameras))
    assert found[0] != found[1]


def test_digests_tell_what_differs(few):
    assert digest(torch.zeros(2, dtype=torch.bfloat16)) != digest(torch.ones(2, dtype=torch.bfloat16))
    assert digest("a", None, 1.5) == digest("a", None, 1.5)
    assert digest("a", "b") != digest("ab")
    assert digest(np.zeros(4)) != digest(np.zeros((2, 2)))
    other = few.images.clone()
    other[0, 0, 0, 0, 0] += 0.5 if other[0, 0, 0, 0, 0] < 0.5 else -0.5
    assert digest_views(few) == digest_views(few.select(few.names))
    assert digest_views(few) != digest_views(dataclasses.replace(few, images=other))
    assert digest_views(few) != digest_views(dataclasses.replace(few, depth=None))
    assert digest_views(few) != digest_views(few.select(few.names[::-1]))
    assert digest_generator(ConstantFill()) is None
    torch.manual_seed(0)
    assert digest_generator(Restorer(8)) != digest_generator(Restorer(8))


def test_another_episode_of_the_same_shape_is_not_gone_on_with(few, tmp_path):
    """Same name, length, views and settings; other poses."""
    settings = dataclasses.replace(Multiview(views=3, flywheel=QUICK))
    multiview(save_dataset(tmp_path / "a" / "push", [few]), tmp_path / "out", settings, progress=False)
    moved = dataclasses.replace(
        few.cameras, camera_to_world=few.cameras.camera_to_world + 1e-3 * np.eye(4, k=3)
    )
    other = save_dataset(tmp_path / "b" / "push", [dataclasses.replace(few, cameras=moved)])
    with pytest.raises(
        ValueError, match="expected episode 0 of .* as it was, got another; choose another folder"
    ):
        multiview(other, tmp_path / "out", settings, progress=False)


def test_other_weights_are_another_generator(few, tmp_path):
    source = save_dataset(tmp_path / "d", [few])
    settings = Multiview(views=3, flywheel=dataclasses.replace(QUICK, rounds=1))
    torch.manual_seed(0)
    multiview(source, tmp_path / "out", settings, Restorer(8), progress=False)
    with pytest.raises(ValueError, match="weights: expected [0-9a-f]{16} as in .*; choose another folder"):
        multiview(source, tmp_path / "out", settings, Restorer(8), progress=False)


def test_scenes_and_fits_are_bound_to_their_views(few, tmp_path):
    plan = Reconstruction(fit=Fit(steps=2, quiet=True))
    for name in ("a", "b"):
        save_dataset(tmp_path / name / "push", [few if name == "a" else capture(ring(2, phase=0.1))])
    (part,), (other,) = (read_parts(tmp_path / name / "push").parts for name in ("a", "b"))
    make_scene(part, tmp_path / "scene", plan)
    with pytest.raises(
        ValueError, match="expected a scene of these pictures, depth and poses, got one of others"
    ):
        make_scene(other, tmp_path / "scene", plan)
    quick = dataclasses.replace(plan.fit, quiet=False, save_every=3)  # says nothing about the numbers
    make_scene(part, tmp_path / "scene", dataclasses.replace(plan, fit=quick), ("splat",))
    (tmp_path / "scene" / part.name / "scene.json").write_text("3")
    with pytest.raises(ValueError, match="expected what a scene was made from, got other JSON"):
        make_scene(part, tmp_path / "scene", plan)
    folder = tmp_path / "fit"
    fit(begin(few, plan), few, plan.fit, folder=folder)
    turned = few.select(few.names[::-1])
    sentence = "expected a fit from the same start to the same views, got another"
    with pytest.raises(ValueError, match=sentence):
        fit(begin(turned, plan), turned, plan.fit, folder=folder)
    with pytest.raises(ValueError, match=sentence):
        fit(begin(few, dataclasses.replace(plan, motion="polynomial")), few, plan.fit, folder=folder)
    with pytest.raises(ValueError, match=sentence):
        fit(begin(few, dataclasses.replace(plan, spacing=4.0)), few, plan.fit, folder=folder)
