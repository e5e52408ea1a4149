"""Spans per head: blocks, densities and decoding against the rule token by token; the rings that hold no more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.masks import SpanPlan
from sparse_core.attention.span_cache import SpanKVCache
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.gather_decode import decode_attention

PLANS = {
    "tokens": SpanPlan(sink=(0, 3, 17), window=(1, 5, 40)),
    "blocks": SpanPlan(sink=(0, 8, 16), window=(8, 24, 48), unit=8),
    "tokens both ways": SpanPlan(sink=(0, 3, 17), window=(1, 5, 40), causal=False),
    "blocks both ways": SpanPlan(sink=(0, 8, 16), window=(8, 24, 48), unit=8, causal=False),
    "wide sink": SpanPlan(sink=(200, 60), window=(4, 4), unit=4),
    "wide sink both ways": SpanPlan(sink=(200, 60), window=(4, 4), unit=4, causal=False),
}


def by_hand(plan, q_len, kv_len):
    """The rule, one pair at a time."""
    shift = kv_len - q_len if plan.causal else 0
    kept = torch.zeros(plan.heads, q_len, kv_len, dtype=torch.bool)
    for h in range(plan.heads):
        for i in range(q_len):
            for j in range(kv_len):
                near = abs((i + shift) // plan.unit - j // plan.unit) < plan.window[h] // plan.unit
                kept[h, i, j] = (near or j < plan.sink[h]) and (j <= i + shift or not plan.causal)
    return kept


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(50, 50), (1, 33), (13, 30), (64, 64)])
def test_token_masks_are_the_rule(name, q_len, kv_len):
    assert torch.equal(PLANS[name].to_token_mask(q_len, kv_len)[0], by_hand(PLANS[name], q_len, kv_len))


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), min_size=1, max_size=3),
    st.sampled_from([1, 4, 6]), st.booleans(), st.integers(1, 60), st.integers(0, 30), st.sampled_from([4, 16]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_blocks_are_full_partial_or_absent_as_their_pairs_say(sizes, unit, causal, q_len, more, block):
    plan = SpanPlan(
        sink=tuple(sink * unit for sink, _ in sizes), window=tuple(size * unit for _, size in sizes),
        unit=unit, causal=causal,
    )  # fmt: skip
    mask, tokens = (
        plan.to_block_mask(q_len, q_len + more, (block, 8)),
        plan.to_token_mask(q_len, q_len + more),
    )
    assert torch.equal(mask.to_token_mask(), tokens)
    for row in range(mask.shape[2]):
        for column in range(mask.shape[3]):
            tile = tokens[0, :, row * block : (row + 1) * block, column * 8 : (column + 1) * 8].flatten(1)
            assert torch.equal(mask.blocks[0, :, row, column], tile.any(1))
            assert torch.equal(mask.full_blocks[0, :, row, column], tile.all(1))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("length", [1, 7, 50, 130])
def test_density_counts_pairs(name, length):
    plan = PLANS[name]
    tokens = plan.to_token_mask(length, length)[0]
    possible = length * (length + 1) / 2 if plan.causal else length**2
    assert torch.equal(plan.pairs(length), tokens.sum((1, 2)))
    assert plan.density(length) == pytest.approx(float(tokens.sum((1, 2)).double().mean()) / possible)
    if plan.causal:
        assert (tokens.sum(2).amax(1).double() / length <= plan.kv_densities(length) + 1e-12).all()


def test_units_of_a_block_leave_only_the_diagonal_partial():
    mask = PLANS["blocks"].to_block_mask(96, 96, 8)
    assert not (mask.partial_blocks & ~torch.eye(12, dtype=torch.bool)).any()
    assert PLANS["blocks both ways"].to_block_mask(96, 96, 8).partial_blocks.sum() == 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [37, 130])
def test_attention_is_that_of_the_dense_mask_with_gradients(causal, length):
    plan = SpanPlan(sink=(4, 0), window=(8, 20), unit=4, causal=causal)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, length, 16, generator=generator, requires_grad=True) for h in (4, 2, 2))
    mask = plan.for_heads(4).to_block_mask(length, length, 16)
    dense = plan.to_token_mask(length, length).repeat_interleave(2, 1)
    assert torch.equal(mask.to_token_mask(), dense)
    ours = block_sparse_attention(q, k, v, mask)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
    torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-4)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, exact)]
    torch.testing.assert_close(*grads, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["tokens", "blocks", "wide sink"])
@pytest.mark.parametrize("length", [1, 8, 41])
def test_a_decoder_reads_the_last_row(name, length):
    selection = PLANS[name].to_index(length)
    assert torch.equal(
        selection.to_token_mask()[:, :, 0], PLANS[name].to_token_mask(length, length)[:, :, -1]
    )
    named = selection.index[selection.index >= 0]
    assert len(named) == PLANS[name].to_token_mask(1, length).sum()


@pytest.mark.parametrize("implementation", ["reference", "numba", "gather"])
def test_decoding_takes_spans_and_gives_back_pages(implementation):
    plan = SpanPlan(sink=(4, 0), window=(8, 16), unit=4)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, 60, 8, generator=generator) for h in (4, 2, 2))
    exact = F.scaled_dot_product_attention(
        q, k, v, attn_mask=plan.to_token_mask(60, 60).repeat_interleave(2, 1), enable_gqa=True
    )
    cache, sizes = KVCache(1, 2, 8, page=2), []
    for t in range(60):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        out = decode_attention(q[:, :, t : t + 1], cache, plan, implementation=implementation)
        torch.testing.assert_close(out, exact[:, :, t : t + 1], atol=2e-5, rtol=1e-4)
        cache.evict(plan.unneeded_pages(t + 1, 2)[None])
        sizes.append(cache.bytes)
    assert sizes[-1] == sizes[30]
    assert cache.held()[0].sum(1).tolist() == [12, 16]


def test_spans_that_reach_evicted_pages_find_them_absent():
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 1, 20, 8, generator=generator) for _ in range(3))
    cache = KVCache(1, 1, 8, page=4)
    cache.append(k, v)
    cache.evict(torch.tensor([False, True, True, False, False])[None, None])
    wide = SpanPlan.uniform(1, sink=4, window=16)
    rest = torch.cat([torch.arange(4), torch.arange(12, 20)])
    exact = F.scaled_dot_product_attention(q[:, :, -1:], k[:, :, rest], v[:, :, rest])
    torch.testing.assert_close(decode_attention(q[:, :, -1:], cache, wide), exact, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("first", [1, 9, 33])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 3), (3, 1)])
def test_rings_hold_what_the_spans_need_and_no_more(first, heads, kv_heads):
    plan = PLANS["blocks"].for_heads(heads)
    generator = torch.Generator().manual_seed(first)
    q, k, v = (torch.randn(2, h, 150, 8, generator=generator) for h in (heads, kv_heads, kv_heads))
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=plan.to_token_mask(150, 150), enable_gqa=True)
    cache = SpanKVCache(plan, 2, kv_heads, 8)
    memory = cache.bytes
    cache.append(k[:, :, :first], v[:, :, :first])
    for t in range(first, 150):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        out = decode_attention(q[:, :, t : t + 1], cache, plan)
        torch.testing.assert_close(out, exact[:, :, t : t + 1], atol=2e-5, rtol=1e-4)
    rows = 8 + 32 + 64 if kv_heads == 3 else 64
    assert cache.bytes == memory == 2 * 2 * rows * 8 * 4
    assert (
        sum(x.untyped_storage().nbytes() for x in cache.rows(torch.zeros(1, kv_heads, 1).long())[:2])
        == memory
    )
    assert int(cache.held().sum()) == rows


def test_decoding_from_rings_reads_as_many_bytes_as_the_spans():
    plan = SpanPlan(sink=(4, 4), window=(8, 20))
    cache = SpanKVCache(plan, 1, 2, 16)
    cache.append(*torch.randn(2, 1, 2, 100, 16, generator=torch.Generator().manual_seed(0)))
    with counters.count() as counter:
        decode_attention(torch.ones(1, 2, 1, 16), cache, plan)
    assert counter.products == 4 + 8 + 4 + 20
    assert counter.kv_bytes == 2 * counter.products * 16 * 4


REFUSED = {
    "sink, window: expected one of each per head, got 1 and 2": lambda: SpanPlan(sink=(0,), window=(1, 2)),
    r"sink, window: expected whole units of 4 tokens, got \(0,\) and \(6,\)": lambda: SpanPlan(
        sink=(0,), window=(6,), unit=4
    ),
    "sink, window: expected at least 0 and one unit, got 0 and 0": lambda: SpanPlan(sink=(0,), window=(0,)),
    "heads: expected a multiple of the 3 heads of the plan, got 4": lambda: PLANS["tokens"].for_heads(4),
    "kv_len: expected at least as many keys as the 5 queries": lambda: PLANS["tokens"].to_block_mask(5, 4),
    "spans: expected causal ones, got a plan that looks ahead": lambda: SpanKVCache(
        PLANS["tokens both ways"], 1, 3, 8
    ),
    "spans: expected a multiple of the 2 key-value heads, got 3": lambda: SpanKVCache(
        PLANS["tokens"], 1, 2, 8
    ),
    "batch, kv_heads, width: expected at least 1 each, got 0, 3, 8": lambda: SpanKVCache(
        PLANS["tokens"], 0, 3, 8
    ),
    r"k, v: expected both \[1, 3, n, 8\]": lambda: SpanKVCache(PLANS["tokens"], 1, 3, 8).append(
        torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    ),
    "cache: expected at least one token, got none; prefill it first": lambda: SpanKVCache(
        PLANS["tokens"], 1, 3, 8
    ).rows(torch.zeros(1, 3, 1).long()),
    "prefill it first": lambda: decode_attention(
        torch.zeros(1, 3, 1, 8), SpanKVCache(PLANS["tokens"], 1, 3, 8), PLANS["tokens"]
    ),
    r"selection: expected indices \[1, 2 or 2, 1, n\]": lambda: decode_attention(
        torch.zeros(1, 2, 1, 8), (torch.zeros(1, 2, 5, 8),) * 2, PLANS["tokens"]
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()
