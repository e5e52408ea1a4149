"""MInference: patterns against plain loops, the index, the search, plans on disk, what it costs, bad input."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.estimators import vertical_slash_scores
from sparse_core.methods.attention.minference import (
    CANDIDATES,
    METHOD,
    Config,
    HeadPlan,
    MInferencePrefill,
    Pattern,
    fit_pattern,
    pattern_mask,
    prefill_flops,
    search_patterns,
    usual_pattern,
    vertical_slash_index,
)
from sparse_core.registry import Place

SMALL = {"block": 16, "slash_block": 8, "last_q": 20, "sink": 4, "local": 6}


def draw(length, heads=4, kv_heads=2, batch=2, width=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(batch, h, length, width, generator=generator)).to(dtype)
        for h in (heads, kv_heads, kv_heads)
    ]


def make_plan(*patterns):
    return HeadPlan(patterns=patterns, scores=(0.0,) * len(patterns))


def mixed(length):
    return (
        Pattern("a_shape", (5, length // 8)),
        Pattern("vertical_slash", (length // 10, length // 12)),
        Pattern("block_sparse", (2,)),
        Pattern("vertical_slash", (length // 4, 3)),
    )


def touched(tokens, bq, bk):
    """Whole blocks in which a token is kept."""
    whole = torch.zeros_like(tokens)
    for row, column in itertools.product(range(0, len(tokens), bq), range(0, len(tokens), bk)):
        here = (slice(row, row + bq), slice(column, column + bk))
        whole[here] = tokens[here].any()
    return whole


def plain_head(q, k, pattern, config):
    """bool [T, T] of one head q, k [T, D]."""
    length, bq, bk = len(q), config.block, min(config.block, config.slash_block)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    if pattern.kind == "a_shape":
        kept = touched((j < pattern.sizes[0]) | ((i - j).abs() < pattern.sizes[1]), bq, bk)
    elif pattern.kind == "vertical_slash":
        columns, diagonals = vertical_slash_index(
            q[None, None], k[None, None], *pattern.sizes, config.last_q, sink=config.sink, local=config.local,
            causal=config.causal,
        )  # fmt: skip
        kept = touched(torch.isin(i - j, diagonals), bq, bk)
        kept[:, columns.flatten()] = True
    else:
        kept, mean = (
            torch.zeros(length, length, dtype=torch.bool),
            [[x[r : r + bq].mean(0) for r in range(0, length, bq)] for x in (q, k)],
        )
        for row, query in enumerate(mean[0]):
            end = row + 1 if config.causal else len(mean[1])
            best = torch.stack([query @ key for key in mean[1][:end]]).argsort(descending=True)
            for column in best[: pattern.sizes[0]].tolist():
                kept[row * bq : row * bq + bq, column * bq : column * bq + bq] = True
    return kept & (i >= j) if config.causal else kept


def plain_tokens(q, k, patterns, config):
    group = q.shape[1] // k.shape[1]
    return torch.stack(
        [
            torch.stack(
                [plain_head(q[b, h], k[b, h // group], pattern, config) for h, pattern in enumerate(patterns)]
            )
            for b in range(len(q))
        ]
    )


def dense(q, k, v, tokens):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores, some = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~tokens, -torch.inf), tokens.any(-1)
    return scores.masked_fill(~some[..., None], 0).softmax(-1).masked_fill(~some[..., None], 0) @ v


CASES = [(200, True, {}), (200, False, {}), (77, True, {"block": 8}), (90, True, {"block": 64}),
         (12, False, {"block": 4}), (1, True, {})]  # fmt: skip


@pytest.mark.parametrize(("length", "causal", "changes"), CASES)
def test_every_pattern_is_its_definition_and_the_output_that_of_the_dense_mask(length, causal, changes):
    config = Config(**{**SMALL, **changes, "causal": causal})
    patterns = mixed(length) if length > 20 else (*mixed(40)[:3], Pattern("vertical_slash", (2, 2)))
    q, k, v = draw(length)
    layer = MInferencePrefill(make_plan(*patterns), config)
    mask, tokens = layer.mask(q, k, v), plain_tokens(q, k, patterns, config)
    assert torch.equal(mask.to_token_mask(), tokens)
    torch.testing.assert_close(layer(q, k, v), dense(q, k, v, tokens), atol=2e-5, rtol=1e-4)


def test_scores_of_columns_and_diagonals_are_sums_of_attention():
    q, k, _ = draw(50)
    rows = torch.tensor([10, 30, 49])
    weights = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(
        torch.ones(50, 50, dtype=torch.bool).triu(1), -torch.inf
    )
    weights = weights.softmax(-1)[:, :, rows]
    columns, diagonals = vertical_slash_scores(q, k, rows)
    torch.testing.assert_close(columns, weights.sum(2))
    for offset in (0, 7, 30, 49):
        exact = sum(weights[:, :, n, i - offset] for n, i in enumerate(rows.tolist()) if i >= offset)
        torch.testing.assert_close(diagonals[..., offset], exact)
    _, both_ways = vertical_slash_scores(q, k, rows, causal=False)
    exact = (q @ k.repeat_interleave(2, 1).mT * 0.25).softmax(-1)[:, :, rows]
    torch.testing.assert_close(both_ways[..., 49 - 12], exact[:, :, 0, 22] + exact[:, :, 1, 42])


@pytest.mark.parametrize("causal", [True, False])
def test_first_columns_and_nearest_diagonals_come_first(causal):
    q, k, _ = draw(400)
    columns, diagonals = vertical_slash_index(q, k, 50, 120, causal=causal)
    assert columns.shape == (2, 4, 50)
    assert diagonals.shape == (2, 4, 120)
    assert (columns[..., :30] == torch.arange(30)).all()
    near = torch.arange(100) if causal else torch.arange(-49, 50)
    assert (diagonals[..., : len(near)].sort(-1).values == near).all()
    columns, diagonals = vertical_slash_index(q, k, 1, 1, causal=causal)
    assert (columns.shape[-1], diagonals.shape[-1]) == (30, 50)


def test_planted_columns_and_diagonals_are_in_the_index():
    generator = torch.Generator().manual_seed(0)
    noise = torch.nn.functional.normalize(torch.randn(600, 64, generator=generator), dim=-1)
    wanted = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    planted = torch.tensor([150, 222, 301, 420])
    k = 8 * noise
    q = 8 * noise.roll(210, 0) + 6 * wanted  # token i looks at i - 210
    k[planted] += 9 * wanted
    columns, diagonals = vertical_slash_index(q[None, None], k[None, None], 36, 104)
    assert torch.isin(planted, columns).all()
    assert 210 in diagonals[0, 0, 100:102]


def test_a_batch_gets_an_index_per_sample():
    q, k, v = draw(150)
    layer = MInferencePrefill(make_plan(*mixed(150)), Config(**SMALL))
    alone = torch.cat([layer(q[b : b + 1], k[b : b + 1], v[b : b + 1]) for b in range(2)])
    torch.testing.assert_close(layer(q, k, v), alone, atol=2e-6, rtol=1e-5)
    columns, _ = vertical_slash_index(q, k, 40, 10, sink=4, local=6)
    assert not torch.equal(columns[0], columns[1])


def test_fewer_tokens_than_voting_queries_are_all_asked():
    q, k, v = draw(40)
    few = vertical_slash_index(q, k, 8, 9, 64, sink=2, local=4)
    all_of_them = vertical_slash_index(q, k, 8, 9, 40, sink=2, local=4)
    assert all(torch.equal(a, b) for a, b in zip(few, all_of_them, strict=True))
    assert MInferencePrefill(make_plan(*mixed(40)))(q, k, v).isfinite().all()


DENSE = (("vertical_slash", (60, 45)), ("a_shape", (60, 45)), ("block_sparse", (7,)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kind", "sizes"), DENSE)
def test_sizes_that_reach_the_length_are_dense_attention(kind, sizes, causal):
    q, k, v = draw(100)
    if kind == "a_shape" and not causal:
        sizes = (0, 100)  # its window reaches as far both ways
    plan = make_plan(*[Pattern(kind, sizes)] * 4)
    out = MInferencePrefill(plan, Config(**SMALL, causal=causal))(q, k, v)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-4)


def test_the_index_is_found_anew_and_a_mask_may_be_kept():
    layer = MInferencePrefill(make_plan(*mixed(120)), Config(**SMALL))
    first, second = draw(120), draw(120, seed=1)
    mask = layer.mask(*first)
    kept = layer.attend(*second, mask)
    torch.testing.assert_close(kept, dense(*second, mask.to_token_mask()), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(kept, layer(*second), atol=1e-2)


def test_early_layers_are_dense():
    q, k, v = draw(120)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    config = Config(**SMALL, starting_layer=2)
    plan = make_plan(*mixed(120))
    torch.testing.assert_close(MInferencePrefill(plan, config, layer=1)(q, k, v), exact, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(MInferencePrefill(plan, config, layer=2)(q, k, v), exact, atol=1e-2)
    assert not torch.allclose(MInferencePrefill(plan, config)(q, k, v), exact, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "causal", "block"), [(12, False, 4), (50, False, 16), (300, True, 64), (300, False, 64)]
)
def test_the_layer_of_the_registry_works_at_once(length, causal, block, dtype):
    layer = METHOD.layer(METHOD.config(causal=causal, block=block, pattern="block_sparse"), 4, 2, 64)
    q, k, v = draw(length, dtype=dtype)
    mask = layer.mask(q, k, v)
    out = layer.attend(q, k, v, mask)
    exact = dense(*(x.float() for x in (q, k, v)), mask.to_token_mask())
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, atol=6e-2 if dtype == torch.bfloat16 else 2e-5, rtol=2e-2)
    assert mask.density() < 0.55
    assert layer.loss() is None


def test_gradients_are_those_of_the_dense_mask():
    inputs = [x.requires_grad_() for x in draw(90)]
    layer = MInferencePrefill(make_plan(*mixed(90)), Config(**SMALL))
    mask = layer.mask(*inputs)
    weight = torch.randn(2, 4, 90, 16, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((layer.attend(*inputs, mask) * weight).sum(), inputs)
    exact = torch.autograd.grad((dense(*inputs, mask.to_token_mask()) * weight).sum(), inputs)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_selection_and_the_attention_are_counted():
    q, k, v = draw(300, heads=1, kv_heads=1, batch=1)
    layer = MInferencePrefill(make_plan(Pattern("vertical_slash", (20, 10))), Config(**SMALL))
    with counters.count() as index:
        mask = layer.mask(q, k, v)
    with counters.count() as whole:
        layer.attend(q, k, v, mask)
    assert index.products == 20 * 300
    assert whole.products == int(mask.pairs().sum()) < 0.5 * 300 * 301 / 2
    flops = prefill_flops(mask, layer.plan.patterns, 16, layer.config)
    assert float(flops) == 4 * 16 * int(mask.work()) + 2 * 16 * 20 * 300
    assert float(flops) >= 2 * (index.multiply_adds + whole.multiply_adds)


def test_a_long_text_needs_no_square():
    """At 16,384 tokens one float per pair would be 1 GiB; nothing that the mask holds is a hundredth of that."""
    q, k, v = draw(16384, heads=1, kv_heads=1, batch=1)
    layer = MInferencePrefill(make_plan(Pattern("vertical_slash", (100, 150))))
    mask = layer.mask(q, k, v)
    held = (mask.columns, mask.listed, mask.full, mask.blocks.blocks, mask.loose().blocks)
    assert max(x.numel() * x.element_size() for x in held) < 2**30 / 100
    assert layer.attend(q, k, v, mask).isfinite().all()


@pytest.mark.parametrize("pattern", [CANDIDATES[0], CANDIDATES[2], CANDIDATES[-1]])
def test_candidates_are_scaled_to_the_budget(pattern):
    q, k, _ = draw(1024, heads=1, kv_heads=1, batch=1)
    config, budget = Config(slash_block=8, block=16, sink=4, local=8), 0.3 * 4 * 16 * 1024 * 1025 / 2
    fitted = fit_pattern(q, k, pattern, budget, config)
    cost = [
        float(prefill_flops(pattern_mask(q, k, [one], config), [one], 16, config))
        for one in (fitted, fitted.scaled(max(fitted.sizes) + 1))
    ]
    assert 0.9 * budget < cost[0] <= budget < cost[1]


@pytest.mark.parametrize("objective", ["output", "mass"])
def test_the_search_finds_what_was_planted(objective):
    generator = torch.Generator().manual_seed(0)
    topics = 3 * torch.randn(8, 16, generator=generator)
    own = topics[torch.randint(8, (32,), generator=generator)].repeat_interleave(16, 0)
    columns = torch.zeros(512, 16)
    columns[torch.arange(5, 512, 37), 0] = 16
    asks = torch.cat([torch.full((512, 1), 3.0), torch.zeros(512, 15)], -1)
    q, k = torch.stack([own, asks])[None], torch.stack([own, columns])[None]
    q, k = (x + 0.1 * torch.randn(x.shape, generator=generator) for x in (q, k))
    v = torch.randn(1, 2, 512, 16, generator=generator)
    config = Config(block=16, slash_block=8, sink=4, local=8, objective=objective)
    plan = search_patterns(q, k, v, CANDIDATES, 0.3 * 4 * 16 * 512 * 513 / 2, config=config)
    assert [pattern.kind for pattern in plan.patterns] == ["block_sparse", "vertical_slash"]
    assert 0 <= min(plan.scores) <= max(plan.scores) < 0.9
    assert plan.model == ""


def test_plans_are_kept_on_disk_and_know_their_model(tmp_path):
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    q, k, v = draw(128, heads=2, kv_heads=1, batch=1)
    plan = search_patterns(q, k, v, CANDIDATES, 0.5 * 4 * 16 * 128 * 129, config=Config(**SMALL), model=model)
    path = plan.save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    row = json.loads(path.read_text())["heads"]["0"]
    assert len(row) == 4
    assert row[0] == plan.patterns[0].kind
    again = HeadPlan.load(path)
    assert again == plan
    again.validate(model)
    with pytest.raises(
        ValueError, match="plan: expected one for the model .*, got one for .*; calibrate again"
    ):
        again.validate(other)
    path.write_text("[]")
    with pytest.raises(ValueError, match="plan.json: expected a head plan, got .*; calibrate again"):
        HeadPlan.load(path)


def test_an_unknown_pattern_names_those_there_are(tmp_path):
    sentence = "pattern: expected one of a_shape, vertical_slash, block_sparse, got 'spiral'"
    with pytest.raises(KeyError, match=sentence):
        Pattern("spiral", (1, 2))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"model": "", "heads": {"0": ["spiral", 1, 2, 0.0]}}))
    with pytest.raises(KeyError, match=sentence):
        HeadPlan.load(path)


def test_without_a_plan_every_head_finds_columns_and_slashes_of_its_prompt():
    config, (q, k, v) = Config(**SMALL, share=0.25), draw(400)
    q = q + 2  # so that a key of twos stands out
    k[:, :, 123] = 2
    usual = Pattern("vertical_slash", (14, 86))  # a quarter of 400, as 1000 to 6096
    layer = METHOD.planned(config, None, Place(heads=4, kv_heads=2, width=16))
    assert torch.equal(layer(q, k, v), MInferencePrefill(make_plan(*[usual] * 4), config)(q, k, v))
    assert layer.mask(q, k, v).to_token_mask()[..., 123:, 123].all()


@pytest.mark.parametrize(("kind", "sizes"), [("a_shape", (20, 80)), ("block_sparse", (7,))])
def test_the_pattern_of_heads_without_a_plan_may_be_another(kind, sizes):
    assert usual_pattern(Config(pattern=kind, block=16), 400) == Pattern(kind, sizes)


def test_layers_before_the_starting_one_are_dense_in_a_model_too():
    q, k, v = draw(120)
    plan = make_plan(*mixed(120))
    config = Config(**SMALL, starting_layer=1)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    first, second = (
        METHOD.planned(config, plan, Place(heads=4, kv_heads=2, width=16, index=index, count=2))
        for index in (0, 1)
    )
    torch.testing.assert_close(first(q, k, v), exact, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(second(q, k, v), exact, atol=1e-2)


def test_a_plan_of_other_heads_is_refused():
    with pytest.raises(
        ValueError, match="plan: expected one pattern for each of the 4 heads, got 2; search again"
    ):
        MInferencePrefill(make_plan(*mixed(50)[:2]))(*draw(50))


REFUSED = {
    "block: expected a power of two, got 12": lambda: Config(block=12),
    "last_q: expected at least 1": lambda: Config(last_q=0),
    r"share, tolerance: expected within \(0, 1\] and above 0, got 0": lambda: Config(share=0),
    "pattern: expected one of a_shape, .*, got 'slash'": lambda: Config(pattern="slash"),
    "objective: expected 'output' or 'mass', got 'speed'": lambda: Config(objective="speed"),
    r"block_sparse: expected top, got \(1, 2\)": lambda: Pattern("block_sparse", (1, 2)),
    r"a_shape: expected sink and local, got \(0, 0\)": lambda: Pattern("a_shape", (0, 0)),
    "patterns, scores: expected one of each per head, got 1 and 0": lambda: HeadPlan(
        patterns=(Pattern("block_sparse", (1,)),), scores=()
    ),
    "flops_budget: expected enough for a candidate, got 10; raise it": lambda: search_patterns(
        *draw(50), CANDIDATES, 10
    ),
    "k: expected as many keys as the 50 queries of a prompt, got 40": lambda: MInferencePrefill()(
        draw(50)[0], *draw(40)[1:]
    ),
    "heads: expected a multiple of the 2 key-value heads, got 3 query heads": lambda: search_patterns(
        *draw(50, heads=3), CANDIDATES, 1e9
    ),
    r"a_shape: expected whole sizes, got \(1.5, 2\)": lambda: Pattern("a_shape", (1.5, 2)),
    "heads: expected a multiple of the 3 key-value heads, got 4 query heads": lambda: MInferencePrefill()(
        draw(50)[0], *draw(50, kv_heads=3)[1:]
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()
