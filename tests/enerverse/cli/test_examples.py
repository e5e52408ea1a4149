"""The scripts in examples/ run."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[3] / "examples"


def run(name, *words, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*map(str, words))
    return capsys.readouterr().out


def test_record_then_train(tmp_path, capsys):
    said = run("1_record_and_read", tmp_path / "push", capsys=capsys)
    assert "kept 2 of 2 episodes" in said
    assert "the top camera stands at" in said
    said = run("2_train_a_world_model", tmp_path / "push", tmp_path / "run", capsys=capsys)
    assert "imagined 16 frames of 3 views" in said


def test_imagine(trained, capsys):
    said = run("3_imagine", trained, capsys=capsys)
    assert "frames [1, 16, 3, 3, 64, 64]" in said
    assert "the two futures differ by" in said


def test_act(trained, capsys):
    assert "solved after" in run("4_act", trained, capsys=capsys)


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in source
