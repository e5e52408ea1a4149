"""SEA: what the mask keeps, attention under it, gates, losses, padding, causality, and what a step costs."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparse_core import AttentionSlot, counters, registry, sparsify
from sparse_core.distill import full_attention, load_learned, save_learned
from sparse_core.methods.attention.sea import Config, SEAAttention, SEALayer, distill, relative, stretch


def draw(length=37, heads=4, kv_heads=None, width=8, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, h, length, width, generator=generator)
        for h in (heads, kv_heads or heads, kv_heads or heads)
    )


def make(heads=4, width=8, pred_len=8, k=5, **options):
    torch.manual_seed(0)
    return SEAAttention(heads, width, pred_len, k, **options).eval()


def exact(q, k, v, mask):
    """Attention under a dense mask; rows without keys give 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "kv_heads", "width"), [(37, 4, 8), (64, 2, 7), (5, 1, 3), (1, 4, 1)])
def test_attention_is_exact_under_its_own_mask(length, kv_heads, width, causal):
    q, k, v = draw(length, kv_heads=kv_heads, width=width)
    model = make(width=width, causal=causal, scaler=False)
    out, aux = model(q, k, v)
    dense = aux["mask"].to_token_mask()
    assert model.sparse_mask() is aux["mask"]
    assert dense.any(-1).flatten(2).any(1).all()  # of every query some head keeps something
    assert not (causal and dense.triu(1).any())
    torch.testing.assert_close(out, exact(q, k, v, dense), atol=2e-5, rtol=1e-4)


def test_gates_weigh_the_sparse_output_and_mix_in_the_mean():
    for causal in (False, True):
        model, (q, k, v) = make(causal=causal), draw()
        torch.nn.init.normal_(model.gates.weight)
        x = model.encode(q, k, v, model.seen(q, k, v))
        scale, mix = (gate[..., None] for gate in model.gates(x).sigmoid().unbind(-1))
        mask = model.make_mask(q, k, v).to_token_mask()
        seen = torch.ones(37, 37).tril() if causal else torch.ones(37, 37)
        mean = (seen / seen.sum(-1, keepdim=True)) @ v
        expected = mix * scale * exact(q, k, v, mask) + (1 - mix) * mean
        torch.testing.assert_close(model(q, k, v)[0], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_more_keys_than_tokens_are_dense_attention(causal):
    q, k, v = draw(kv_heads=2)
    out, aux = make(k=100, causal=causal, scaler=False)(q, k, v)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=1e-4)
    assert aux["mask"].density(causal=causal) == 1.0


@pytest.mark.parametrize("causal", [False, True])
def test_fewer_tokens_than_columns_use_as_many_cells_as_there_are_keys(causal):
    model, (q, k, v) = make(pred_len=32, k=3, causal=causal), draw(length=9)
    seen = torch.arange(1, 10) if causal else torch.full((9,), 9)
    scores = model.estimate(model.encode(q, k, v, model.seen(q, k, v)), model.seen(q, k, v))
    assert torch.equal((scores > -torch.inf).sum(-1), seen.expand(2, 4, -1))
    kept = model(q, k, v)[1]["mask"].counts.sum(1)
    assert torch.equal(kept, (4 * seen.clamp_max(3)).expand(2, -1))


def test_heads_share_one_budget():
    """64 tokens in 16 columns, 8 keys per row: 4 heads keep 8 cells of 4 keys together, as they need them."""
    model, (q, k, v) = make(pred_len=16, k=8), draw(length=64)
    scores = torch.randn(2, 4, 64, 16, generator=torch.Generator().manual_seed(0))
    scores[:, 0, :, 3] += 50  # one column is all that this head wants
    counts = model.choose(scores, model.seen(q, k, v)).counts
    assert (counts.sum(1) == 4 * 8).all()
    assert (counts[:, 0] == 4).all()
    assert counts[:, 1:].float().std() > 0
    weights = scores.softmax(-1).transpose(1, 2).flatten(2)
    best = weights >= weights.sort(dim=-1, descending=True).values[..., 7:8]
    expected = best.unflatten(-1, (4, 16)).transpose(1, 2).repeat_interleave(4, -1)
    assert torch.equal(model.choose(scores, model.seen(q, k, v)).to_token_mask(), expected)


@pytest.mark.parametrize("token", [1, 17, 36])
def test_no_row_hears_of_later_tokens(token):
    model, first = make(causal=True), draw()
    torch.nn.init.normal_(model.gates.weight)
    second = tuple(x.clone() for x in first)
    for x in second:
        x[:, :, token] += 3.0
    out, other = model(*first)[0], model(*second)[0]
    assert torch.equal(out[:, :, :token], other[:, :, :token])
    assert not torch.allclose(out[:, :, token:], other[:, :, token:])


