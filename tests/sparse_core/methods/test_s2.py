"""S2-Attention: the rule block by block, what the heads see together, training, decoding with a cache that forgets."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.masks import BlockMask, causal
from sparse_core.attention.merge import merge_lse
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.methods.attention.s2 import Config, ShardedAttention, local_stride_mask

CONFIGS = [  # heads, key-value heads, blocks, config
    (8, 8, 20, {"local_blocks": 2, "stride": 8}),
    (4, 2, 13, {"local_blocks": 3, "stride": 4}),
    (3, 3, 9, {"local_blocks": 1, "stride": 2, "offset": 1}),
    (4, 4, 16, {"local_blocks": 2, "stride": 4, "num_dense_heads": 1}),
    (2, 2, 12, {"local_blocks": 2, "stride": 5, "one_pattern": True}),
    (1, 1, 7, {"local_blocks": 7, "stride": 3}),
]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.mark.parametrize(("heads", "kv_heads", "blocks", "config"), CONFIGS)
def test_the_pattern_is_the_papers(heads, kv_heads, blocks, config):
    mask = local_stride_mask(heads, 16 * blocks - 3, num_kv_heads=kv_heads, block=16, **config)
    step = 0 if config.get("one_pattern") else max(1, int(config["stride"] / kv_heads))
    for head in range(heads):
        h = head // (heads // kv_heads)
        for i in range(blocks):
            for j in range(blocks):
                near = i - j < config["local_blocks"]
                far = (j + h * step + config.get("offset", 0)) % config["stride"] == 0
                dense = h >= kv_heads - config.get("num_dense_heads", 0)
                assert bool(mask.blocks[0, head, i, j]) == (i >= j and (near or far or dense))


def test_tokens_of_the_future_are_never_seen():
    tokens = local_stride_mask(4, 100, block=16, local_blocks=2, stride=4).to_token_mask()
    assert not (tokens & ~torch.ones(100, 100, dtype=torch.bool).tril()).any()
    assert tokens.diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize(
    ("heads", "stride", "whole"), [(8, 8, True), (4, 8, False), (3, 8, False), (8, 4, True)]
)
def test_heads_cover_everything_only_if_their_offsets_hit_every_residue(heads, stride, whole):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mask = local_stride_mask(heads, 16 * 64, block=16, local_blocks=4, stride=stride)
    everything = local_stride_mask(1, 16 * 64, block=16, local_blocks=64, stride=1)
    assert (mask.coverage(everything) == 1.0) == whole
    assert any("leave out" in str(warning.message) for warning in caught) != whole


def test_sizes_may_be_given_in_order():
    ours = local_stride_mask(8, 1024, 64, 4, 8, 4, 1)
    named = local_stride_mask(8, 1024, block=64, local_blocks=4, stride=8, num_kv_heads=4, num_dense_heads=1)
    assert torch.equal(ours.blocks, named.blocks)
    with pytest.raises(ValueError, match="unknown option 'strid': did you mean 'stride'"):
        local_stride_mask(8, 1024, strid=4)


def test_one_pattern_for_all_heads_covers_a_quarter():
    mask = local_stride_mask(8, 64 * 16, block=16, local_blocks=4, stride=8, one_pattern=True)
    everything = local_stride_mask(1, 64 * 16, block=16, local_blocks=64, stride=1)
    assert mask.coverage(everything) == pytest.approx(0.24, abs=0.01)


def test_a_dropped_block_is_never_needed_again():
    assert local_stride_mask(4, 500, block=16, local_blocks=3, stride=4).kv_efficient()


def test_without_causality_blocks_are_kept_by_distance():
    blocks = local_stride_mask(2, 16 * 12, block=16, local_blocks=2, stride=4, causal=False).blocks[0]
    assert torch.equal(blocks, blocks.mT)
    assert not torch.equal(blocks[0], blocks[1])
    for head in range(2):
        for distance in range(12):
            expected = distance < 2 or (max(0, distance - 1) + 2 * head) % 4 == 0
            assert blocks[head].diagonal(distance).all() == expected


def test_a_rank_of_a_parallel_model_gets_its_heads():
    options = {"block": 16, "local_blocks": 2, "stride": 4}
    whole = local_stride_mask(8, 200, num_kv_heads=4, **options)
    part = local_stride_mask(8, 200, num_kv_heads=4, active_head_range=(2, 6), **options)
    assert torch.equal(part.blocks, whole.blocks[:, 2:6])


@pytest.mark.parametrize("length", [1000, 64])
def test_values_and_gradients_are_those_of_the_masked_definition(length):
    attention = ShardedAttention(Config(local_blocks=2, stride=4), 4, 2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, length, 32, generator=generator, requires_grad=True) for h in (4, 2, 2))
    out = attention(q, k, v)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    exact = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attention.mask_of(length).to_token_mask(), enable_gqa=True
    )
    torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-5)
    for ours, theirs in zip(grads, torch.autograd.grad(exact.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_near_and_far_blocks_may_be_attended_to_apart_and_merged():
    attention = ShardedAttention(Config(block=16, local_blocks=2, stride=4), 4, 2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 150, 16, generator=generator) for h in (4, 2, 2))
    mask = attention.mask(q, k, v)
    apart = torch.arange(10)[:, None] - torch.arange(10)
    parts = [
        BlockMask.from_dense_blocks(
            mask.blocks & side,
            full=mask.full_blocks & side,
            rule=causal,
            block_size=16,
            q_len=150,
            kv_len=150,
        )
        for side in (apart < 2, apart >= 2)
    ]
    merged, _ = merge_lse([block_sparse_attention(q, k, v, part, return_lse=True) for part in parts])
    torch.testing.assert_close(merged, attention(q, k, v), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("block", [16, 64])
def test_a_mask_that_looks_ahead_is_refused_of_a_causal_config(block):
    sizes = {"block_size": block, "q_len": 100, "kv_len": 100}
    x = torch.randn(1, 2, 100, 16, generator=torch.Generator().manual_seed(0))
    n = -(-100 // block)
    whole = BlockMask.from_dense_blocks(torch.ones(n, n, dtype=torch.bool), **sizes)
    with pytest.raises(
        ValueError, match="mask: expected one that never looks ahead, got keys of block 0 for queries of"
    ):
        ShardedAttention(Config(), 2).attend(x, x, x, whole)
    ShardedAttention(Config(causal=False), 2).attend(x, x, x, whole)
    exact = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    other = BlockMask.from_rule(causal, q_len=100, kv_len=100, block_size=block)
    torch.testing.assert_close(
        ShardedAttention(Config(), 2).attend(x, x, x, other), exact, atol=2e-6, rtol=1e-4
    )


def test_decoding_gives_the_rows_of_the_whole_and_forgets_what_it_may():
    attention = ShardedAttention(Config(block=16, local_blocks=1, stride=4), 4, 2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 150, 16, generator=generator) for h in (4, 2, 2))
    whole, cache, rows = attention(q, k, v), KVCache(1, 2, 16, page=16), []
    for t in range(150):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        rows.append(attention.decode(q[:, :, t : t + 1], cache))
    torch.testing.assert_close(torch.cat(rows, 2), whole, atol=2e-6, rtol=1e-4)
    assert cache.held().float().mean() < 0.5


REFUSED = {
    "block: expected a power of two of at least 16, got 8": {"block": 8},
    "block: expected a power of two of at least 16, got 48": {"block": 48},
    "local_blocks and stride: expected at least 1, got 0 and 8": {"local_blocks": 0},
    "num_heads: expected a multiple of the 3 key-value heads, got 4": {"num_kv_heads": 3},
    "num_dense_heads: expected 0 to the 4 key-value heads, got 5": {"num_dense_heads": 5},
    "active_head_range: expected 0 <= first < last <= 4, got 3 and 9": {"active_head_range": (3, 9)},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        local_stride_mask(4, 100, **REFUSED[sentence])


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_padding_before_a_sample_changes_nothing_and_gives_0(kv_heads):
    layer = ShardedAttention(Config(block=16, local_blocks=1, stride=2), 4, kv_heads)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, h, 90, 8, generator=generator) for h in (4, kv_heads, kv_heads))
    padding = torch.tensor([0, 37, 90])
    junk = [x.clone() for x in (q, k, v)]
    for x in junk:
        x[1, :, :37], x[2] = torch.nan, torch.nan
    out = layer.attend_left_padded(*junk, padding)
    torch.testing.assert_close(out[:1], layer(q[:1], k[:1], v[:1]))
    torch.testing.assert_close(out[1:2, :, 37:], layer(*(x[1:2, :, 37:] for x in (q, k, v))))
    assert (out[1, :, :37] == 0).all()
    assert (out[2] == 0).all()
    with pytest.raises(ValueError, match=r"padding: expected 3 of 0 to 90, got \[0, 91, 3\]"):
        layer.attend_left_padded(q, k, v, torch.tensor([0, 91, 3]))
    with pytest.raises(ValueError, match="padding: expected a causal config, got one that looks ahead"):
        ShardedAttention(Config(causal=False), 4, kv_heads).attend_left_padded(q, k, v, padding)


def test_packed_sequences_do_not_see_each_other():
    layer = ShardedAttention(Config(block=16, local_blocks=1, stride=4), 4)
    q, k, v = torch.randn(3, 1, 4, 90, 8, generator=torch.Generator().manual_seed(0))
    out = layer.attend_packed(q, k, v, [20, 1, 69])
    for first, last in ((0, 20), (20, 21), (21, 90)):
        alone = layer(*(x[:, :, first:last] for x in (q, k, v)))
        torch.testing.assert_close(out[:, :, first:last], alone)
    with pytest.raises(ValueError, match=r"lengths: expected at least 1 each and 90 in all, got \[20, 71\]"):
        layer.attend_packed(q, k, v, [20, 71])


def test_a_mask_that_comes_back_to_a_dropped_block_is_warned_of():
    kept = torch.eye(4, dtype=torch.bool)
    kept[3, 0] = True
    mask = BlockMask.from_dense_blocks(
        kept, full=kept & ~torch.eye(4, dtype=torch.bool), rule=causal, block_size=16, q_len=64, kv_len=64
    )
    layer, x = ShardedAttention(Config(block=16), 4), torch.randn(1, 4, 64, 8)
    with pytest.warns(
        UserWarning, match="mask: expected one that never needs a dropped block again, got one"
    ):
        layer.attend(x, x, x, mask)


def test_decoding_wants_pages_that_fit_and_no_looking_ahead():
    with pytest.raises(ValueError, match="cache: expected pages that divide the block of 16, got 32"):
        ShardedAttention(Config(block=16), 1).decode(torch.zeros(1, 1, 1, 8), KVCache(1, 1, 8, page=32))
    with pytest.raises(ValueError, match="decode: expected a causal config"):
        ShardedAttention(Config(causal=False), 1).decode(torch.zeros(1, 1, 1, 8), KVCache(1, 1, 8))
