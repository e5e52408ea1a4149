"""What the benchmarks of the data engine conclude from logs."""

import numpy as np
import pytest

from benchmarks import data_help, flywheel
from benchmarks.figures_data import data_help_section, flywheel_section
from enerverse.evaluate.imagination import COLUMNS

ROW = {"ssim": 0.8, "moving_psnr": 15.0, "input_psnr": 33.0, "cover": 0.9, "depth_cm": 0.3, "reprojection_depth": 0.02,
       "seconds": 3.0, "gaussians": 10, "kept": True, "anchor_psnr_before": 18.0, "anchor_psnr_after": 24.0}  # fmt: skip


def log(*psnr, reprojection=(0.04, 0.03, 0.02)):
    return [ROW | {"psnr": p, "reprojection": r} for p, r in zip(psnr, reprojection, strict=True)]


def scene(offset, ours, fill):
    return {
        "restorer": log(18 + offset, 20 + offset, 18 + offset + ours),
        "more_iterations": log(18 + offset, 18 + offset, 18 + offset, reprojection=(0.04, 0.04, 0.04)),
        "self_distillation": log(18 + offset, 18 + offset, 18.1 + offset),
        "constant_fill": log(18 + offset, 19 + offset, 18 + offset + fill),
        "planes": log(18 + offset, 19 + offset, 19.5 + offset),
        "oracle": log(18 + offset, 22 + offset, 24 + offset),
    }


def test_gains_are_taken_scene_by_scene_and_against_the_best_control_but_the_oracle():
    logs = [scene(offset, 3 + 0.1 * offset, 2.0) for offset in (-4, 0, 4)]
    values = flywheel.summarise(logs)
    assert values["best_control"] == "constant_fill"
    middle, low, high = values["gain"]["restorer"]
    assert middle == pytest.approx(3.0)
    assert 2.5 < low < middle < high < 3.5  # scenes differ by eight decibels, gains by less than one
    assert values["over_best_control"]["restorer"][0] == pytest.approx(1.0)
    assert values["reprojection_change"]["restorer"][0] == pytest.approx(-0.5)
    assert values["reprojection_change"]["more_iterations"][0] == pytest.approx(0.0)
    values["gated"] = {
        "Lift-0": {"restorer": [[18, 33, True], [20, 33, True]], "constant_fill": [[18, 33, True], [19, 30, False]]}
    }  # fmt: skip
    text, drawn = flywheel_section(values)
    assert "| restorer (shipped) | 18.00 | 20.00 | 21.00 | +3.00 [" in text
    assert "restorer (shipped) kept all 1 (18.0 to 20.0 dB)" in text
    assert "constant fill (control) stopped itself after 0 (18.0 to 18.0 dB)" in text
    assert drawn["flywheel"].startswith("<svg")


def test_arms_are_compared_with_the_arm_of_few_views():
    sums = np.ones((4, len(COLUMNS)))
    rows = {"model": (sums * 0.5).tolist(), "copy": sums.tolist()}

    def tried(won):
        return {kind: {"wins": won, "sums": rows} for kind in data_help.PAIRS}

    values = data_help.summarise({"few": tried([False] * 20), "true": tried([True] * 10 + [False] * 10)})
    assert values["true"]["held_out"]["success"] == 0.5
    assert values["true"]["held_out"]["p_against_few"] < 0.01
    assert "p_against_few" not in values["few"]["held_out"]
    text, drawn = data_help_section(values)
    assert "| (d) + six true ones | cameras that no model was trained on | 50 [" in text
    assert drawn["data_help"].startswith("<svg")


def test_pairs_are_of_the_views_that_an_arm_has():
    few = data_help.draw_pairs("few", 5, 0)
    assert {view for pairs in few for pair in pairs for view in pair} == set(data_help.OBSERVED)
    true = data_help.draw_pairs("true", 50, 0)
    assert {view for pairs in true for pair in pairs for view in pair} == set(data_help.RING)
    assert all(a != b for pairs in true for a, b in pairs)
    assert not set(data_help.HELD_OUT) & set(data_help.RING)
