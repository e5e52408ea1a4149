"""Blocks and loose columns under one softmax, against masks of single tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_core import counters
from sparse_core.attention.column_attention import column_block_attention
from sparse_core.attention.masks import BlockMask, ColumnBlockMask, causal

SIZES = {"block_size": (16, 8), "q_len": 50, "kv_len": 37}  # 4 x 5 blocks, both ragged
IMPLEMENTATIONS = ("numba", "gather", "reference")


def draw_mask(seed=0, rule=None, batch=2, heads=4, share=0.4, n=9, empty=(1,)):
    """A mask, and what it was made of: blocks, columns (some named twice, some places empty), who lists them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(batch, heads, 4, 5, generator=generator) < share
    columns = torch.randint(-1, 37, (batch, heads, n), generator=generator)
    listed = torch.rand(batch, heads, 4, n, generator=generator) < 0.5
    for row in empty:
        blocks[:, :, row], listed[:, :, row] = False, False
    made = BlockMask.from_dense_blocks(blocks, rule=rule, **SIZES)
    return ColumnBlockMask.from_columns(made, columns, listed=listed), blocks, columns, listed


def plain_tokens(blocks, columns, listed, rule):
    """The same mask, one entry at a time."""
    batch, heads = blocks.shape[:2]
    kept = torch.zeros(batch, heads, 50, 37, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for row in range(4):
                span = slice(row * 16, row * 16 + 16)
                for column in range(5):
                    kept[b, h, span, column * 8 : column * 8 + 8] |= blocks[b, h, row, column]
                for key, here in zip(columns[b, h].tolist(), listed[b, h, row].tolist(), strict=True):
                    if key >= 0 and here:
                        kept[b, h, span, key] = True
    return kept if rule is None else kept & (torch.arange(50)[:, None] >= torch.arange(37))


def draw_tokens(heads=4, kv_heads=2, batch=2, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = ((heads, 50), (kv_heads, 37), (kv_heads, 37))
    return [
        torch.randn(batch, h, t, width, generator=generator).to(dtype).requires_grad_() for h, t in shapes
    ]


def dense(q, k, v, tokens):
    """Output, log-sum-exp, by a mask of tokens."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores, some = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~tokens, -torch.inf), tokens.any(-1)
    weights = scores.masked_fill(~some[..., None], 0).softmax(-1).masked_fill(~some[..., None], 0)
    return weights @ v, scores.detach().logsumexp(-1)


@given(st.integers(0, 10_000), st.floats(0, 1), st.sampled_from([None, causal]))
@settings(max_examples=15, deadline=None)
def test_the_tokens_are_those_of_blocks_and_columns(seed, share, rule):
    mask, *parts = draw_mask(seed, rule, batch=1, heads=2, share=share)
    tokens = plain_tokens(*parts, rule)
    assert torch.equal(mask.to_token_mask(), tokens)
    assert torch.equal(mask.pairs(), tokens.sum((-2, -1)))
    assert mask.density() == pytest.approx(float(tokens.double().mean()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", [None, causal])
def test_values_and_gradients_are_those_of_one_softmax(rule, implementation):
    mask, *parts = draw_mask(rule=rule)
    tokens = plain_tokens(*parts, rule)
    assert not tokens.any(-1).all()  # some rows have no key at all
    weight, results = torch.randn(2, 4, 50, 16, generator=torch.Generator().manual_seed(2)), []
    for attend in (
        lambda q, k, v: column_block_attention(q, k, v, mask, return_lse=True, implementation=implementation),
        lambda q, k, v: dense(q, k, v, tokens),
    ):
        q, k, v = draw_tokens()
        out, lse = attend(q, k, v)
        (out * weight).sum().backward()
        results.append([out.detach(), lse.detach(), q.grad, k.grad, v.grad])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-5)
    assert (results[0][0][:, :, 16:32] == 0).all()
    assert (results[0][1][:, :, 16:32] == -torch.inf).all()


def test_a_key_of_both_parts_counts_once():
    blocks = BlockMask.from_dense_blocks(torch.ones(4, 5, dtype=torch.bool), **SIZES)
    mask = ColumnBlockMask.from_columns(blocks, torch.tensor([[[3, 3, 20]]]))
    assert mask.columns.shape == (1, 1, 0)
    q, k, v = (x.detach() for x in draw_tokens())
    exact, _ = dense(q, k, v, torch.ones(50, 37, dtype=torch.bool))
    torch.testing.assert_close(column_block_attention(q, k, v, mask), exact, atol=2e-6, rtol=1e-5)


def test_a_key_that_is_named_twice_counts_once():
    nothing = BlockMask.from_dense_blocks(torch.zeros(4, 5, dtype=torch.bool), **SIZES)
    listed = torch.tensor([[True, False, True], [False, True, False], [True, True, False], [False] * 3])
    mask = ColumnBlockMask.from_columns(nothing, torch.tensor([[[30, 30, 2]]]), listed=listed[None, None])
    assert mask.columns.tolist() == [[[2, 30]]]
    assert mask.listed[0, 0].int().tolist() == [[1, 1], [0, 1], [0, 1], [0, 0]]
    assert mask.pairs().tolist() == [[16 * 4]]


@pytest.mark.parametrize("size", [1, 4, 16])
def test_the_loose_part_may_be_cut_into_blocks_of_any_size(size):
    for rule in (None, causal):
        mask = draw_mask(rule=rule)[0]
        assert torch.equal(mask.loose(size).to_token_mask(), mask.loose(1).to_token_mask())
        assert mask.loose(size) is mask.loose(size)
        assert torch.equal(mask.loose(size).pairs(), mask.loose(1).pairs())


def test_full_columns_are_not_asked_of_the_rule():
    nothing = BlockMask.from_dense_blocks(torch.zeros(4, 5, dtype=torch.bool), rule=causal, **SIZES)
    full = torch.tensor([False, True, True, True])[None, None, :, None]
    mask = ColumnBlockMask.from_columns(nothing, torch.tensor([[[10]]]), full=full)
    assert mask.loose().full_blocks[0, 0, :, 0].tolist() == [False, True, True, True]
    assert torch.equal(mask.to_token_mask()[0, 0, :, 10], torch.arange(50) >= 10)


def test_one_head_stands_for_all():
    mask, *parts = draw_mask(batch=1, heads=1, rule=causal)
    q, k, v = (x.detach() for x in draw_tokens())
    exact, _ = dense(q, k, v, plain_tokens(*parts, causal).expand(2, 4, -1, -1))
    torch.testing.assert_close(column_block_attention(q, k, v, mask), exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_stays(dtype):
    mask = draw_mask(rule=causal)[0]
    q, k, v = (x.detach() for x in draw_tokens(dtype=dtype))
    out, lse = column_block_attention(q, k, v, mask, return_lse=True)
    exact, _ = dense(*(x.float() for x in (q, k, v)), mask.to_token_mask())
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.float(), exact, atol=3e-2 if dtype.itemsize == 2 else 2e-5, rtol=2e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
def test_keys_that_nobody_lists_are_never_read(implementation):
    blocks = torch.zeros(4, 5, dtype=torch.bool)
    blocks[:, 1] = True
    near = BlockMask.from_dense_blocks(blocks, **SIZES)
    columns = torch.tensor([[[20, 30], [25, -1]]])
    listed = torch.tensor([[True, False]] * 4)[None, None]
    mask = ColumnBlockMask.from_columns(near, columns, listed=listed)
    q, k, v = (x.detach() for x in draw_tokens(heads=2, kv_heads=1))
    unread = [j for j in range(37) if not 8 <= j < 16 and j not in (20, 25)]
    k[:, :, unread], v[:, :, unread] = torch.nan, torch.nan
    assert column_block_attention(q, k, v, mask, implementation=implementation).isfinite().all()


def test_cost_follows_what_is_kept():
    mask = draw_mask(rule=causal)[0]
    q, k, v = (x.detach() for x in draw_tokens())
    with counters.count() as counter:
        column_block_attention(q, k, v, mask)
    assert counter.products == int(mask.pairs().sum())
    rows, keys = torch.tensor([16, 16, 16, 2]), torch.tensor([8, 8, 8, 8, 5])
    near = (mask.blocks.blocks * rows[:, None] * keys).sum((-2, -1))
    assert torch.equal(mask.work(), near + (mask.listed * rows[:, None]).sum((-2, -1)))
    assert mask.density(BlockMask.from_rule(causal, q_len=50, kv_len=37)) > mask.density()


BAD = {
    "columns: expected integers": {"columns": torch.zeros(1, 1, 2)},
    "columns: expected keys 0 to 36, got 37": {"columns": torch.tensor([[[37]]])},
    r"listed: expected \[B, H, 4, 1\], got \[1, 1, 4, 2\]": {
        "listed": torch.ones(1, 1, 4, 2, dtype=torch.bool)
    },
    r"full: expected \[B, H, 4, 1\], got \[4, 1\]": {"full": torch.ones(4, 1, dtype=torch.bool)},
    "B, H: expected sizes that agree or are 1": {"columns": torch.zeros(1, 3, 1, dtype=torch.long)},
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_does_not_fit_is_refused(sentence):
    blocks = BlockMask.from_dense_blocks(torch.zeros(1, 2, 4, 5, dtype=torch.bool), **SIZES)
    given_ = {"columns": torch.zeros(1, 1, 1, dtype=torch.long), **BAD[sentence]}
    with pytest.raises(ValueError, match=sentence):
        ColumnBlockMask.from_columns(blocks, **given_)


def test_fields_of_other_shapes_are_refused():
    mask = draw_mask()[0]
    with pytest.raises(ValueError, match="columns, listed, full: expected"):
        ColumnBlockMask(blocks=mask.blocks, columns=mask.columns, listed=mask.listed, full=mask.full[..., :1])
    with pytest.raises(ValueError, match="mask: expected one for 49 queries and 37 keys, got 50 and 37"):
        q, k, v = (x.detach() for x in draw_tokens())
        column_block_attention(q[:, :, :49], k, v, mask)


def test_a_mask_that_is_there_already_stays_what_it_is():
    blocks = BlockMask.from_rule(causal, q_len=50, kv_len=37, block_size=(16, 8))
    mask = ColumnBlockMask.from_columns(blocks, torch.tensor([[[3, 20, 36]]]))
    loose = mask.loose()
    assert mask.to(mask.columns.device) is mask
    assert mask.to("cpu").loose() is loose
    moved = mask.to("meta")
    assert (moved.columns.device.type, moved.blocks.kv_num.device.type) == ("meta", "meta")
    assert not moved._loose
