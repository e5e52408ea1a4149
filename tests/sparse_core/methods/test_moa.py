"""Mixture of spans: influence against removal, plans against trying everything, attention and decoding within spans."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.slot import AttentionSlot
from sparse_core.methods.attention.moa import (
    Config,
    Plan,
    SpanAttention,
    SpanRule,
    UniformPlan,
    attention_influence,
    influence,
    optimise_plan,
    response_loss,
    rule_grid,
    select_plan,
)
from sparse_core.registry import get_method
from sparse_core.sparsify import sparsify

MIXED = Plan(rules=((SpanRule(16), SpanRule(0, 0.5)), (SpanRule(-8, 0.75), SpanRule(64))), block=16, sink=16)


def draw(*shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def weights_of(q, k, causal=True):
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf) if causal else scores).softmax(-1)


def sum_blocks(x, block):
    """[H, T, T] summed over blocks, one entry at a time."""
    blocks = -(-x.shape[-1] // block)
    out = x.new_zeros(x.shape[0], blocks, blocks)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i // block, j // block] += x[:, i, j]
    return out


class Dense(AttentionLayer):
    """Dense causal attention in double, without an entry where one is named."""

    def attend(self, q, k, v, mask):
        return weights_of(q, k) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)


class Small(nn.Module):
    """Two layers of attention over embedded tokens."""

    def __init__(self, heads=2, width=8, words=11):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.embed = heads, nn.Embedding(words, width)
        self.mix = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.attention = nn.ModuleList(Dense() for _ in range(2))
        self.out = nn.Linear(width, words)
        self.double()

    def forward(self, tokens):
        x = self.embed(tokens)
        for mix, attention in zip(self.mix, self.attention, strict=True):
            q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in mix(x).chunk(3, 2))
            x = x + attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x)


def texts(length=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(11, (2, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.ones(2, length, dtype=torch.bool)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("strips", [2**22, 1])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_influence_is_removal_where_the_loss_is_linear(causal, strips, kv_heads, monkeypatch):
    monkeypatch.setattr("sparse_core.methods.attention.moa.calibration.SCORES", strips)
    q, k, v, grad = draw((1, 4, 13, 6), (1, kv_heads, 13, 6), (1, kv_heads, 13, 6), (1, 4, 13, 6))
    a = weights_of(q, k, causal)
    g = grad @ v.repeat_interleave(4 // kv_heads, 1).mT
    removal = torch.zeros(4, 13, 13, dtype=torch.float64)
    for i, j in itertools.product(range(13), repeat=2):
        if (causal and j > i) or (causal and i == 0):
            continue
        row = a[0, :, i].clone()
        row[:, j] = 0
        removal[:, i, j] = ((row / row.sum(1, keepdim=True) - a[0, :, i]) * g[0, :, i]).sum(1)
    ours = influence(q, k, v, grad, 1, causal=causal)
    torch.testing.assert_close(ours, removal, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        influence(q, k, v, grad, 4, causal=causal), sum_blocks(removal, 4), atol=1e-10, rtol=0
    )


def test_a_rows_only_key_has_no_influence_and_no_nan():
    q, k, v, grad = draw((1, 1, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4), (1, 1, 3, 4))
    found = influence(q * 1e4, k, v, grad, 1)
    assert found.isfinite().all()
    assert found[0, 0].eq(0).all()


def test_influence_of_a_model_is_that_of_its_attention_weights():
    model, batch = Small(), texts()
    seen = []

    class Taped(Dense):
        def attend(self, q, k, v, mask):
            a = weights_of(q, k)
            a.retain_grad()
            seen.append(a)
            return a @ v

    found = attention_influence(model, [batch], 4)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.attention = nn.ModuleList(Taped() for _ in range(2))
    response_loss(model(batch[0]), *batch[1:]).backward()
    for layer, a in enumerate(seen):
        g = a.grad
        effect = a / (1 - a).clamp_min(1e-12) * ((a * g).sum(-1, keepdim=True) - g)
        torch.testing.assert_close(
            found[layer], sum_blocks(effect.detach().mean(0), 4), atol=1e-12, rtol=1e-9
        )


def test_frozen_models_and_several_batches_are_measured():
    model, batches = Small(), [texts(seed=1), texts(seed=2)]
    apart = [attention_influence(model, [batch], 4) for batch in batches]
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(attention_influence(model, batches, 4), (apart[0] + apart[1]) / 2)
    assert apart[0].shape == (2, 2, 5, 5)


class Late(nn.Module):
    """Slots that run in another order than the module has them, the second twice."""

    def __init__(self, heads=2):
        super().__init__()
        self.a, self.b = AttentionSlot(2, 4), AttentionSlot(heads, 8 // heads)

    def forward(self, x):
        for slot in (self.b, self.a, self.b):
            heads = x.unflatten(-1, (slot.heads, -1)).transpose(1, 2)
            x = x + slot(heads, heads.flip(-1), heads).transpose(1, 2).flatten(2)
        return x


def squares(model, x):
    return model(x).square().sum()


@pytest.mark.parametrize("causal", [False, True])
def test_slots_of_a_model_are_measured_in_the_order_that_plans_have(causal):
    model, (x,) = Late(), draw((2, 20, 8))
    options = {"block": 4, "sink": 4, "causal": causal}
    if causal:
        sparsify(model, "moa", density=1.0, **options)
    found = attention_influence(model, [x], 4, causal=causal, loss=squares)
    if not causal:  # an empty slot is as dense as one that keeps everything
        sparsify(model, "moa", density=1.0, **options)
        again = attention_influence(model, [x], 4, causal=False, loss=squares)
        torch.testing.assert_close(again, found, atol=1e-3, rtol=1e-3)
    seen = {"a": [], "b": []}

    def note(layer, args, out):
        out.retain_grad()
        seen["a" if layer is model.a.layer else "b"].append((*args, out))

    for slot in (model.a, model.b):
        slot.layer.register_forward_hook(note)
    squares(model, x.requires_grad_()).backward()
    assert [len(calls) for calls in seen.values()] == [1, 2]
    for row, calls in zip(found, seen.values(), strict=True):
        expected = sum(influence(q, k, v, out.grad, 4, causal=causal) for q, k, v, out in calls)
        torch.testing.assert_close(row, expected, atol=1e-3, rtol=1e-3)
        assert row.abs().max() > 1


def test_a_model_that_is_sparse_or_does_not_attend_has_no_influence():
    x, options = draw((2, 20, 8))[0], {"block": 4, "sink": 4}
    model = Late()
    handle = sparsify(model, "moa", density=0.5, **options)
    with pytest.raises(
        ValueError, match=r"expected dense attention, got b.layer with a mask of density 0\.36; detach"
    ):
        attention_influence(model, [x], 4, causal=False, loss=squares)
    handle.detach()
    with pytest.raises(ValueError, match="got one that does not call a.layer"):
        attention_influence(
            model,
            [x],
            4,
            causal=False,
            loss=lambda model, x: model.b(x[:, None], x[:, None], x[:, None]).sum(),
        )
    with pytest.raises(
        ValueError, match=r"layers: expected heads and blocks alike in all, got .*b.layer': \[\[4, 5, 5\]"
    ):
        attention_influence(Late(heads=4), [x], 4, causal=False, loss=squares)


def test_only_the_response_counts():
    tokens, targets, response = texts()
    response[:, 12:] = False
    found = attention_influence(Small(), [(tokens, targets, response)], 4)
    assert found[:, :, 3:].abs().max() == 0
    assert found[:, :, :3].abs().max() > 0
    again = attention_influence(Small(), [(tokens, targets.where(response, 0), response)], 4)
    assert torch.equal(found, again)


def test_another_loss_may_be_given():
    def loss(model, tokens):
        return model(tokens).square().mean()

    found = attention_influence(Small(), [texts()[0]], 4, loss=loss)
    assert found.shape == (2, 2, 5, 5)
    assert not torch.equal(found, attention_influence(Small(), [texts()], 4))


@pytest.mark.parametrize(
    ("rule", "length", "tokens"),
    [
        (SpanRule(130), 1000, 128),  # beta 0: the same at every length
        (SpanRule(130), 4000, 128),
        (SpanRule(0, 0.5), 1024, 512),  # alpha 0: a share of the length
        (SpanRule(0, 0.3), 640, 192),
        (SpanRule(0, 1), 100, 128),  # all of a ragged length
        (SpanRule(-512, 0.5), 2048, 512),
        (SpanRule(-512, 0.5), 1000, 64),  # none left: one block
        (SpanRule(5000), 640, 640),
    ],
)
def test_spans_are_whole_blocks(rule, length, tokens):
    assert rule.window(length, 64) == tokens


def test_the_grid_has_every_rule_that_is_a_span_at_every_length():
    grid = rule_grid([2048, 8192])
    everything = [(a, b / 8) for a in range(-2048, 8193, 1024) for b in range(9)]
    expected = [(a, b) for a, b in everything if 0 < a + b * 2048 <= 2048 and 0 < a + b * 8192 <= 8192]
    assert [(rule.alpha, rule.beta) for rule in grid] == expected
    assert SpanRule(0, 1) in grid
    assert SpanRule(1024, 0) in grid


RULES = [SpanRule(8), SpanRule(16), SpanRule(0, 0.5), SpanRule(8, 0.5), SpanRule(0, 1)]


def search(effects, bounds, most=None):
    """The least total cost of every choice for 2 x 3 heads within the bounds."""
    best = torch.inf
    kept = {
        n: torch.stack(
            [
                Plan(rules=((rule,),), block=8, sink=8).at(0, n).to_block_mask(n, n, 8).blocks[0, 0]
                for rule in RULES
            ]
        )
        for n in effects
    }
    costs = {n: (effects[n].flatten(0, 1)[:, None] * ~kept[n]).sum((2, 3)) for n in effects}
    dense = {
        n: torch.tensor([Plan(rules=((rule,),), block=8, sink=8).density(n) for rule in RULES])
        for n in bounds
    }
    choices = torch.tensor(list(itertools.product(range(5), repeat=6)))
    fits = torch.stack([dense[n][choices].mean(1) <= bounds[n] + 1e-9 for n in bounds]).all(0)
    if most is not None:
        different = [torch.tensor([len(set(part)) for part in half.tolist()]) for half in choices.split(3, 1)]
        fits &= (different[0] <= most) & (different[1] <= most)
    totals = {n: cost[torch.arange(6), choices].sum(1) for n, cost in costs.items()}
    best = {n: float(total[fits].min()) for n, total in totals.items()}
    return best, {n: total[fits] for n, total in totals.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [None, 1, 2])
def test_a_plan_is_the_best_of_all(seed, most):
    effects = {48: draw((2, 3, 6, 6), seed=seed)[0].exp()}
    bounds = {48: 0.6, 96: 0.55}
    plan = optimise_plan(effects, bounds, RULES, most, block=8, sink=8)[0]
    best, _ = search(effects, bounds, most)
    assert plan.losses[48] == pytest.approx(best[48], rel=1e-9)
    for length, bound in bounds.items():
        assert plan.density(length) <= bound + 1e-6
    if most is not None:
        assert all(len(set(layer)) <= most for layer in plan.rules)


def test_several_lengths_give_plans_that_do_not_beat_each_other():
    near, far = draw((2, 3, 4, 4), (2, 3, 8, 8), seed=4)
    effects = {32: near.exp(), 64: far.exp()}
    bounds = {32: 0.8, 64: 0.6, 128: 0.6}
    plans = optimise_plan(effects, bounds, RULES, block=8, sink=8)
    best, totals = search(effects, bounds)
    assert len(plans) > 2
    assert plans == sorted(plans, key=lambda plan: plan.losses[64])
    assert min(plan.losses[32] for plan in plans) == pytest.approx(best[32], rel=1e-9)
    assert plans[0].losses[64] == pytest.approx(best[64], rel=1e-9)
    for plan in plans:
        # No choice whatever is better at both lengths.
        better = (totals[32] < plan.losses[32] - 1e-6) & (totals[64] < plan.losses[64] - 1e-6)
        assert not better.any()
        assert all(plan.density(n) <= bound + 1e-6 for n, bound in bounds.items())


def test_the_length_whose_bound_no_plan_meets_is_named():
    effects = {48: draw((1, 2, 6, 6))[0]}
    with pytest.raises(ValueError, match=r"density at length 48: expected at most 0.01, got 0.\d+ at the"):
        optimise_plan(effects, {96: 0.9, 48: 0.01}, RULES, block=8, sink=8)


def test_density_may_mean_keys_that_are_held():
    effects = {48: draw((2, 3, 6, 6))[0].exp()}
    plan = optimise_plan(effects, 0.5, RULES, block=8, sink=8, measure="keys")[0]
    assert plan.density(48, "keys") <= 0.5 + 1e-6 < plan.density(48)


def test_without_causality_blocks_above_the_diagonal_count():
    effects = {32: torch.ones(1, 1, 4, 4, dtype=torch.float64)}
    for causal, left_out in ((False, 16 - 12), (True, 16 - 9)):
        plan = optimise_plan(effects, {32: 1.0}, [SpanRule(16)], block=8, sink=8, causal=causal)[0]
        assert plan.losses[32] == left_out


PLANS = [Plan(rules=((SpanRule(8 * n),),), losses={64: float(n)}) for n in (1, 2, 3)]


def test_the_plan_with_the_least_loss_at_an_unseen_length_is_taken():
    assert select_plan(PLANS, lambda plan: abs(plan.rules[0][0].alpha - 16), 96) is PLANS[1]
    assert select_plan(PLANS, lambda plan: 0.0) is PLANS[0]


@pytest.mark.parametrize("length", [50, 96, 130])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_that_of_the_dense_mask(length, heads, kv_heads, causal):
    plan = Plan(rules=MIXED.rules, block=16, sink=16, causal=causal)
    q, k, v = draw(
        (2, heads, length, 8), (2, kv_heads, length, 8), (2, kv_heads, length, 8), dtype=torch.float32
    )
    q.requires_grad_()
    for layer in (0, 1):
        attention = SpanAttention(plan, layer)
        mask = attention.mask(q, k, v)
        dense = plan.at(layer, length).to_token_mask(length, length).repeat_interleave(heads // 2, 1)
        assert torch.equal(mask.to_token_mask(), dense)
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
        ours = attention(q, k, v)
        torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-4)
        grads = [torch.autograd.grad(out.square().sum(), q)[0] for out in (ours, exact)]
        torch.testing.assert_close(*grads, atol=5e-5, rtol=1e-3)
        assert torch.equal(attention.attend(q, k, v, mask), ours)


@pytest.mark.parametrize("length", [1, 40, 127])
def test_a_sequence_shorter_than_sink_and_one_block_is_dense(length):
    q, k, v = draw(*[(1, 2, length, 8)] * 3, dtype=torch.float32)
    plan = Plan(rules=((SpanRule(64), SpanRule(-512, 0.5)),))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(SpanAttention(plan)(q, k, v), exact, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("block", "sink"), [(4, 4), (4, 0), (64, 64)])
@pytest.mark.parametrize("length", [12, 77, 2000])
def test_without_a_plan_spans_are_the_widest_within_the_density(causal, block, sink, length):
    config = Config(density=0.3, block=block, sink=sink, causal=causal)
    spans = UniformPlan(config, 2).at(0, length)
    wider = type(spans).uniform(2, sink=sink, window=spans.window[0] + block, unit=block, causal=causal)
    assert spans.density(length) <= 0.3 or spans.window == (block, block)
    assert wider.density(length) > 0.3 or spans.density(length) == 1
    layer = get_method("attention/moa").layer(config, 2, 1, 8)
    q, k, v = draw((1, 2, length, 8), (1, 1, length, 8), (1, 1, length, 8), dtype=torch.float32)
    with counters.count() as counter:
        out = layer(q, k, v)
    assert counter.products == spans.pairs(length).sum()
    assert out.isfinite().all()


@pytest.mark.parametrize("prefill", [1, 30, 100])
def test_decoding_from_rings_continues_the_prefill(prefill):
    attention, length = SpanAttention(MIXED, 1), 150
    q, k, v = draw((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8), dtype=torch.float32)
    exact = attention(q, k, v)
    cache = attention.cache(k, length)
    cache.append(k[:, :, :prefill], v[:, :, :prefill])
    for t in range(prefill, length):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        torch.testing.assert_close(
            attention.decode(q[:, :, t : t + 1], cache), exact[:, :, t : t + 1], atol=2e-5, rtol=1e-4
        )


def test_rings_take_the_share_of_memory_that_the_spans_have():
    rules = ((SpanRule(32), SpanRule(32), SpanRule(0, 0.125), SpanRule(32)),)
    attention = SpanAttention(Plan(rules=rules, block=16, sink=16))
    k = torch.zeros(1, 4, 1, 8)
    cache, full = attention.cache(k, 1024), 2 * 4 * 1024 * 8 * 4
    for _ in range(3):
        cache.append(*torch.ones(2, 1, 4, 700, 8))
        assert cache.bytes / full == pytest.approx(attention.plan.density(1024, "keys"))
    assert cache.bytes < 0.1 * full


def test_plans_are_kept_on_disk_and_know_their_model(tmp_path):
    model, other = Small(), Small(words=12)
    effects = {48: attention_influence(model, [texts(48)], 8)}
    plan = optimise_plan(effects, 0.7, RULES, block=8, sink=8, model=model)[0]
    path = plan.save(tmp_path / "plan.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    again = Plan.load(path)
    assert again == plan
    again.validate(model)
    with pytest.raises(ValueError, match="plan: expected one for the model .*, got one for .*; calibrate"):
        again.validate(other)
    with pytest.raises(ValueError, match="got one for none; calibrate again"):
        MIXED.validate(model)
    path.write_text('{"rules": [[{"alpha": 0, "beta": 0}]]}')
    with pytest.raises(ValueError, match=r"plan.json: expected a plan of spans, got rule: expected beta"):
        Plan.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"plan.json: expected a plan of spans, got .*; calibrate again"):
        Plan.load(path)


EFFECT = {64: torch.zeros(1, 2, 8, 8)}
REFUSED = {
    "density: expected a share above 0 and at most 1, got 1.5": lambda: Config(density=1.5),
    "density: expected a share above 0 and at most 1, got 1.2": lambda: optimise_plan(
        EFFECT, {64: 0.5, 128: 1.2}, RULES, block=8, sink=8
    ),
    "block: expected a power of two of at least 4, got 2": lambda: Config(block=2),
    "sink: expected whole blocks of 64 tokens, got 4": lambda: Config(sink=4),
    "rule: expected beta of 0 to 1, and alpha above 0 where beta is 0, got 0 and 0": lambda: SpanRule(0, 0),
    "rule: expected beta of 0 to 1, .* got 5 and 1.5": lambda: SpanRule(5, 1.5),
    r"rules: expected one per layer and head, got \[1, 2\] heads": lambda: Plan(
        rules=((SpanRule(1),), (SpanRule(1),) * 2)
    ),
    r"rules: expected one whose span is within each length of \[64, 128\], got none of 1": lambda: (
        optimise_plan(EFFECT, 0.5, [SpanRule(100)], block=8, sink=8)
    ),
    r"influence at length 64: expected \[1, 2, 4, 4\] for blocks of 16, got \[1, 2, 8, 8\]": lambda: (
        optimise_plan(EFFECT, 0.9, RULES, block=16, sink=16)
    ),
    "influence_by_len: expected at least one length, got none": lambda: optimise_plan({}, 0.5, RULES),
    "layer: expected 0 to 1, got 2; plan for this model": lambda: MIXED.at(2, 64),
    "heads: expected a multiple of the 2 heads of the plan, got 3": lambda: SpanAttention(MIXED)(
        *[torch.zeros(1, 3, 20, 8)] * 3
    ),
    "plans: expected at least one, got none": lambda: select_plan([], lambda plan: 0.0),
    "length: expected one that no plan was made at, got 64": lambda: select_plan(PLANS, lambda plan: 0.0, 64),
    "model: expected at least one AttentionLayer, got none": lambda: attention_influence(
        nn.Embedding(11, 11), [texts()]
    ),
    "batches: expected at least one, got none": lambda: attention_influence(Small(), []),
    "batches: expected all of one length, got": lambda: attention_influence(Small(), [texts(), texts(30)], 4),
    "response: expected at least one token that counts, got none": lambda: attention_influence(
        Small(), [(*texts()[:2], torch.zeros(2, 20, dtype=torch.bool))]
    ),
    "spans: expected causal ones, got a plan that looks ahead": lambda: SpanAttention(
        UniformPlan(Config(causal=False), 2)
    ).cache(torch.zeros(1, 2, 1, 8), 100),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()


def test_a_run_that_fails_leaves_no_hooks_behind():
    model = Small()
    with pytest.raises(ValueError):
        attention_influence(model, [(*texts()[:2], torch.zeros(2, 20, dtype=torch.bool))])
    assert not any(layer._forward_hooks for layer in model.attention)
