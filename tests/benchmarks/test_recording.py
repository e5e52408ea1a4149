"""The recording benchmark, tiny: it compares the same pictures, and its shares are those of its rates."""

import pytest

from benchmarks.speed.recording import Recording, episodes_of, measure


def test_a_tiny_case():
    settings = Recording(episodes=1, rounds=1)
    episodes = episodes_of(settings)
    assert len(episodes) == 1
    row = measure(settings, episodes, cameras=1, size=16, depth=True)
    assert row["same_pictures"]
    assert row["share"] == pytest.approx(row["record"] / row["raw"])
    assert min(row[name] for name in ("raw", "draw", "record", "raw_cpu", "record_cpu", "two_cores")) > 0
