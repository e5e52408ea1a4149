"""Distillation: pooled attention against its definition, taps, the steps of training, and learned weights on disk."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_core.attention.calibrate import model_hash
from sparse_core.attention.gate import BlockGate
from sparse_core.distill import (
    distill,
    fit,
    full_attention,
    load_learned,
    pooled_attention,
    save_learned,
    tap,
)


def tokens(heads, kv_heads, tq, tk, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, tq, width, generator=generator) * 2
    return q, torch.randn(2, kv_heads, tk, width, generator=generator)


def definition(q, k, causal, scale=None):
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * (scale or q.shape[-1] ** -0.5)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1)


SHAPES = [(4, 2, 100, 100), (2, 2, 77, 130), (3, 1, 13, 13), (2, 2, 128, 128), (2, 1, 1, 65)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [16, 64, (1, 16), (32, 8), (96, 5)])
def test_pooled_attention_is_the_max_pool_of_the_softmax(shape, causal, block):
    q, k = tokens(*shape)
    exact = definition(q, k, causal)
    pooled = F.max_pool2d(exact, block, ceil_mode=True)
    torch.testing.assert_close(pooled_attention(q, k, block, causal=causal), pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(full_attention(q, k, causal=causal), exact, atol=1e-5, rtol=0)


def test_mass_is_what_a_query_gives_each_block():
    q, k = tokens(4, 2, 70, 70)
    exact, mass = definition(q, k, True), pooled_attention(q, k, 16, kind="mass")
    torch.testing.assert_close(mass[:, :, 1, 0], exact[:, :, 16:32, :16].sum(-1).mean(-1))
    torch.testing.assert_close(mass[:, :, 4, 4], exact[:, :, 64:, 64:].sum(-1).mean(-1))
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 4, 5))


def test_the_scale_and_the_dtype_are_heeded():
    q, k = tokens(2, 2, 40, 40)
    exact = F.max_pool2d(definition(q, k, True, 0.9), 8)
    torch.testing.assert_close(pooled_attention(q, k, 8, scale=0.9), exact, atol=1e-5, rtol=0)
    half = pooled_attention(q.bfloat16(), k.bfloat16(), 8, scale=0.9)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that one tensor had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.most = max(
                self.most, x.untyped_storage().nbytes() // 4 if isinstance(x, torch.Tensor) else 0
            )
        return out


def test_no_tensor_has_a_row_for_every_query_and_a_column_for_every_key():
    q, k = tokens(1, 1, 2048, 2048, width=8)
    with Largest() as memory:
        pooled_attention(q, k, 64, causal=False)
    assert 2 * 64 * 2048 <= memory.most < 2 * 2048 * 2048 / 16


REFUSED = {
    "block: expected at least one token, got 0": {"block": 0},
    "kind: expected max or mass, got 'mean'": {"kind": "mean"},
    "k: expected at least as many keys as the 9 queries of causal attention, got 5": {"shape": (2, 2, 9, 5)},
    "heads: expected a multiple of the 2 key-value heads, got 3 query heads": {"shape": (3, 2, 9, 9)},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_refused(sentence):
    options = dict(REFUSED[sentence])
    q, k = tokens(*options.pop("shape", (2, 2, 9, 9)))
    with pytest.raises(ValueError, match=sentence):
        pooled_attention(q, k, options.pop("block", 4), **options)


def test_other_widths_and_long_sequences_are_refused():
    q, k = tokens(2, 2, 9, 9)
    with pytest.raises(ValueError, match="q, k: expected .* of one B and D"):
        pooled_attention(q, k[..., :8])
    with pytest.raises(ValueError, match="tokens: expected at most 2048, got 2049; take pooled_attention"):
        full_attention(*tokens(1, 1, 1, 2049, width=2))


class Attention(nn.Module):
    def forward(self, q, k, v, scale=1.0):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


class Model(nn.Module):
    """Two layers, of which the second attends twice, and a module that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 8)
        self.first, self.second, self.idle = Attention(), Attention(), Attention()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.first(self.project(x), x, v=x, scale=0.5)
        return self.second(self.drop(self.second(x, x, x)), x, x)


def test_taps_give_every_call_by_argument_and_leave_nothing_behind():
    model, x = Model(), torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    with tap(model, ["first", "second"]) as calls:
        model(x)
    assert [set(call) for call in calls["first"]] == [{"q", "k", "v", "scale"}]
    assert calls["first"][0]["scale"] == 0.5
    torch.testing.assert_close(calls["first"][0]["q"], model.project(x))
    assert not calls["first"][0]["q"].requires_grad
    assert len(calls["second"]) == 2
    model(x)
    assert len(calls["first"]) == 1


