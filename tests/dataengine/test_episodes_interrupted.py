"""A killed process, a full disk, two writers at once, and the cost of a frame."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import dataengine.lerobot.video as video
from dataengine.episodes import DatasetError, DatasetWriteError, EpisodeDataset

PRELUDE = """
import numpy as np, sys
from dataengine.episodes import EpisodeWriter, DatasetWriteError
image = {"a": np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)}
def add(writer):
    writer.add_frame(images=image, state=[0.0], action=[1.0], task="x")
def open_writer():
    return EpisodeWriter(sys.argv[1], fps=10, views=["a"], image_size=(64, 64), state_dim=1, action_dim=1)
"""


def start(root: Path, body: str) -> subprocess.Popen:
    code = PRELUDE + textwrap.dedent(body)
    command = [sys.executable, "-c", code, str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the recording process did not get there in time"
        time.sleep(0.002)


def reopen_and_add(root: Path) -> EpisodeDataset:
    from dataengine.episodes import EpisodeWriter

    namespace: dict = {}
    exec(PRELUDE.replace("sys.argv[1]", "ROOT"), namespace)
    namespace["ROOT"] = root
    assert namespace["EpisodeWriter"] is EpisodeWriter
    with namespace["open_writer"]() as writer:
        namespace["add"](writer)
        writer.save_episode()
    return EpisodeDataset(root)


@pytest.mark.parametrize("delay", [0.0, 0.004, 0.011])
def test_killed_process_leaves_finished_episodes(tmp_path, delay):
    """SIGKILL while episodes of one frame follow each other: most time goes into publishing."""
    root = tmp_path / "dataset"
    process = start(root, "w = open_writer()\nwhile True:\n    add(w)\n    w.save_episode()\n")
    meta = root / "meta/episodes/chunk-000"
    wait_for(lambda: len(list(meta.glob("file-*.parquet"))) >= 3, process)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    dataset = EpisodeDataset(root)
    assert len(dataset) >= 3
    dataset.validate()
    again = reopen_and_add(root)
    assert len(again) == len(dataset) + 1
    again.validate()
    assert not (root / ".unfinished").exists()
    assert len(list(root.glob("data/*/*.parquet"))) == len(list(root.glob("videos/*/*/*.mp4"))) == len(again)


def test_killed_in_the_middle_of_an_episode(tmp_path):
    root = tmp_path / "dataset"
    process = start(root, "w = open_writer()\nadd(w)\nw.save_episode()\nwhile True:\n    add(w)\n")
    wait_for(
        lambda: (
            (
                root / ".unfinished/observation.images.a.mp4"
            ).exists()  # of the second one: the first is all there
            and any(root.glob("meta/episodes/*/*.parquet"))
        ),
        process,
    )
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(EpisodeDataset(root)) == 1
    assert len(reopen_and_add(root)) == 2


def test_file_size_limit_keeps_finished_episodes(tmp_path):
    """A real refusal by the kernel: no file may grow beyond 600 kB, and the noise images need more."""
    root = tmp_path / "dataset"
    body = """
        import resource
        w = open_writer()
        add(w)
        w.save_episode(seed=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
        try:
            for _ in range(3000):
                add(w)
            print("no error")
        except DatasetWriteError as error:
            print(error)
        add(w)
        w.save_episode(seed=2)
        w.finalize()
    """
    out, err = start(root, body).communicate(timeout=60)
    assert out.strip() == (
        f"{root}/.unfinished/observation.images.a.mp4: cannot write (File too large); the 1 finished "
        f"episodes in {root} are "
        "kept and readable, the unfinished one was dropped; free space and continue with a new EpisodeWriter "
        "on the same root"
    ), err
    assert not (root / ".unfinished").exists()
    dataset = EpisodeDataset(root)
    assert dataset.lengths == (1, 1)
    dataset.validate()


class FullDisk:
    """A real file whose writes fail with ENOSPC after some bytes."""

    def __init__(self, path: Path, room: int):
        self.file, self.room, self.written = open(path, "wb"), room, 0  # noqa: SIM115

    def write(self, data) -> int:
        self.written += len(data)
        if self.written > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 3_000])
def test_full_disk_is_one_sentence(dataset_root, open_writer, make_frame, monkeypatch, room):
    writer = open_writer()
    monkeypatch.setattr(video, "open", lambda path, mode: FullDisk(path, room), raising=False)
    sentence = (
        r"cannot write \(No space left on device\); the 3 finished episodes in .* are kept and readable"
    )
    with pytest.raises(DatasetWriteError, match=sentence) as caught:
        for t in range(200):
            writer.add_frame(**make_frame(t))
        writer.save_episode()
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, OSError)
    assert not (dataset_root / ".unfinished").exists()
    monkeypatch.undo()
    writer.finalize()
    assert EpisodeDataset(dataset_root).lengths == (5, 6, 7)
    EpisodeDataset(dataset_root).validate()


@pytest.mark.parametrize("failing", range(1, 8))
def test_any_refused_rename_leaves_the_dataset_whole(
    dataset_root, open_writer, make_frame, monkeypatch, failing
):
    """Publishing an episode renames several files; whichever fails, the dataset is the old one or the new
    one.
    """
    writer = open_writer()
    writer.add_frame(**make_frame(0) | {"task": "new task"})
    calls, replace = iter(range(1, 100)), os.replace

    def refuse(source, target):
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DatasetWriteError, match="are kept and readable"):
        writer.save_episode()
        raise AssertionError(f"publishing needs fewer than {failing} renames")
    monkeypatch.undo()
    writer.finalize()
    dataset = EpisodeDataset(dataset_root)
    dataset.validate()
    assert len(list(dataset_root.glob("data/*/*.parquet"))) == len(dataset)


def test_one_writer_at_a_time(dataset_root, open_writer):
    first = open_writer()
    with pytest.raises(
        DatasetError, match="expected one writer at a time, but another one has this dataset open"
    ):
        open_writer()
    first.finalize()
    open_writer().finalize()


def test_exception_inside_the_context_keeps_finished_episodes(open_writer, make_frame):
    writer = open_writer()
    with pytest.raises(RuntimeError), writer:
        writer.add_frame(**make_frame(0))
        writer.save_episode()
        writer.add_frame(**make_frame(1))
        raise RuntimeError
    assert EpisodeDataset(writer.root).lengths == (1,)


def test_cost_of_a_frame_does_not_grow(open_writer, make_frame):
    """Count Python function calls and bytes on disk of one add_frame, early and late in an episode."""
    writer = open_writer(full=True)
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    per_block, sizes = [], []
    for _ in range(8):
        frames = [make_frame(t, full=True) for t in range(20)]
        sys.setprofile(count)
        try:
            calls = 0
            for values in frames:
                writer.add_frame(**values)
        finally:
            sys.setprofile(None)
        per_block.append(calls)
        sizes.append(sum(p.stat().st_size for p in (writer.root / ".unfinished").iterdir()))
    assert max(per_block[1:]) <= 1.05 * min(per_block[1:])
    steps = [b - a for a, b in itertools.pairwise(sizes)]
    assert min(steps) > 0, "frames stay in memory instead of going to the file"
    assert max(steps) < 3 * sum(steps) / len(steps)
    writer.finalize()
