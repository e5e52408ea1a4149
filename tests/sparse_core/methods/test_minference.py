"""MInference: patterns against their rules, one mask for all heads, the search, plans on disk."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.methods.attention.minference import (
    Config,
    HeadPlan,
    MInferencePrefill,
    Pattern,
    pattern_mask,
    search_patterns,
    vertical_slash_index,
)

SMALL = Config(block=8, slash_block=4, last_q=8, sink=3, local=6)


def draw(length, heads=(4, 2), batch=2, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (heads[0], heads[1], heads[1])
    return [torch.randn(batch, h, length, width, generator=generator) for h in sizes]


def plan_of(*patterns, model=""):
    return HeadPlan(patterns=patterns, scores=(0.0,) * len(patterns), model=model)


MIXED = (
    Pattern("a_shape", (4, 10)),
    Pattern("vertical_slash", (9, 7)),
    Pattern("block_sparse", (2,)),
    Pattern("vertical_slash", (5, 9)),
)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [50, 64, 75])
def test_all_heads_run_as_one_mask_and_equal_masked_attention(length, causal):
    q, k, v = (x.requires_grad_() for x in draw(length))
    layer = MInferencePrefill(plan_of(*MIXED), Config(**{**vars(SMALL), "causal": causal}))
    mask = layer.mask(q, k, v)
    keep = mask.to_token_mask()
    assert keep.shape == (2, 4, length, length)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    out = layer.attend(q, k, v, mask)
    torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-4)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, exact))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_a_shape_keeps_sink_and_window_by_the_token(causal):
    q, k, _ = draw(50, (1, 1), 1)
    config = Config(**{**vars(SMALL), "causal": causal})
    keep = pattern_mask(q, k, [Pattern("a_shape", (4, 10))], config).to_token_mask()[0, 0]
    i, j = torch.arange(50)[:, None], torch.arange(50)
    expected = (j < 4) | ((i - j).abs() < 10)
    assert torch.equal(keep, expected & (i >= j) if causal else expected)


def test_vertical_slash_keeps_its_columns_and_every_pair_on_its_diagonals():
    q, k, _ = draw(75, (1, 1), 1)
    keep = pattern_mask(q, k, [Pattern("vertical_slash", (9, 7))], SMALL).to_token_mask()[0, 0]
    columns, diagonals = vertical_slash_index(q, k, 9, 7, 8, sink=3, local=6)
    i, j = torch.arange(75)[:, None], torch.arange(75)
    lies = (j[None] == columns[0, 0][:, None]).any(0) | ((i - j)[..., None] == diagonals[0, 0]).any(-1)
    assert keep[lies & (i >= j)].all()
    assert not keep[i < j].any()
    assert 0 < keep.sum() < 75 * 76 // 2


def test_the_index_is_the_attention_of_the_last_queries():
    q, k, _ = draw(60, (2, 1), 1)
    columns, diagonals = vertical_slash_index(q, k, 12, 20, 8, sink=3, local=6)
    scores = q[:, :, -8:] @ k.repeat_interleave(2, 1).mT * 8**-0.5
    rows = torch.arange(52, 60)[:, None]
    weights = scores.masked_fill(torch.arange(60) > rows, -torch.inf).softmax(-1)
    for head in range(2):
        down = weights[0, head].sum(0)
        free = down[3:].sort(descending=True).indices[:9] + 3
        assert set(columns[0, head].tolist()) == {0, 1, 2, *free.tolist()}
        along = torch.stack([weights[0, head].diagonal(52 - s).sum() for s in range(60)])
        free = along[6:].sort(descending=True).indices[:14] + 6
        assert set(diagonals[0, head].tolist()) == {*range(6), *free.tolist()}


def test_every_sample_of_a_batch_has_its_own_index():
    q, k, v = draw(64)
    plan = plan_of(*MIXED)
    together = MInferencePrefill(plan, SMALL)(q, k, v)
    alone = [MInferencePrefill(plan, SMALL)(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 12, 40])
def test_short_prompts_are_dense(length):
    q, k, v = draw(length)
    layer = MInferencePrefill(plan_of(*[Pattern("vertical_slash", (30, 800))] * 4), Config())
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(layer(q, k, v), exact, atol=2e-6, rtol=1e-5)


def test_layers_before_the_starting_layer_are_dense():
    q, k, v = draw(64)
    config = Config(**{**vars(SMALL), "starting_layer": 2})
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    early, late = (MInferencePrefill(plan_of(*MIXED), config, layer=n)(q, k, v) for n in (1, 2))
    torch.testing.assert_close(early, exact, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(late, exact, atol=1e-3)


def test_without_a_plan_every_head_keeps_its_share_of_blocks():
    q, k, v = draw(64)
    mask = MInferencePrefill(None, Config(block=8, slash_block=8, causal=False, share=0.25)).mask(q, k, v)
    assert torch.equal(mask.blocks.blocks.sum(-1), torch.full((2, 4, 8), 2))


def test_finding_the_index_costs_the_last_queries_only():
    q, k, _ = draw(200, (2, 2), 1)
    with counters.count() as cost:
        vertical_slash_index(q, k, 5, 5, 8, sink=3, local=6)
    assert cost.products == 2 * 8 * 200


def test_the_search_scales_every_candidate_to_the_budget():
    q, k, v = draw(128, (2, 1), 1)
    candidates = [Pattern("a_shape", (4, 20)), Pattern("block_sparse", (4,))]
    # One head looks at its window, the other at one far block.
    place = torch.arange(128).float()[:, None]
    q[0, 0], k[0, 0] = torch.cat([place.mul(0.05).cos(), place.mul(0.05).sin()], -1).repeat(1, 4) * 5, 0
    k[0, 0] = q[0, 0]
    q[0, 1] = 0
    q[0, 1, :, 0], k[0, 0, 40:48, 0] = 30, 30
    plan = search_patterns(q, k, v, candidates, 4.0 * 8 * 128 * 40, config=SMALL)
    assert plan.patterns[1].kind == "block_sparse"
    assert plan.scores[1] < 0.5
    with pytest.raises(ValueError, match="flops_budget: expected enough for a candidate, got 10; raise it"):
        search_patterns(q, k, v, candidates, 10, config=SMALL)


def test_plans_come_back_from_disk_and_know_their_model(tmp_path):
    model = nn.Linear(3, 3)
    q, k, v = draw(64, (2, 1), 1)
    plan = search_patterns(
        q, k, v, [Pattern("a_shape", (4, 20))], 4.0 * 8 * 64 * 30, config=SMALL, model=model
    )
    again = HeadPlan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan
    again.validate(model)
    with pytest.raises(ValueError, match="plan: expected one for the model .*calibrate again"):
        again.validate(nn.Linear(3, 3))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="broken.json: expected a head plan"):
        HeadPlan.load(tmp_path / "broken.json")


def test_what_does_not_fit_is_refused():
    q, k, v = draw(64)
    with pytest.raises(
        KeyError, match="pattern: expected one of a_shape, vertical_slash, block_sparse, got 'star'"
    ):
        Pattern("star", (1,))
    with pytest.raises(ValueError, match="a_shape: expected sink and local, got"):
        Pattern("a_shape", (1,))
    with pytest.raises(
        ValueError, match="plan: expected one pattern for each of the 4 heads, got 2; search again"
    ):
        MInferencePrefill(plan_of(*MIXED[:2]), SMALL)(q, k, v)
    with pytest.raises(ValueError, match="k: expected as many keys as the 10 queries of a prompt, got 64"):
        MInferencePrefill(None, SMALL)(q[:, :, :10], k, v)
    with pytest.raises(ValueError, match="heads: expected a multiple of the 2 key-value heads, got 3"):
        MInferencePrefill(None, SMALL)(q[:, :3], k, v)
    with pytest.raises(ValueError, match="block: expected a power of two, got 12"):
        Config(block=12)
    with pytest.raises(ValueError, match="patterns, scores: expected one of each per head, got 1 and 0"):
        HeadPlan(patterns=MIXED[:1], scores=())
