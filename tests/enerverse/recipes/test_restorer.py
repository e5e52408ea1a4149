"""The recipe of the restorer at toy size, and what is shipped."""

import random

import pytest
import torch

from dataengine.generators import Renders, load_restorer
from enerverse.recipes import restorer
from enerverse.recipes.restorer import RestorerRecipe, draw_pair, main


def test_the_recipe_trains_goes_on_and_ships(tmp_path, monkeypatch):
    monkeypatch.setattr(restorer, "TASKS", ("Lift",))
    monkeypatch.setattr(restorer, "STEPS", (2,))
    recipe = RestorerRecipe(
        out=tmp_path / "run", episodes=1, frames=2, image_size=24, first=3, last=4, ship=tmp_path / "it.safetensors"
    )  # fmt: skip
    main(recipe)
    shipped = load_restorer(tmp_path / "it.safetensors")
    assert all(value.dtype == torch.float32 for value in shipped.parameters())
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    assert len(kept) == 5  # two trainings, a scene and a look at it before and after a turn
    main(recipe)
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}


@pytest.mark.parametrize("seed", range(20))
def test_pairs_stand_two_to_four_places_apart(seed):
    first, second = draw_pair(random.Random(seed), 8)
    assert min(first, second) >= 0
    assert max(first, second) < 8
    assert 2 <= abs(first - second) <= 4


def test_the_shipped_restorer_fills_holes_and_leaves_what_was_seen():
    """A flat table with a hole: what is covered hardly changes, and the hole takes the colour around it."""
    images = torch.full((1, 1, 64, 64, 3), 0.35)
    alpha = torch.ones(1, 1, 64, 64)
    alpha[..., 20:40, 20:40] = 0.0
    renders = Renders(images=images * alpha[..., None], depth=0.9 * alpha, alpha=alpha)
    repaired = load_restorer().repair(renders, None, None)  # type: ignore[arg-type]
    hole = alpha < 0.5
    assert (repaired.images - 0.35).abs()[hole].mean() < 0.15 < 0.35  # black before
    assert (repaired.images - 0.35).abs()[~hole].mean() < 0.06
