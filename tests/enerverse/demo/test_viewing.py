"""The part of the demo that looks from where no camera stood, on a world that is known."""

from dataclasses import replace

import pytest

from enerverse.demo import viewing
from enerverse.demo.page import VIEWS, _views
from enerverse.report import Report
from tests.dataengine.scene.conftest import capture, ring


@pytest.fixture
def viewed(tmp_path, monkeypatch):
    monkeypatch.setattr(viewing, "STEPS", 12)
    monkeypatch.setattr(viewing, "REFIT", 8)
    monkeypatch.setattr(viewing, "FRAMES", 2)
    seen, anchors, unseen = (
        capture(ring(2)),
        capture(ring(2, phase=3.5, name="anchor")),
        capture(ring(1, phase=0.4)),
    )
    seen, anchors, unseen = (replace(views, body_ids=None, bodies=None) for views in (seen, anchors, unseen))
    return viewing.view(seen, anchors, unseen, tmp_path / "scene.html")


def test_unseen_cameras_are_compared_with_the_truth(viewed):
    assert list(viewed.films) == ["truth", "first fit", "after two turns"]
    assert {film.shape for film in viewed.films.values()} == {(2, 1, 24, 24, 3)}
    assert viewed.seen.shape == (2, 2, 24, 24, 3)
    assert viewed.fps == 5.0  # every second frame of ten a second
    assert set(viewed.psnr) == {"first fit", "after two turns"}
    assert all(10 < value < 60 for value in viewed.psnr.values())
    assert "<canvas" in viewed.page.read_text()


def test_the_report_shows_them_and_names_the_page(viewed):
    page = Report("test")
    _views(page, viewed)
    text = page.html()
    assert text.count("<video") == 2
    assert "scene.html" in text
    assert f"after two turns {viewed.psnr['after two turns']:.1f} dB" in text
    assert "From where no camera stood" in VIEWS
