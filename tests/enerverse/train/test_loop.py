"""The training loop: exact resume after any death, plain stops, complete records."""

import math
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from enerverse.config import to_json
from enerverse.files import load_tensors, prepare_run, read_metrics, save_tensors
from enerverse.train import NotFinite, TrainConfig, TrainingStopped, train
from enerverse.train.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint
from enerverse.train.ema import WeightAverage

PROGRAM = Path(__file__).with_name("interrupted.py")
runs = SimpleNamespace(**runpy.run_path(str(PROGRAM)))
CONFIG = runs.CONFIG


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    others = second.state_dict()
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())


def same_checkpoints(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold the same bits: weights, averages and the optimiser's state."""
    names = sorted(path.name for path in first.iterdir())
    tables = [[load_tensors(folder / name)[0] for name in names] for folder in (first, second)]
    return all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(*tables, strict=True)
    )


@pytest.mark.parametrize("kind", ["autoencoder", "world"])
def test_a_killed_run_goes_on_to_the_same_bits(kind, tmp_path):
    """SIGKILL falls between checkpoints, at step 11; steps 8 to 11 are done twice."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained = train(runs.make_task(kind), CONFIG, whole, device="cpu")
    child = subprocess.run([sys.executable, PROGRAM, kind, cut, "11"], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [path.name for path in list_checkpoints(cut)] == ["step_0000004", "step_0000008"]
    assert read_metrics(cut)[-1]["step"] == 11
    resumed = train(runs.make_task(kind), CONFIG, cut, device="cpu")
    assert same_weights(resumed, trained)
    assert same_checkpoints(list_checkpoints(cut)[-1], list_checkpoints(whole)[-1])
    records = read_metrics(cut)
    assert [record["step"] for record in records] == list(range(1, 15))
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    processor = [record["cpu_seconds"] for record in records]
    assert processor == sorted(processor)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["kl", "world"])
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_bits(kind, number, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained = train(runs.make_task(kind), CONFIG, whole, device="cpu")
    task = runs.strike(runs.make_task(kind), 5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(TrainingStopped, match=rf"stopped after step 6, saved in {cut}; run the same command"):
        train(task, CONFIG, cut, device="cpu")
    assert list_checkpoints(cut)[-1].name == "step_0000006"
    assert same_weights(train(runs.make_task(kind), CONFIG, cut, device="cpu"), trained)


def test_handlers_of_signals_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(runs.make_task("autoencoder"), replace(CONFIG, steps=1), tmp_path, device="cpu")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_is_immediate(tmp_path):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(runs.strike(runs.make_task("autoencoder"), 5, twice), CONFIG, tmp_path, device="cpu")


def test_a_finished_run_is_not_trained_again(tmp_path):
    trained = train(runs.make_task("autoencoder"), CONFIG, tmp_path, device="cpu")
    count = len(read_metrics(tmp_path))
    assert same_weights(train(runs.make_task("autoencoder"), CONFIG, tmp_path, device="cpu"), trained)
    assert len(read_metrics(tmp_path)) == count


def test_a_loss_that_is_not_a_number_names_its_step(tmp_path):
    episodes = runs.random_episodes()
    spoilt = replace(episodes, latents=torch.full_like(episodes.latents, float("nan")))
    task, healthy = runs.make_world_task(), runs.make_world_task(spoilt)
    task.batch = lambda step, draw=task.batch: (healthy.sampler if step == 6 else task.sampler).batch(step)
    with pytest.raises(NotFinite, match=r"step 7: expected a finite loss and gradient, got loss nan"):
        train(task, CONFIG, tmp_path, device="cpu")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_0000004"]
    assert all(torch.isfinite(value).all() for value in task.module.state_dict().values())


def test_every_logged_step_has_a_record(tmp_path):
    train(runs.make_task("autoencoder"), replace(CONFIG, log_every=4), tmp_path, device="cpu")
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [4, 8, 12, 14]
    for record in records:
        assert record.keys() == {"loss", "gradient", "rate", "psnr", "step", "seconds", "cpu_seconds"}
        assert all(math.isfinite(value) for value in record.values())
        assert record["rate"] == pytest.approx(CONFIG.rate_at(record["step"] - 1))


def test_the_newest_two_checkpoints_are_kept_as_safetensors_alone(tmp_path):
    train(runs.make_task("world"), CONFIG, tmp_path, device="cpu")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_0000012", "step_0000014"]
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    names = ("average", "model", "optimizer")
    saved = [f"checkpoints/step_00000{step}/{name}.safetensors" for step in (12, 14) for name in names]
    assert files == [*saved, "metrics.jsonl"]


def test_tensorboard_is_written_only_when_asked_for():
    assert not TrainConfig().tensorboard


def test_the_returned_module_holds_averaged_weights(tmp_path):
    trained = train(runs.make_task("autoencoder"), CONFIG, tmp_path, device="cpu")
    saved = list_checkpoints(tmp_path)[-1]
    average, latest = (load_tensors(saved / f"{name}.safetensors")[0] for name in ("average", "model"))
    state = trained.state_dict()
    assert all(torch.equal(state[name], value) for name, value in average.items())
    assert not torch.equal(state["to_latent.weight"], latest["to_latent.weight"])


def test_evaluation_sees_averaged_weights_and_leaves_no_trace(tmp_path):
    plain = train(runs.make_task("autoencoder"), CONFIG, tmp_path / "plain", device="cpu")
    seen = []

    def evaluate(module: nn.Module, step: int) -> dict[str, float]:
        seen.append((step, module.training, module.state_dict()["to_latent.bias"].clone()))
        return {"score": 2.0 * step}

    trained = train(
        runs.make_task("autoencoder"), CONFIG, tmp_path / "checked", device="cpu", evaluate=evaluate,
        evaluate_every=5,
    )  # fmt: skip
    assert same_weights(trained, plain)
    assert [(step, training) for step, training, _ in seen] == [(5, False), (10, False), (14, False)]
    assert torch.equal(seen[-1][2], trained.state_dict()["to_latent.bias"])
    scores = [record["score"] for record in read_metrics(tmp_path / "checked") if "score" in record]
    assert scores == [10.0, 20.0, 28.0]


def test_the_average_is_the_recurrence_done_by_hand():
    module, decay = nn.Linear(1, 1, bias=False), 0.8
    average = WeightAverage(module, decay)
    expected = module.weight.item()
    for step in range(1, 60):
        with torch.no_grad():
            module.weight.fill_(math.sin(step))
        average.update(module, step)
        keep = min(decay, step / (step + 10))
        expected = keep * expected + (1 - keep) * math.sin(step)
    assert average.average["weight"].item() == pytest.approx(expected, abs=1e-6)


def test_the_average_copies_counters():
    module = nn.BatchNorm1d(2)
    average = WeightAverage(module, 0.9)
    module.num_batches_tracked += 7
    average.update(module, 1)
    assert average.average["num_batches_tracked"] == 7


def test_the_rate_warms_up_and_falls_along_a_cosine():
    config = TrainConfig(steps=110, warmup=10, rate=2.0, final=0.1)
    assert config.rate_at(0) == pytest.approx(0.2)
    assert config.rate_at(4) == pytest.approx(1.0)
    assert config.rate_at(9) == pytest.approx(2.0)
    assert config.rate_at(10) == pytest.approx(2.0)
    assert config.rate_at(35) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert config.rate_at(60) == pytest.approx(2.0 * 0.55)
    assert config.rate_at(110) == pytest.approx(0.2)
    assert config.rate_at(500) == pytest.approx(0.2)


def test_a_run_folder_of_another_config_is_refused(tmp_path):
    prepare_run(tmp_path, to_json(CONFIG))
    with pytest.raises(
        ValueError, match=r"holds a run with another config \(steps is 14 there and 15 here\)"
    ):
        prepare_run(tmp_path, to_json(replace(CONFIG, steps=15)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"precision": "fp8"}, "precision: expected 'no' or 'bf16', got 'fp8'"),
        ({"steps": 0}, "steps and batch: expected at least 1, got 0 and 8"),
    ],
)
def test_impossible_settings_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(**changes)


@pytest.fixture
def file_limit():
    """A limit on the size of files this process may write: what stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignore = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignore)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, file_limit):
    module = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(module.parameters())
    average = WeightAverage(module, 0.9)
    module(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, 3, module, average, optimizer)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        module.weight.add_(1)
    file_limit(20_000)  # the weights still fit, the optimiser's state does not
    with pytest.raises(OSError, match="the disk is full, nothing was changed"):
        save_checkpoint(tmp_path, 4, module, average, optimizer)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_0000003"]
    assert load_checkpoint(list_checkpoints(tmp_path)[-1], module, average, optimizer) == 3
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("spoil", ["cut", "gone", "nameless"])
def test_a_damaged_checkpoint_is_passed_over_with_a_line(spoil, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained = train(runs.make_task("autoencoder"), CONFIG, whole, device="cpu")
    train(runs.make_task("autoencoder"), CONFIG, cut, device="cpu")
    newest = list_checkpoints(cut)[-1] / "optimizer.safetensors"
    if spoil == "cut":
        newest.write_bytes(newest.read_bytes()[:100])
    elif spoil == "gone":
        newest.unlink()
    else:
        save_tensors(newest, load_tensors(newest)[0])
    capsys.readouterr()
    resumed = train(runs.make_task("autoencoder"), CONFIG, cut, device="cpu")
    said = capsys.readouterr().err
    assert said.startswith("checkpoint passed over: ")
    assert said.count("\n") == 1
    assert "step_0000014" in said
    assert same_weights(resumed, trained)
    assert [record["step"] for record in read_metrics(cut)] == list(range(1, 15))
    assert same_checkpoints(list_checkpoints(cut)[-1], list_checkpoints(whole)[-1])


def test_a_run_without_a_whole_checkpoint_names_the_folder_to_delete(tmp_path):
    train(runs.make_task("autoencoder"), CONFIG, tmp_path, device="cpu")
    for folder in list_checkpoints(tmp_path):
        (folder / "model.safetensors").write_bytes(b"torn")
    sentence = f"{tmp_path / 'checkpoints'}: expected a whole checkpoint, got 2 damaged; delete this folder"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train(runs.make_task("autoencoder"), CONFIG, tmp_path, device="cpu")


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    train(runs.make_task("autoencoder"), replace(CONFIG, steps=5), tmp_path, device="cpu")
    torn = tmp_path / "checkpoints" / ".step_0000009.tmp"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_0000004", "step_0000005"]
