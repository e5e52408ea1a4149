"""Fanning work out over Ray: order, failures, deaths, and what is done once."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dataengine.errors import WorkError
from dataengine.parallel import fan_out
from dataengine.parallel.cluster import connected


@pytest.fixture(scope="module")
def cluster():
    """One local cluster of two processors for the whole file: starting one takes seconds."""
    with connected(2, None) as ray:
        yield ray


@dataclass
class Square:
    """Squares numbers and notes who did it; some numbers end badly."""

    folder: Path
    raises: tuple[int, ...] = ()
    kills_once: tuple[int, ...] = ()
    kills: tuple[int, ...] = ()

    def __call__(self, number: int) -> int:
        note = self.folder / f"{number}"
        first = not note.exists()
        with note.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if number in self.raises:
            raise ValueError(f"number: expected another than {number}")
        if number in self.kills or (first and number in self.kills_once):
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2

    def processes(self, number: int) -> list[int]:
        """Which processes have been given a number, in order."""
        return [int(line) for line in (self.folder / f"{number}").read_text().split()]


@dataclass
class Meet:
    """Returns when two items are being worked on at once."""

    folder: Path

    def __call__(self, number: int) -> tuple[int, int]:
        (self.folder / f"{number}").touch()
        end = time.monotonic() + 60
        while len(list(self.folder.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return number, os.getpid()


@pytest.mark.usefixtures("cluster")
def test_two_items_at_a_time_in_the_order_of_the_items(tmp_path):
    (first, one), (second, other), (third, _) = fan_out(Meet(tmp_path), [7, 8, 9], workers=2)
    assert (first, second, third) == (7, 8, 9)
    assert len({one, other, os.getpid()}) == 3


def test_one_worker_is_this_process_and_needs_no_ray(tmp_path):
    task = Square(tmp_path, raises=(1,))
    with pytest.raises(
        WorkError, match="1 of 3 failed: 1: number: expected another than 1; what is finished"
    ):
        fan_out(task, [0, 1, 2], workers=1)
    assert task.processes(2) == [os.getpid()]


@pytest.mark.usefixtures("cluster")
def test_an_item_whose_process_is_killed_is_tried_again_in_another(tmp_path):
    task = Square(tmp_path, kills_once=(2,))
    assert fan_out(task, range(5), workers=2) == [0, 1, 4, 9, 16]
    first, second = task.processes(2)
    assert first != second


@pytest.mark.usefixtures("cluster")
def test_items_that_fail_every_time_are_named_after_the_others_are_finished(tmp_path):
    task = Square(tmp_path, raises=(1,), kills=(2,))
    with pytest.raises(WorkError) as caught:
        fan_out(task, range(6), workers=2, retries=1, name=lambda n: f"number {n}")
    assert sorted(caught.value.names) == ["number 1", "number 2"]
    assert "2 of 6 failed: " in str(caught.value)
    assert "number 1: number: expected another than 1" in str(caught.value)
    assert "number 2: its process died 2 times: killed, out of memory or crashed" in str(caught.value)
    assert len(task.processes(1)) == 1  # an error of the task itself would come again
    assert len(task.processes(2)) == 2
    assert all(task.processes(n) for n in (0, 3, 4, 5))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        fan_out(Square(tmp_path), [1], workers=0)
    with pytest.raises(ValueError, match="retries: expected at least 0, got -1"):
        fan_out(Square(tmp_path), [1], retries=-1)


def test_no_cluster_at_the_address(tmp_path):
    with socket.socket() as taken:  # bound, so that nobody else listens there either
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code = (
            "import sys; from dataengine.parallel import fan_out\n"
            "try: fan_out(abs, [1], address=sys.argv[1])\n"
            "except ConnectionError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=60
        )
    assert done.stdout.startswith(f"address: expected a Ray cluster at '{address}', got no answer"), (
        done.stderr
    )


def test_ray_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # what Python does where a package is absent
    with pytest.raises(ImportError, match=r'found none; pip install "enerverse\[ray\]"'):
        fan_out(Square(tmp_path), [1], workers=2)
    assert fan_out(Square(tmp_path), [3], workers=1) == [9]
