"""Results of several processes in the order of the items."""

import time

import pytest

pytest.importorskip("dataengine.parallel.workers")
pytest.importorskip("ray")
from dataengine.errors import WorkError
from dataengine.multiview import multiview
from dataengine.parallel.ordered import map_in_order
from enerverse.cli.multiview import spread
from tests.dataengine.scene.conftest import capture, ring, save_dataset
from tests.dataengine.scene.test_multiview import SETTINGS, files

pytestmark = pytest.mark.usefixtures("cluster")


def slow_first(item):
    time.sleep(0.3 if item == 0 else 0.0)
    if item == 7:
        raise ValueError("item: expected another one, got 7")
    return item * item


def test_results_come_in_order_and_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for item in range(7):
            taken.append(item)
            yield item

    results = map_in_order(slow_first, items(), workers=2)
    assert next(results) == 0
    assert len(taken) <= 5
    assert list(results) == [1, 4, 9, 16, 25, 36]
    assert list(map_in_order(slow_first, range(3), workers=1)) == [0, 1, 4]


def test_a_failure_comes_after_the_results_before_it():
    results = map_in_order(slow_first, [1, 2, 7, 3], workers=2)
    assert [next(results), next(results)] == [1, 4]
    with pytest.raises(WorkError, match="item: expected another one, got 7"):
        next(results)


def test_two_processes_make_the_same_dataset_as_one(tmp_path):
    pair = capture(ring(6).select(["ring_0", "ring_1"]))
    source = save_dataset(tmp_path / "push", [pair, pair])
    for name, run in (("one", map), ("two", spread(2))):
        multiview(source, tmp_path / name, SETTINGS, progress=False, run=run)
    assert files(tmp_path / "one") == files(tmp_path / "two")
