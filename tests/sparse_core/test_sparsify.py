"""Sparse attention put into models and taken out again."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F

from sparse_core import AttentionSlot, BlockMask, counters, get_method, list_methods, share_masks, sparsify
from sparse_core.attention.layout import Layout3D
from sparse_core.methods.attention.hip import HiPAttention
from sparse_core.methods.attention.minference import HeadPlan, Pattern
from sparse_core.methods.attention.moa import Plan, SpanRule
from sparse_core.methods.attention.routing import RoutingMask
from sparse_core.sparsify import make_layer

MASK = BlockMask.from_dense_blocks(torch.ones(2, 2, dtype=torch.bool), block_size=32, q_len=50, kv_len=50)
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


def test_first_layers_may_be_left_out(model, x):
    handle = sparsify(model, "hip", dense_layers=2, budget=4, block_q=2, window=0, sink=0)
    model(x)
    assert [row["density"] == 1 for row in handle.report()] == [True, True, False]
    handle.detach()
    handle = sparsify(model, "routing", num_clusters=5, skip_first=1)
    model.train()(x)
    routes = [isinstance(slot.last[1], RoutingMask) for slot in handle.slots.values()]
    assert routes == [False, True, True]


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
        "name": "second", "method": "attention/s2", "calls": 0, "tokens": 0, "density": None, "dense": "",
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
    assert [row["dense"] for row in handle.report()] == [
        "1 for padding; 1 for keys of other tokens; 1 for need_weights=True, which is torch's default",
        "1 for keys of other tokens",
        "",
    ]


def test_training_reaches_the_weights_of_the_model(model, x):
    sparsify(model, "attention/hip", budget=8, block_q=4, window=4, sink=0)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


REFUSED = {
    "unknown method 'attention/hipp': did you mean 'attention/hip'": {"method": "attention/hipp"},
    "attention/hip: expected options among .*, got budge": {"method": "attention/hip", "budge": 3},
    "attention/tidal: expected a method for whole sequences": {"method": "attention/tidal"},
    "attention/hip: expected no plan, got one; plans are for attention/minference and attention/moa": {
        "method": "hip", "plan": "plan.json",
    },
    "method: expected a name or a mask of sparse_core.attention.masks, got int": {"method": 3},
    "method: expected no options beside a mask, got budget": {"method": MASK, "budget": 3},
    r"include: expected a regular expression, got '\(' \(missing \)": {"method": "hip", "include": "("},
    "num_dense_heads: expected 0 to the 4 key-value heads, got 5": {"method": "s2", "num_dense_heads": 5},
    "condition: expected 0, as this attention is told none, got 8": {"method": "seer", "condition": 8},
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


@pytest.mark.parametrize("through_a_file", [False, True])
@pytest.mark.parametrize("method", [MASK, *(n for n in list_methods() if get_method(n).layer is not None)])
def test_copies_attend_with_their_own_weights(model, x, method, through_a_file):
    options = {"num_clusters": 5} if method == "attention/routing" else {}
    handle = sparsify(model, method, **options)
    model.train()
    model(x).sum().backward()
    assert [row["calls"] for row in handle.report()] == [1, 1, 1]
    if through_a_file:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model)
    expected = model.eval()(x)
    torch.testing.assert_close(other.eval()(x), expected)
    for part in (model.first, model.second):
        for weight in part.parameters():
            weight.data.zero_()
    torch.testing.assert_close(other(x), expected)
    other.zero_grad()
    other.train()(x).sum().backward()
    assert other.first.self_attn.in_proj_weight.grad.abs().sum() > 0
    assert other.second.to_q.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("method", ["sea", "seer", "routing"])
def test_evaluation_forgets_what_training_kept(model, x, method):
    handle = sparsify(model, method)
    model.train()(x)
    assert handle.loss().requires_grad
    model.eval()
    assert handle.loss() is None
    layers = [slot.layer for slot in handle.slots.values()]
    assert all(vars(layer).get(name) is None for layer in layers for name in ("_last", "_loss"))


def test_a_causal_call_goes_through_a_causal_method_and_no_other():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1))
    ahead = nn.Transformer.generate_square_subsequent_mask(50)
    with torch.no_grad():
        exact = layer(x, src_mask=ahead, is_causal=True)
        handle = sparsify(layer, "hip", causal=True, **EVERYTHING)
        torch.testing.assert_close(layer(x, src_mask=ahead, is_causal=True), exact, atol=2e-5, rtol=1e-4)
        assert handle.report()[0]["calls"] == 1
        handle.detach()
        handle = sparsify(layer, "hip", **EVERYTHING)
        torch.testing.assert_close(layer(x, src_mask=ahead, is_causal=True), exact)
        torch.testing.assert_close(layer(x, src_mask=ahead), exact)
    (row,) = handle.report()
    assert (row["calls"], row["dense"]) == (
        0, "1 for is_causal, which takes a method with causal=True; 1 for a mask of its own",
    )  # fmt: skip


def test_a_place_with_a_forward_of_its_own_is_refused(model):
    class Other(nn.MultiheadAttention):
        def forward(self, *args, **options):
            return super().forward(*args, **options)

    with pytest.raises(
        ValueError, match="module: expected torch's own MultiheadAttention, got Other with its own"
    ):
        sparsify(Other(32, 4), "hip")
    model.second.forward = model.second.forward
    with pytest.raises(
        ValueError, match="second: expected the forward of Attention, got one that a hook put there"
    ):
        sparsify(model, "hip")
    assert "forward" not in vars(model.first.self_attn)


def test_methods_go_by_their_short_names_too(model):
    assert sparsify(model, "s2", block=16).method == "attention/s2"


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


def test_steps_that_begin_again_make_masks_anew():
    slot, layer = AttentionSlot(2, 8), CountingHiP()
    slot.fill(layer)
    q = torch.randn(1, 2, 40, 8)
    with share_masks(every=4) as shared:
        for made, step in enumerate((0, 3, 4, 5, 0, 1), 1):  # the second video begins in the middle
            shared.step = step
            slot(q, q, q)
            assert layer.made == {1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3}[made]


def test_a_mask_of_ones_own_is_of_the_tokens_as_they_come():
    layout = Layout3D(height=4, width=4, sink=8)
    tokens = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    blocks = tokens | torch.eye(3, dtype=torch.bool)
    mask = BlockMask.from_dense_blocks(blocks, block_size=8, q_len=24, kv_len=24)
    slot = AttentionSlot(2, 8)
    sparsify(slot, mask)
    q, k, v = torch.randn(3, 1, 2, 24, 8, generator=torch.Generator().manual_seed(1))
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_token_mask())
    torch.testing.assert_close(slot(q, k, v, layout), exact, atol=1e-5, rtol=1e-4)
    assert not blocks.all()
    assert slot.last[1] is mask


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


HEADS = HeadPlan(patterns=(Pattern("block_sparse", (1,)), Pattern("a_shape", (4, 8))) * 2, scores=(0.0,) * 4)
OTHER = HeadPlan(patterns=(Pattern("a_shape", (50, 50)),) * 4, scores=(0.0,) * 4)
BLOCKS = {"block": 16, "slash_block": 16}
SPANS = Plan(
    rules=tuple((SpanRule(16 * n), SpanRule(64), SpanRule(64), SpanRule(64)) for n in (1, 2, 3)),
    block=16, sink=16, causal=False,
)  # fmt: skip


def test_a_plan_for_all_places_may_be_a_file(model, x, tmp_path):
    dense = model(x)
    for plan in (HEADS, str(HEADS.save(tmp_path / "plan.json"))):
        handle = sparsify(model, "minference", plan=plan, **BLOCKS)
        assert [slot.layer.plan for slot in handle.slots.values()] == [HEADS] * 3
        assert not torch.allclose(model(x), dense, atol=1e-3)
        assert all(0.2 < row["density"] < 0.8 for row in handle.report())
        handle.detach()


@pytest.mark.parametrize("kind", [dict, "function"])
def test_every_place_may_have_a_plan_of_its_own(model, x, tmp_path, kind):
    plans = {"first.self_attn": HEADS, "second": OTHER.save(tmp_path / "other.json"), "slot": OTHER}
    given = plans if kind is dict else plans.__getitem__
    handle = sparsify(model, "minference", plan=given, **BLOCKS)
    assert [slot.layer.plan for slot in handle.slots.values()] == [HEADS, OTHER, OTHER]
    model(x)
    assert [row["density"] == 1 for row in handle.report()] == [False, True, True]


def test_a_plan_of_spans_has_a_layer_for_every_place(model, x):
    handle = sparsify(model, "moa", plan=SPANS)
    model(x)
    for index, slot in enumerate(handle.slots.values()):
        expected = SPANS.at(index, 50).to_block_mask(50, 50, 16)
        assert torch.equal(slot.last[1].to_token_mask(), expected.to_token_mask())
    handle.detach()
    handle = sparsify(model, "moa", plan=replace(SPANS, rules=SPANS.rules[:1]))
    assert [slot.layer.layer for slot in handle.slots.values()] == [0, 0, 0]


def test_without_a_plan_later_layers_than_the_starting_one_are_sparse(model, x):
    handle = sparsify(model, "minference", starting_layer=2, pattern="block_sparse", block=16)
    model(x)
    assert [row["density"] == 1 for row in handle.report()] == [True, True, False]


FEW = replace(HEADS, patterns=HEADS.patterns[:2], scores=(0.0, 0.0))
MISFITS = {
    "plan: expected one pattern for each of the 4 heads, got 2; search again": ("minference", {"plan": FEW}),
    "plan: expected a HeadPlan of attention/minference, or the path of one, got Plan": ("minference", {"plan": SPANS}),
    "plan: expected one for each of first.self_attn, second, slot, got none for second": (
        "minference", {"plan": {"first.self_attn": HEADS}},
    ),
    "unknown place in plan 'third'": (
        "minference", {"plan": dict.fromkeys(("first.self_attn", "second", "slot", "third"), HEADS)},
    ),
    "plan: expected rules for one layer or for each of 3 attentions, got 2 layers": (
        "moa", {"plan": replace(SPANS, rules=SPANS.rules[:2])},
    ),
    "plan: expected rules for 4 heads, got 2": (
        "moa", {"plan": replace(SPANS, rules=tuple(layer[:2] for layer in SPANS.rules))},
    ),
    "causal: expected False, as the plan was made, got True": ("moa", {"plan": SPANS, "causal": True}),
    "plan: expected no density, block or sink beside it, got some": ("moa", {"plan": SPANS, "density": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("sentence", MISFITS)
def test_a_plan_that_does_not_fit_is_refused_and_nothing_is_left_behind(model, sentence):
    method, options = MISFITS[sentence]
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=sentence):
        sparsify(model, method, **options)
    assert [name for name, _ in model.named_modules()] == names
    assert not model.slot.filled


def test_a_plan_that_is_not_there_is_missed(model, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"plan: expected a file, found none at .*gone.json; save one there"
    ):
        sparsify(model, "moa", plan=tmp_path / "gone.json")


def test_a_layer_by_a_plan():
    layer = make_layer("minference", 4, 4, 8, plan=HEADS, **BLOCKS)
    assert layer.plan is HEADS
    with pytest.raises(ValueError, match="attention/hip: expected no plan, got one"):
        make_layer("hip", 4, 4, 8, plan=HEADS)
