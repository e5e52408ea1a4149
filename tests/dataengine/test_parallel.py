"""Fanning work out over Ray: order, failures, deaths, full disks, and what is done once."""

import contextlib
import errno
import hashlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import psutil
import pytest

# Every process imports this file, so what loads torch or mujoco is loaded where it is used.
from dataengine.episodes import DatasetError, EpisodeDataset, EpisodeWriter
from dataengine.errors import WorkError
from dataengine.parallel import fan_out, reconstruct_parallel, record_parallel
from dataengine.parallel.reconstruct import FitEpisode
from dataengine.record import record, writer_arguments


@dataclass
class Square:
    """Squares numbers and notes who did it, when as many as shall be begun `together` are; some numbers end badly."""

    folder: Path
    together: int = 1
    raises: tuple[int, ...] = ()
    kills_once: tuple[int, ...] = ()
    kills: tuple[int, ...] = ()

    def __call__(self, number: int) -> int:
        note = self.folder / f"{number}"
        first = not note.exists()
        with note.open("a") as file:
            file.write(f"{os.getpid()}\n")
        end = time.monotonic() + 60
        while len(list(self.folder.iterdir())) < self.together and time.monotonic() < end:
            time.sleep(0.01)
        if number in self.raises:
            raise ValueError(f"number: expected another than {number}")
        if number in self.kills or (first and number in self.kills_once):
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2

    def processes(self, number: int) -> list[int]:
        """Which processes have been given a number, in order."""
        return [int(line) for line in (self.folder / f"{number}").read_text().split()]


@pytest.mark.usefixtures("cluster")
def test_two_items_at_a_time_in_order_and_again_where_a_process_is_killed(tmp_path):
    task = Square(tmp_path, together=2, kills_once=(8,))
    assert fan_out(task, [7, 8, 9], workers=2) == [49, 64, 81]
    (one,), (other, again) = task.processes(7), task.processes(8)
    assert len({one, other, os.getpid()}) == 3
    assert again != other


def test_one_worker_is_this_process_and_needs_no_ray(tmp_path):
    task = Square(tmp_path, raises=(1,))
    with pytest.raises(
        WorkError, match="1 of 3 failed: 1: number: expected another than 1; what is finished"
    ):
        fan_out(task, [0, 1, 2], workers=1)
    assert task.processes(2) == [os.getpid()]


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


@pytest.mark.usefixtures("cluster")
def test_no_other_machine_reaches_the_processes():
    places = {ipaddress.ip_address(place) for place in listening(psutil.Process())}
    assert len(places) > 0
    assert all((getattr(place, "ipv4_mapped", None) or place).is_loopback for place in places), places


def listening(root):
    """The addresses at which a process and its children listen."""
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found = process.net_connections("inet")
                yield from (c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN)


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


@dataclass
class Store:
    """Writes items, one of them to a device that is always full."""

    folder: Path
    full: int

    def __call__(self, number: int) -> None:
        (self.folder / f"{number}").touch()
        with open("/dev/full" if number == self.full else os.devnull, "wb", buffering=0) as file:
            file.write(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("cluster")
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_ends_the_work(tmp_path, workers):
    with pytest.raises(
        OSError, match="1: .*No space left on device; what is finished is kept; free"
    ) as caught:
        fan_out(Store(tmp_path, full=1), range(50), workers=workers)
    assert caught.value.errno == errno.ENOSPC
    assert len(list(tmp_path.iterdir())) < 40  # those in hand; what could not be written is not begun


class Line(gymnasium.Env):
    """A point that must reach +1, solved from even seeds only; each episode leaves a note, and some seeds end badly."""

    metadata = {"render_modes": [], "render_fps": 10}  # noqa: RUF012

    def __init__(self, notes: Path, raises_once: int = -1, kills_once: int = -1):
        self.observation_space = gymnasium.spaces.Dict({})
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,))
        self.notes, self.raises_once, self.kills_once = notes, raises_once, kills_once

    def _result(self):
        level = int(100 + 50 * self.position + self.seed)
        info = {
            "task": f"reach from {self.seed % 3}",
            "is_success": bool(self.position >= 1 and self.seed % 2 == 0),
            "cameras": {"front": {"intrinsics": np.diag([20.0, 20.0, 1.0]), "camera_to_world": np.eye(4)}},
        }
        images = {"front": np.full((16, 24, 3), level, np.uint8)}
        return {"images": images, "state": np.array([self.position, self.seed], np.float32)}, info

    def reset(self, *, seed=None, options=None):
        self.seed, self.position = seed, 0.0
        return self._result()

    def step(self, action):
        self.position += float(action[0])
        if self.position > 0.5:
            self._end_badly()
        return *self._result()[:1], 0.0, self.position >= 1, False, self._result()[1]

    def _end_badly(self):
        note = self.notes / f"{self.seed}-{os.getpid()}"
        first = not list(self.notes.glob(f"{self.seed}-*"))
        note.touch()
        if first and self.seed == self.raises_once:
            raise RuntimeError("motor fault")
        if first and self.seed == self.kills_once:
            os.kill(os.getpid(), signal.SIGKILL)


class Push:
    """Noise from the seed alone."""

    def __init__(self, env):
        pass

    def reset(self, seed):
        self.random = np.random.default_rng(seed)

    def act(self, obs, info):
        return 0.2 + self.random.uniform(0, 0.1, 1), np.array([0.25])


def files_of(root):
    """Path -> digest of every file below a folder."""
    found = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def record_with(root, make_env, episodes, *, seed=10, **options):
    """Record into `root`: by `record` where no option is given, else by `record_parallel`."""
    env = make_env()
    with EpisodeWriter(root, **writer_arguments(env)) as writer:
        if not options:
            return record(env, Push(env), writer, episodes, seed)
        return record_parallel(make_env, Push, writer, episodes, seed, **options)


