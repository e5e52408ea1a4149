"""The rasteriser's speed benchmark, tiny: what it compares is one image with one set of gradients."""

import pytest
import torch

from benchmarks.speed import rasterize


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_rasteriser_is_measured_against_the_same_in_torch(device, monkeypatch):
    found = {}
    monkeypatch.setattr(rasterize, "write_result", lambda case, values, **rest: found.update(values))
    rasterize.main(rasterize.Rasterize(sides=(24, 40), gaussians=(30, 60), repeats=1, device=device))
    assert set(found["rows"]) == {"24 30", "24 60", "40 30", "40 60"}
    for row in found["rows"].values():
        assert row["training_over_tiled"] == pytest.approx(row["tiled_training_ms"] / row["ours_training_ms"])
        assert ("cpu_forward_ms" in row) == (device != "cpu")
    assert max(max(errors.values()) for errors in found["errors"].values()) < (
        1e-5 if device == "cpu" else 1e-3
    )
    grown = found["growth"]["pixels at 60 gaussians"]
    assert grown["size"] == [576.0, 1600.0]
    assert len(grown["tiled_training_ms"]) == 2


def test_the_tiles_in_torch_draw_what_the_definition_draws():
    scene = rasterize.draw(50, 37, dtype=torch.float64)
    exact = rasterize.train(lambda **s: rasterize.rasterization(**s, implementation="reference")[0], scene)
    for name, value in rasterize.train(rasterize.tiled, scene).items():
        torch.testing.assert_close(value, exact[name], atol=1e-10, rtol=1e-8)
