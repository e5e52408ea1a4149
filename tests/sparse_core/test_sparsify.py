"""Sparse attention put into models and taken out again."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from sparse_core import AttentionSlot, counters, share_masks, sparsify
from sparse_core.attention.layout import Layout3D
from sparse_core.methods.attention.hip import HiPAttention

EVERYTHING = {"budget": 4096, "block_q": 16, "block_k": 2, "window": 0, "sink": 0}


class Encoder(nn.Module):
    """Two self-attentions of torch and of diffusers, and a slot."""

    def __init__(self):
        super().__init__()
        self.first = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.second = Attention(32, heads=4, dim_head=8, residual_connection=True)
        self.slot = AttentionSlot(4, 8)

    def forward(self, x):
        x = self.second(self.first(x))
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return self.slot(heads, heads, heads).transpose(1, 2).flatten(2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture
def x():
    return torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grad", [True, False])
def test_a_method_that_keeps_everything_changes_nothing_but_the_path(model, x, grad):
    with torch.set_grad_enabled(grad):
        dense = model(x)
        handle = sparsify(model, "attention/hip", **EVERYTHING)
        torch.testing.assert_close(model(x), dense, atol=2e-5, rtol=1e-4)
    assert [(row["name"], row["calls"], row["tokens"], row["density"]) for row in handle.report()] == [
        ("first.self_attn", 1, 50, 1.0),
        ("second", 1, 50, 1.0),
        ("slot", 1, 50, 1.0),
    ]


def test_a_sparse_method_is_sparse_in_every_place(model, x):
    with torch.no_grad():
        dense = model(x)
        # torch does not count what the two foreign places multiply when dense, so a mask of everything stands for that.
        handle = sparsify(model, "attention/s2", block=16, local_blocks=100)
        with counters.count() as all_of_it:
            torch.testing.assert_close(model(x), dense, atol=2e-5, rtol=1e-4)
        handle.detach()
        handle = sparsify(model, "attention/s2", block=16, local_blocks=1, stride=4)
        with counters.count() as some:
            sparse = model(x)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert all_of_it.products == 3 * 2 * 4 * 50 * 50
    kept = [row["density"] for row in handle.report()]
    assert len(kept) == 3
    assert max(kept) < 0.6
    assert some.products == pytest.approx(sum(kept) / 3 * all_of_it.products)
    assert some.multiply_adds < 0.6 * all_of_it.multiply_adds
    assert some.kv_bytes < 0.6 * all_of_it.kv_bytes


@pytest.mark.parametrize("grad", [True, False])
def test_detaching_restores_every_bit(model, x, grad):
    untouched = copy.deepcopy(model)
    handle = sparsify(model, "attention/hip", **EVERYTHING)
    with torch.set_grad_enabled(grad):
        model(x)
        handle.detach()
        handle.detach()
        assert torch.equal(model(x), untouched(x))
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
    assert "forward" not in vars(model.first.self_attn)


def test_only_the_places_that_are_included(model):
    handle = sparsify(model, "attention/s2", include="^sec|slot$", block=16)
    assert list(handle.slots) == ["second", "slot"]
    assert handle.report()[0] == {
        "name": "second", "method": "attention/s2", "calls": 0, "tokens": 0, "density": None,
    }  # fmt: skip


def test_calls_with_a_mask_or_another_context_stay_dense(model, x):
    hidden = torch.zeros(2, 50, dtype=torch.bool)
    hidden[:, 40:] = True
    attention, other = model.first.self_attn, torch.randn(2, 7, 32)
    with torch.no_grad():
        calls = [
            lambda: attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0],
            lambda: attention(x, other, other, need_weights=False)[0],
            lambda: attention(x, x, x)[1],
            lambda: model.second(x, encoder_hidden_states=other),
        ]
        before = [call() for call in calls]
        handle = sparsify(model, "attention/hip", budget=4, block_q=2, window=0, sink=0)
        assert all(torch.equal(call(), was) for call, was in zip(calls, before, strict=True))
    assert all(row["calls"] == 0 for row in handle.report())


def test_training_reaches_the_weights_of_the_model(model, x):
    sparsify(model, "attention/hip", budget=8, block_q=4, window=4, sink=0)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


REFUSED = {
    "unknown method 'attention/hipp': did you mean 'attention/hip'": {"method": "attention/hipp"},
    "attention/hip: expected options among .*, got budge": {"method": "attention/hip", "budge": 3},
    "attention/tidal: expected a method for whole sequences": {"method": "attention/tidal"},
    "include: expected a pattern found in the name of an attention, got 'third' among first.self_attn, second, slot": {
        "method": "attention/hip", "include": "third",
    },
    "budget: expected a multiple of block_k 2, got 3": {"method": "attention/hip", "budget": 3},
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_left_behind(model, x, sentence):
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=sentence):
        sparsify(model, **REFUSED[sentence])
    assert [name for name, _ in model.named_modules()] == names


def test_a_place_is_filled_once(model):
    sparsify(model, "attention/hip", include="slot")
    with pytest.raises(ValueError, match="expected dense attention, got one that is sparse already"):
        sparsify(model, "attention/s2", include="slot")


class CountingHiP(HiPAttention):
    def __init__(self):
        super().__init__()
        self.made = 0

    def mask(self, q, k, v):
        self.made += 1
        return super().mask(q, k, v)


@pytest.mark.parametrize(("every", "dense", "made"), [(1, 0, 6), (2, 0, 3), (4, 1, 2), (10, 3, 1)])
def test_masks_are_shared_between_steps(every, dense, made):
    slot, layer = AttentionSlot(2, 8), CountingHiP()
    slot.fill(layer)
    q = torch.randn(1, 2, 40, 8)
    for _ in range(2):  # the second round begins anew
        layer.made = 0
        with share_masks(every, dense) as shared:
            for step in range(6):
                shared.step = step
                slot(q, q, q)
        assert layer.made == made


def test_slots_see_video_tokens_in_tiles_and_give_them_back_in_order():
    layout = Layout3D(views=2, height=4, width=4, sink=3)
    slot, q = AttentionSlot(2, 8), torch.randn(2, 2, 35, 8)
    dense = slot(q, q, q)
    sparsify(slot, "attention/hip", **EVERYTHING)
    torch.testing.assert_close(slot(q, q, q, layout), dense, atol=1e-5, rtol=1e-4)


def test_the_sink_is_kept_by_every_token():
    layout = Layout3D(frames=8, height=4, width=4, sink=2)
    slot = AttentionSlot(1, 8)
    sparsify(slot, "attention/s2", block=16, local_blocks=1, stride=100)
    q = torch.randn(1, 1, 130, 8)
    slot(q, q, q, layout)
    seen = slot.last[1].to_token_mask()[0, 0]
    assert seen[:, 128:].all()
    assert seen[128:].all()
    assert seen[:16, 16:112].sum() == 0


@pytest.mark.parametrize("method", ["attention/hip", "attention/combiner", "attention/moa"])
def test_mixed_precision_chooses_as_plain_half_precision_does(method):
    slot = AttentionSlot(2, 8)
    q, k, v = (
        torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3)
    )
    sparsify(slot, method)
    plain = slot(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(slot(q, k, v), plain)