def test_a_tap_names_the_closest_module_and_lets_go_of_the_others():
    model = Model()
    with (
        pytest.raises(ValueError, match="unknown module 'secnd': did you mean 'second'"),
        tap(model, ["first", "secnd"]),
    ):
        pass
    assert not model.first._forward_pre_hooks


def test_fitting_moves_only_what_it_is_given_and_warms_up():
    weight, other = nn.Parameter(torch.tensor([4.0])), nn.Parameter(torch.tensor([1.0]))
    seen = []

    def losses():
        while True:
            seen.append(weight.item())
            yield (weight * other - 1).square().sum()

    found = fit([weight], losses(), steps=60, lr=0.2, warm_up=10)
    assert len(found) == len(seen) == 60
    assert found[-1] < 0.02 * found[0]
    assert other.item() == 1.0
    assert other.grad is None
    moved = [abs(a - b) for a, b in pairwise(seen)]
    assert moved[0] == pytest.approx(0.02, rel=1e-3)  # a tenth of the rate, the first of ten steps up
    assert moved[-1] < moved[10]


def test_fitting_wants_enough_losses_and_something_to_train():
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="losses: expected 5, got 2; give more batches or take fewer steps"):
        fit([weight], (weight.square().sum() for _ in range(2)), steps=5)
    with pytest.raises(ValueError, match="parameters, steps: expected at least one each, got 0 and 3"):
        fit([], iter([]), steps=3)


class Student(nn.Module):
    """Guesses keys from queries."""

    def __init__(self, width=8):
        super().__init__()
        self.width = width
        self.guess = nn.Linear(width, width)
        nn.init.zeros_(self.guess.weight)

    def settings(self):
        return {"width": self.width}


def loss(student, call):
    return F.mse_loss(student.guess(call["q"]), call["k"])


def test_students_learn_and_the_model_stays_as_it_was():
    model, student = Model(), Student()
    model.first.eval()
    generator, before = torch.Generator().manual_seed(0), model_hash(model)
    batches = (torch.randn(2, 2, 6, 8, generator=generator) for _ in range(80))
    found = distill(model, {"first": student}, batches, loss, steps=80, lr=3e-2)
    assert found[-1] < 0.5 * found[0]
    assert model_hash(model) == before
    assert all(weight.grad is None for weight in model.parameters())
    assert model.training
    assert model.drop.training
    assert not model.first.training


def test_a_module_that_is_not_called_teaches_nothing():
    with pytest.raises(
        ValueError, match="students: expected modules that the model calls, got idle, which it does not"
    ):
        distill(Model(), {"idle": Student()}, [torch.zeros(1, 1, 2, 8)], loss, steps=1)


def test_learned_weights_come_back_with_their_settings(tmp_path):
    path = save_learned(
        tmp_path / "a.safetensors", {"x": BlockGate(2, 1, 8, seed=1), "y": BlockGate(2, 1, 8, seed=2)}
    )
    gates = {"y": BlockGate(2, 1, 8, seed=3), "x": BlockGate(2, 1, 8, seed=4)}
    load_learned(path, gates)
    for name, seed in (("x", 1), ("y", 2)):
        assert torch.equal(gates[name].w_q, BlockGate(2, 1, 8, seed=seed).w_q)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_learned(tmp_path / "a.safetensors", {"x": Student()})
    old = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="full"):
        save_learned(path, {"x": Student()})
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [old]


def test_weights_of_another_kind_are_refused_before_anything_changes(tmp_path):
    path = save_learned(tmp_path / "a.safetensors", {"x": Student(4), "y": Student(4)})
    good, wide = Student(4), Student(8)
    before = model_hash(good)
    with pytest.raises(ValueError, match="y: expected width 4, with which it was trained, got 8; make it so"):
        load_learned(path, {"x": good, "y": wide})
    with pytest.raises(ValueError, match="names: expected x, y, got x, z"):
        load_learned(path, {"x": good, "z": wide})
    wide.width = 4
    with pytest.raises(
        ValueError, match=r"y/guess.weight: expected \[8, 8\], got \[4, 4\]; save the weights again"
    ):
        load_learned(path, {"x": good, "y": wide})
    assert model_hash(good) == before
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(
        ValueError, match="torn.safetensors: expected learned weights, got .*; save them again"
    ):
        load_learned(tmp_path / "torn.safetensors", {"x": good})
