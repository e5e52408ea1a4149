"""The speed benchmarks run as on a GPU, tiny: the same code, with every rival by name, of which a CPU has some."""

from dataclasses import replace

import pytest
import torch

from benchmarks import figures, gpu
from benchmarks.speed import attention, decode
from benchmarks.speed.timing import take_turns

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MISSING = {"forward cudnn", "training cudnn", "training flex"}  # on a CPU


@pytest.fixture
def kept(monkeypatch):
    """What the benchmarks would have written, by case."""
    found = {}

    def write(case, values, *, seconds, device):
        found[case] = values
        return case

    for module in (attention, decode):
        monkeypatch.setattr(module, "write_result", write)
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_attention_is_measured_against_every_rival_that_runs(kept, device):
    settings = replace(
        gpu.ATTENTION[0], lengths=(256,), densities=(1.0, 0.5), kinds=("causal",), heads=2, width=64,
        repeats=1, device=device,
    )  # fmt: skip
    attention.main(settings)
    values = kept["speed/gpu_attention_64"]
    assert set(values) == {"errors", "causal 256 1.0", "causal 256 0.5"}
    dense, row = values["causal 256 1.0"], values["causal 256 0.5"]
    assert (
        set(row["failed"]) == MISSING
        if device == "cpu"
        else set(row["failed"]) <= MISSING - {"training flex"}
    )
    assert all(len(why) > 20 for why in row["failed"].values())
    ran = {"forward": {"dense", "flash", "cudnn", "flex"}, "training": {"dense", "flash", "cudnn", "flex"}}
    for part, names in ran.items():
        names = {name for name in names if f"{part} {name}" not in row["failed"]}
        assert {f"{part}_ms"} | {f"{part}_{name}_ms" for name in names} == {
            key for key in row if key.startswith(part) and key.endswith("_ms")
        }
        assert row[f"{part}_over_flash"] == pytest.approx(row[f"{part}_flash_ms"] / row[f"{part}_ms"])
    # A rival that computes something else is none: with everything kept all agree, below that flex does.
    assert {"sdpa", "flash", "flex"} <= set(dense["differences"])
    assert set(row["differences"]) == {"flex"}
    tolerance = 1e-5 if device == "cpu" else 2e-2
    assert max(*dense["differences"].values(), *row["differences"].values()) < tolerance
    assert max(values["errors"]["True"].values()) < tolerance
    assert (row["density"], dense["density"]) == (pytest.approx(0.5, abs=0.2), 1.0)
    text, _ = figures.gpu_attention_section(values)
    assert text.count("\n| causal | 256 |") == 2
    assert (text.count("- forward cudnn did not run: RuntimeError: ") == 1) is (device == "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_is_measured_against_every_rival_that_runs(kept, device):
    settings = replace(gpu.DECODE, length=256, batch=2, heads=2, width=16, layers=8, repeats=1, device=device)
    decode.main(settings)
    values = kept["speed/gpu_decode"]
    step = values["step"]
    assert set(step["failed"]) <= {"cudnn"}
    assert {"random", "pages", "sdpa", "flash", "flex", "products"} <= set(step["ms"])
    fastest = min(step["ms"][name] for name in settings.dense if name in step["ms"])
    assert step["over_best_dense"]["pages"] == pytest.approx(fastest / step["ms"]["pages"])
    assert values["stack"]["failed"] == {}
    assert values["stack"]["times"] > 0
    text, _ = figures.gpu_decode_section(values)
    assert "1/16, in pages of 16" in text


def test_rivals_of_decoding_agree():
    settings = decode.Decode(length=96, batch=2, heads=2, width=16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (decode.draw(settings, generator, 2, 2, n, 16) for n in (1, 96, 96))
    steps = [
        decode._dense_step(settings, name, q, k, v)()
        for name in ("own_dense", "sdpa", "flash", "flex", "products")
    ]
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0])


def test_a_call_that_fails_is_left_out_and_says_why():
    rounds, failed = [], {}

    def broken():
        rounds.append("broken")
        raise torch.OutOfMemoryError("tried to allocate 9 TiB")

    took = take_turns({"broken": broken, "well": lambda: rounds.append("well")}, 2, "cpu", failed)
    assert set(took) == {"well"}
    assert failed == {"broken": "OutOfMemoryError: tried to allocate 9 TiB"}
    assert rounds == ["broken", "well", "well", "well"]
    with pytest.raises(torch.OutOfMemoryError):
        take_turns({"broken": broken}, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_one_sentence_is_all(kept, capsys):
    gpu.main()
    assert capsys.readouterr().out == "bench-gpu: nothing was measured, since no CUDA device is visible\n"
    assert not kept