def test_a_causal_prefix_gives_what_the_whole_gives_where_positions_are_fixed():
    model, whole = make(causal=True, positions=64), draw()
    part = tuple(x[:, :, :20] for x in whole)
    torch.testing.assert_close(model(*part)[0], model(*whole)[0][:, :, :20], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing_and_gives_0(causal):
    model, (q, k, v) = make(causal=causal), draw(batch=1)
    teacher = full_attention(q, k, causal=causal)
    out, aux = model(q, k, v, teacher)
    generator = torch.Generator().manual_seed(5)
    q2, k2, v2 = (
        torch.cat([x, 9 * torch.randn(1, 4, 6, 8, generator=generator)], 2).repeat(2, 1, 1, 1)
        for x in (q, k, v)
    )
    lengths, wide = torch.tensor([37, 43]), F.pad(teacher, (0, 6, 0, 6)).repeat(2, 1, 1, 1)
    padded, _ = model(q2, k2, v2, lengths=lengths)
    torch.testing.assert_close(padded[:1, :, :37], out, atol=2e-5, rtol=1e-4)
    assert not padded[0, :, 37:].any()
    assert padded[1, :, 37:].all()
    mask = model.make_mask(q2, k2, v2, lengths).to_token_mask()[:1]
    assert torch.equal(mask[:, :, :37, :37], aux["mask"].to_token_mask())
    assert not mask[:, :, 37:].any()
    assert not mask[..., 37:].any()
    alone = model(q2[:1], k2[:1], v2[:1], wide[:1], lengths=lengths[:1])[1]
    for name in ("kl", "context"):
        torch.testing.assert_close(alone[name], aux[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("count", [4, 12, 40])
def test_stretched_scores_are_distributions_that_follow_the_cells(causal, count):
    scores = torch.randn(2, 3, 17, count, generator=torch.Generator().manual_seed(0))
    seen = torch.arange(1, 18)[None] if causal else torch.full((1, 17), 17)
    expected = torch.full((2, 3, 17, 17), -torch.inf)
    for i, length in enumerate(seen[0].tolist()):
        for c in range(count):
            start, end = c * length // count, (c + 1) * length // count
            expected[:, :, i, start:end] = scores[:, :, i, c : c + 1]
    torch.testing.assert_close(stretch(scores, seen), expected.log_softmax(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_losses_are_what_they_say_and_reach_the_estimator(causal):
    model, (q, k, v) = make(causal=causal).train(), draw(kv_heads=2)
    teacher = full_attention(q, k, causal=causal)
    out, aux = model(q, k, v, teacher)
    seen = model.seen(q, k, v)
    log = stretch(model.estimate(model.encode(q, k, v, seen), seen), seen)
    expected = F.kl_div(log.clamp_min(-1e9), teacher, reduction="sum") / (2 * 4 * 37)
    torch.testing.assert_close(aux["kl"], expected)
    torch.testing.assert_close(aux["mse"], (log.exp() - teacher).square().mean())
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(aux["context"], (out - dense).square().mean(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(model.loss(), 0.1 * aux["kl"] + aux["mse"] + aux["context"])
    model.loss().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(p.grad.abs().sum() > 0 for p in model.decoder.parameters())


def test_gradients_of_queries_keys_and_values_are_those_of_dense_masked_attention():
    model, inputs = make(scaler=False), [x.requires_grad_() for x in draw(kv_heads=2)]
    out, aux = model(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad((out * weights).sum(), inputs)
    theirs = torch.autograd.grad((exact(*inputs, aux["mask"].to_token_mask()) * weights).sum(), inputs)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


def test_a_mask_may_be_used_again_for_other_tokens():
    layer = SEALayer(Config(pred_len=8, k=5, scaler=False), 4, 8).eval()
    mask, (q, k, v) = layer.mask(*draw()), draw(seed=1)
    torch.testing.assert_close(
        layer.attend(q, k, v, mask), exact(q, k, v, mask.to_token_mask()), atol=2e-5, rtol=1e-4
    )


def test_half_precision_comes_back_as_it_came():
    q, k, v = draw()
    model = make()
    out = model(*(x.bfloat16() for x in (q, k, v)))[0]
    assert out.dtype == torch.bfloat16
    mask = model.sparse_mask()
    torch.testing.assert_close(out.float(), model.attend(q, k, v, mask), atol=5e-2, rtol=5e-2)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("causal", [False, True])
def test_cost_grows_with_tokens_and_not_with_their_square(causal):
    model, found = make(heads=1, pred_len=64, k=32, causal=causal), {}
    for length in (1024, 2048):
        q, k, v = draw(length, heads=1, batch=1)
        with torch.no_grad(), counters.count() as counter, Largest() as largest:
            mask = model(q, k, v)[1]["mask"]
        assert counter.products == len(mask.col)
        assert counter.kv_bytes == len(mask.col) * 2 * 8 * 4
        assert largest.numel < 300 * length
        found[length] = counter.multiply_adds
    assert found[2048] < 2.1 * found[1024]


@pytest.mark.parametrize("causal", [False, True])
def test_what_choosing_counts_is_what_it_multiplies(causal):
    q, k, v = draw(length=150)
    layer = make(causal=causal).eval()
    with counters.count() as counter, FlopCounterMode(display=False) as meter:
        layer.make_mask(q, k, v)
    assert meter.get_total_flops() == 2 * counter.multiply_adds > 0


def test_choosing_costs_no_products_of_queries_and_keys():
    model, (q, k, v) = make(), draw()
    with counters.count() as counter:
        model.make_mask(q, k, v)
    assert counter.products == 0
    assert counter.multiply_adds > 0


def test_features_are_drawn_anew_after_so_many_steps_of_training():
    model, (q, k, v) = make(redraw=2), draw(length=9)
    teacher, drawn = full_attention(q, k, causal=False), []
    assert len(model.projection) == round(8 * math.log(8))
    model(q, k, v)
    assert int(model.steps) == 0
    model.train()
    for _ in range(4):
        model(q, k, v, teacher)
        drawn.append(model.projection.clone())
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[1], drawn[2])


def test_distilling_lowers_the_loss_and_changes_the_layer_alone():
    torch.manual_seed(0)
    slot = AttentionSlot(4, 8)
    sparsify(slot, "attention/sea", pred_len=8, k=5)
    layer = slot.layer.eval()
    model = torch.nn.ModuleList([layer, torch.nn.Linear(2, 2)])

    def forward(q, k, v):
        assert (layer.training, model[1].training) == (True, False)
        return slot(q, k, v)

    model.eval().forward = forward
    before, other = layer.sea.decoder.row.weight.clone(), model[1].weight.clone()
    losses = distill(
        model,
        (draw() for _ in range(30)),
        steps=30,
        lr=1e-2,
        warm_up=2,
        objective=lambda out, _: 0 * out.sum(),
    )
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert not torch.equal(layer.sea.decoder.row.weight, before)
    assert torch.equal(model[1].weight, other)
    assert not layer.training


def test_a_single_layer_is_distilled_from_maps_given(tmp_path):
    batches = [(*x, full_attention(*x[:2], causal=False)) for x in (draw(seed=seed) for seed in range(3))]
    model, other = make(), make(seed=1)
    assert len(distill(model, batches)) == 3
    with pytest.raises(ValueError, match="steps: expected how many, or a loader with a length, got neither"):
        distill(model, iter(batches))
    path = save_learned(tmp_path / "sea.safetensors", {"sea": model})
    with pytest.raises(
        ValueError, match="sea: expected seed 0, with which it was trained, got 1; make it so"
    ):
        load_learned(path, {"sea": other})
    again = make()
    load_learned(path, {"sea": again})
    assert torch.equal(again(*draw())[0], model(*draw())[0])


def test_the_layer_gives_its_loss_in_training_alone():
    layer = SEALayer(Config(pred_len=8, k=5), 4, 8)
    q, k, v = draw(kv_heads=2)
    assert layer.loss() is None
    torch.testing.assert_close(layer(q, k, v), layer.sea(q, k, v, full_attention(q, k, causal=False))[0])
    torch.testing.assert_close(layer.loss(), layer.sea.loss())
    layer.eval()(q, k, v)
    assert layer.loss() is None
    assert layer.sea.eval()(q, k, v)[1].keys() == {"mask"}
    assert layer.sea.loss() is None


@pytest.mark.parametrize("length", [12, 130])
def test_a_registered_layer_works_at_once(length):
    method = registry.get_method("attention/sea")
    assert (method.kind, method.needs, method.paper) == ("train", ("training",), "2310.01777")
    torch.manual_seed(0)
    layer = method.layer(method.config(), 4, 2, 8).eval()
    q, k, v = draw(length, kv_heads=2)
    out = layer(q, k, v)
    assert out.shape == q.shape
    assert out.isfinite().all()
    assert torch.equal(out, layer(q, k, v))


REFUSED = {
    "pred_len: expected a multiple of 4, got 6": {"pred_len": 6},
    "k, redraw, positions: expected at least 1, got 0, 1000, None": {"k": 0},
    "k, redraw, positions: expected at least 1, got 64, 1000, 0": {"positions": 0},
    "nb_factor: expected more than 0, kl_weight 0 or more, got 0, 0.1": {"nb_factor": 0},
    "nb_factor: expected more than 0, kl_weight 0 or more, got 1.0, -1": {"kl_weight": -1},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_settings_that_make_no_sense_are_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**REFUSED[sentence])


def test_training_needs_a_teacher():
    with pytest.raises(
        ValueError,
        match=r"teacher_attn: expected the teacher's attention \[B, H, T, T\] in training, got None; pass it or call eval",
    ):
        make().train()(*draw())
    with pytest.raises(
        ValueError, match=r"teacher_attn: expected \[2, 4, 37, 37\], got \[2, 1, 37, 37\]; give one map per"
    ):
        make()(*draw(), torch.ones(2, 1, 37, 37))


def test_tokens_that_do_not_fit_are_refused():
    model, (q, k, v) = make(causal=True, positions=40), draw()
    with pytest.raises(
        ValueError,
        match=r"q, k, v: expected q \[B, 4, T, 8\] and k, v of as many tokens, got \[2, 3, 37, 8\]",
    ):
        model(q[:, :3], k, v)
    with pytest.raises(
        ValueError, match=r"k, v of as many tokens, got \[2, 4, 37, 8\], \[2, 4, 36, 8\], \[2, 4, 36, 8\]"
    ):
        model(q, k[:, :, 1:], v[:, :, 1:])
    with pytest.raises(
        ValueError, match=r"lengths: expected 2 from 1 to 37, got \[0, 37\]; count the tokens"
    ):
        model(q, k, v, lengths=torch.tensor([0, 37]))
    with pytest.raises(ValueError, match="positions: expected at least the 41 tokens, got 40; raise it"):
        model(*draw(41))
    with pytest.raises(
        ValueError, match="heads: expected a multiple of the 3 key-value heads, got 4 query heads"
    ):
        model(q, k[:, :3], v[:, :3])
    with pytest.raises(
        RuntimeError, match="sparse_mask: expected a forward pass before, got none; call the layer first"
    ):
        make().sparse_mask()
    with pytest.raises(
        ValueError, match="model: expected SEA layers, got none; put SEAAttention or SEALayer"
    ):
        distill(torch.nn.Linear(2, 2), [], steps=1)


@pytest.mark.parametrize("positions", [None, 700])
def test_causal_rows_read_places_along_the_keys_they_see(positions):
    """All weight on the last quarter of what a row sees lies at seven eighths of the channels, for short rows and long."""
    model, seen = make(1, 32, causal=True, positions=positions), torch.arange(1, 401)[None]
    key = torch.arange(400)
    weights = ((key < seen[0, :, None]) & (key >= 0.75 * seen[0, :, None])).float()
    absolute = weights / weights.sum(-1, keepdim=True) @ model._places(seen)[0]
    found = relative(absolute[None, None], seen, model._horizon(seen))[0, 0]
    centre = (found * (torch.arange(32) + 0.5)).sum(-1) / found.sum(-1) / 32
    assert ((centre[100:] - 7 / 8).abs() < 0.06).all()
    torch.testing.assert_close(found[100:].mean(-1), torch.ones(300), atol=0.25, rtol=0)
    whole = absolute[None, None, -1:]
    end = seen[:, -1:]
    torch.testing.assert_close(relative(whole, end, end), whole)


def test_a_causal_estimator_learns_places():
    """Every row attends to one place relative to its length."""
    torch.manual_seed(0)
    model, (q, k, v) = make(2, 16, 16, 8, causal=True), draw(64, heads=2, width=16)
    seen, key = torch.arange(1, 65)[:, None], torch.arange(64)
    teacher = ((key >= seen * 0.25) & (key < seen * 0.5)).float() + 1e-3
    teacher = (teacher.tril() / teacher.tril().sum(-1, keepdim=True)).expand(2, 2, -1, -1)
    history = distill(model, [(q, k, v, teacher)] * 40, steps=40, lr=1e-2, warm_up=0)
    with torch.no_grad():
        mask = model(q, k, v)[1]["mask"].to_token_mask()
    assert (teacher * mask)[:, :, 32:].sum(-1).mean() > 0.6
    assert history[-1] < history[0] / 2
