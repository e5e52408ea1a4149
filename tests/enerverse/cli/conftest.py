"""A tiny dataset and a run trained on it for a few steps, through the program itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from enerverse.cli.main import main

STEPS = ("--steps", "2", "--batch", "2", "--device", "cpu")


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What one call of the program did: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Spoken]:
    """Run the program in this process."""

    def run(*words: object) -> Spoken:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Spoken(code=code, out=said.out, err=said.err)

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two demonstrations of Lift at 64 px."""
    folder = tmp_path_factory.mktemp("data") / "lift"
    assert main(["record", "--task", "Lift", "--out", str(folder), "--episodes", "2"]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in which all three stages were trained for two steps."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    for stage in ("autoencoder", "world", "policy"):
        assert main(["train", stage, "--data", str(data), "--out", str(run), *STEPS]) == 0
    return run
