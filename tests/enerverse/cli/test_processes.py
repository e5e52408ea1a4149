"""What only a process of its own can show: Ctrl-C, a machine without OpenGL, a closed pipe."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from enerverse.train.checkpoints import list_checkpoints

PROGRAM = [sys.executable, "-m", "enerverse.cli.main"]


def wait_for(path: Path, process: subprocess.Popen, lines: int = 1, seconds: float = 300) -> None:
    """Until `path` has that many lines."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not grow to {lines} lines")


def interrupt_training(words: list[str], metrics: Path, lines: int) -> subprocess.CompletedProcess:
    """Start, wait for a record in `metrics`, press Ctrl-C."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(metrics, process, lines)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()  # a training that did not stop must not outlive its test
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def test_ctrl_c_saves_and_the_same_command_goes_on(data, tmp_path):
    run = tmp_path / "run"
    words = [*PROGRAM, "train", "autoencoder", "--data", str(data), "--out", str(run)]
    words += ["--steps", "100000", "--batch", "2", "--device", "cpu"]
    metrics = run / "autoencoder" / "metrics.jsonl"
    steps = []
    for _ in range(2):
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        done = interrupt_training(words, metrics, lines + 1)
        assert done.returncode == 130, done.stderr
        assert done.stderr.count("\n") == 1
        assert "run the same command again to go on" in done.stderr
        steps.append(int(list_checkpoints(run / "autoencoder")[-1].name.removeprefix("step_")))
        assert f"stopped after step {steps[-1]}" in done.stderr
    assert steps[1] > steps[0] >= 20


def test_without_opengl_the_packages_are_named(tmp_path):
    code = "import ctypes.util, sys; ctypes.util.find_library = lambda name: None\n"
    code += "from enerverse.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "record", "--task", "Lift", "--out", str(tmp_path / "data")]
    done = subprocess.run(
        words, env={**os.environ, "MUJOCO_GL": "egl"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "install the system packages libegl1 libgl1 libgles2" in done.stderr
    assert not (tmp_path / "data").exists()


def test_rendering_that_is_turned_off_is_to_be_turned_on(tmp_path):
    words = [*PROGRAM, "record", "--task", "Lift", "--out", str(tmp_path / "data")]
    done = subprocess.run(
        words, env={**os.environ, "MUJOCO_GL": "off"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "enerverse: MUJOCO_GL: expected one of egl, osmesa, glfw, got 'off', which turns rendering off; unset it\n"
    )


def test_ctrl_c_before_the_program_has_begun_is_one_line(tmp_path):
    (tmp_path / "tyro.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [*PROGRAM, "info"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr == "enerverse: stopped; nothing was written\n"


def test_an_unknown_backend_is_named(tmp_path):
    words = [*PROGRAM, "record", "--task", "Lift", "--out", str(tmp_path / "data")]
    done = subprocess.run(
        words, env={**os.environ, "MUJOCO_GL": "vulkan"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "enerverse: MUJOCO_GL: expected one of egl, osmesa, glfw, got 'vulkan'; unset it\n"


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; sys.stdin.readline()"
    info = subprocess.Popen([*PROGRAM, "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    subprocess.run([sys.executable, "-c", code], stdin=info.stdout, check=True)
    assert info.stdout is not None
    info.stdout.close()
    assert info.stderr is not None
    assert info.stderr.read() == ""
    assert info.wait(timeout=60) == 0