@pytest.mark.usefixtures("cluster")
def test_two_workers_record_the_same_bytes_as_one_and_go_on(tmp_path):
    make_env = partial(Line, tmp_path)
    alone = record_with(tmp_path / "alone", make_env, 4)
    first = record_with(tmp_path / "both", make_env, 2, workers=2)
    rest = record_with(tmp_path / "both", make_env, 4, workers=2)
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "both")
    assert (first.kept + rest.kept, first.tried + rest.tried, rest.held) == (alone.kept, alone.tried, 2)
    assert first.frames + rest.frames == alone.frames
    EpisodeDataset(tmp_path / "both").validate()
    assert record_with(tmp_path / "both", make_env, 4, workers=2).tried == 0


@pytest.mark.usefixtures("cluster")
def test_killed_in_an_episode_and_failed_in_another_nothing_is_lost(tmp_path):
    notes, root = tmp_path / "notes", tmp_path / "d"
    notes.mkdir()
    make_env = partial(Line, notes, raises_once=14, kills_once=16)
    with pytest.raises(WorkError, match="failed: seed 14: RuntimeError: motor fault; what is finished"):
        record_with(root, make_env, 6, workers=2)
    played = {int(note.name.partition("-")[0]) for note in notes.iterdir()}
    assert (
        EpisodeDataset(root).lengths == EpisodeDataset(root).lengths[:2]
    )  # seeds 10 and 12, before the failure
    for note in notes.iterdir():
        note.rename(notes / f"old-{note.name}")
    (notes / "14-1").touch()
    (notes / "16-1").touch()
    assert record_with(root, make_env, 6, workers=2).held == 2
    again = {int(n.name.partition("-")[0]) for n in notes.iterdir() if not n.name.startswith("old")}
    assert again & played <= {14, 16}  # the others come from what the first run left
    record_with(tmp_path / "alone", partial(Line, tmp_path), 6)
    assert files_of(root) == files_of(tmp_path / "alone")


@pytest.mark.usefixtures("cluster")
def test_too_few_successes_by_two(tmp_path):
    with pytest.raises(DatasetError, match=r"expected 2 episodes from seeds 11 to 12, got 1; they are kept"):
        record_with(tmp_path / "d", partial(Line, tmp_path), 2, seed=11, workers=2, max_tries=2)
    assert EpisodeDataset(tmp_path / "d").success == (True,)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Two short episodes from three cameras, with depth."""
    from tests.dataengine.scene.conftest import capture, ring, save_dataset

    views = capture(ring(3)).at(slice(0, 2))
    return save_dataset(tmp_path_factory.mktemp("seen") / "d", [views, views], ids=False).root


def plan(steps=15):
    from dataengine.fit import Fit
    from dataengine.reconstruct import Reconstruction

    return Reconstruction(motion="static", fit=Fit(steps=steps, save_every=5, quiet=True))


@dataclass
class KilledInTheMiddle:
    """A fit whose process is killed when its first checkpoint is there, unless there was one before."""

    task: FitEpisode

    def __call__(self, index: int) -> Path:
        from dataengine import fit

        checkpoint, save = self.task.folder / f"scene-{index:06d}" / "fit.safetensors", fit.save_tensors

        def save_and_die(*arguments):
            save(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        if checkpoint.exists():
            checkpoint.with_name("went_on").touch()
        elif index == 1:
            fit.save_tensors = save_and_die
        return self.task(index)


def tensors_of(path):
    from dataengine.scene import Scene

    return {name: value.numpy() for name, value in Scene.load(path).state_dict().items()}


@pytest.mark.usefixtures("cluster")
def test_a_fit_whose_process_is_killed_goes_on_from_its_checkpoint(seen, tmp_path):
    (alone,) = reconstruct_parallel(seen, tmp_path / "alone", [1], plan(), workers=1)
    task = KilledInTheMiddle(FitEpisode(seen, tmp_path / "killed", None, plan()))
    paths = fan_out(task, [0, 1], workers=2)
    assert [path.parent.name for path in paths] == ["scene-000000", "scene-000001"]
    assert not (paths[0].parent / "went_on").exists()
    assert (paths[1].parent / "went_on").exists()
    for name, value in tensors_of(alone).items():
        np.testing.assert_array_equal(tensors_of(paths[1])[name], value, err_msg=name)
    written = [path.stat().st_mtime_ns for path in paths]
    assert reconstruct_parallel(seen, tmp_path / "killed", settings=plan(), workers=1) == paths
    assert [path.stat().st_mtime_ns for path in paths] == written  # nothing was fitted again


def test_scenes_of_other_settings_are_not_taken_for_these(seen, tmp_path):
    reconstruct_parallel(seen, tmp_path, [0], plan(), workers=1)
    with pytest.raises(WorkError, match="episode 0: .*expected a scene of the same settings, got another"):
        reconstruct_parallel(seen, tmp_path, [0], plan(5), workers=1)
    with pytest.raises(WorkError, match="episode 0: .*expected a scene of the same views, got another"):
        reconstruct_parallel(seen, tmp_path, [0], plan(), views=["ring_0", "ring_1"], workers=1)
    with pytest.raises(ValueError, match="episodes: expected 0 to 1, got 2"):
        reconstruct_parallel(seen, tmp_path, [2], plan())
    with pytest.raises(ValueError, match="views: unknown view 'ring_7'; did you mean 'ring_2'"):
        reconstruct_parallel(seen, tmp_path, views=["ring_7"])
