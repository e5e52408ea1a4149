"""Block masks: every way to make one, every operation, against masks of single tokens."""

import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_core.attention.layout import Layout3D
from sparse_core.attention.masks import BlockMask, IndexMask, causal, patterns
from sparse_core.kernels.block_attention import block_sparse_attention

LENGTHS = {"block_size": (16, 8), "q_len": 50, "kv_len": 37}  # 4 x 5 blocks, both ragged


def draw_blocks(seed, share=0.5, batch=1, heads=2):
    return torch.rand(batch, heads, 4, 5, generator=torch.Generator().manual_seed(seed)) < share


def near(b, h, i, j):
    return (i - j).abs() < 7 + h


def spread(blocks):
    """Token mask of whole blocks."""
    return blocks.repeat_interleave(16, -2).repeat_interleave(8, -1)[..., :50, :37]


def expand(rule, heads=2, q_len=50, kv_len=37):
    h, i, j = torch.arange(heads)[:, None, None], torch.arange(q_len)[:, None], torch.arange(kv_len)
    return rule(torch.zeros(1, 1, 1, 1, dtype=torch.long), h[None], i, j).expand(1, heads, q_len, kv_len)


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_dense_blocks_come_back(seed, share):
    blocks = draw_blocks(seed, share, batch=2)
    mask = BlockMask.from_dense_blocks(blocks, **LENGTHS)
    assert torch.equal(mask.blocks, blocks)
    assert torch.equal(mask.full_blocks, blocks)
    assert torch.equal(mask.to_token_mask(), spread(blocks))
    assert mask.shape == (2, 2, 4, 5)
    for row in range(4):
        listed = mask.full_kv_idx[0, 0, row, : mask.full_kv_num[0, 0, row]].tolist()
        assert listed == blocks[0, 0, row].nonzero().flatten().tolist()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_leading_axes_may_be_missing(leading):
    mask = BlockMask.from_dense_blocks(torch.ones(*leading, 4, 5, dtype=torch.bool), **LENGTHS)
    assert mask.shape == (*(1,) * (2 - len(leading)), *leading, 4, 5)


@pytest.mark.parametrize("rule", [causal, near])
def test_a_rule_decides_token_by_token(rule):
    mask = BlockMask.from_rule(rule, heads=2, **LENGTHS)
    assert torch.equal(mask.to_token_mask(), expand(rule))
    whole = mask.full_blocks[0, :, :3, :4]  # away from the ragged ends
    assert torch.equal(
        whole, expand(rule)[0, :, :48, :32].unflatten(1, (3, 16)).unflatten(3, (4, 8)).all(4).all(2)
    )
    assert not (mask.full_blocks & mask.partial_blocks).any()


def test_blocks_of_which_the_rule_keeps_nothing_are_not_listed():
    mask = BlockMask.from_rule(causal, q_len=256, kv_len=256, block_size=64)
    assert torch.equal(mask.blocks[0, 0], torch.ones(4, 4, dtype=torch.bool).tril())
    assert torch.equal(mask.partial_blocks[0, 0], torch.eye(4, dtype=torch.bool))


def test_a_rule_without_exceptions_is_dropped():
    mask = BlockMask.from_rule(lambda b, h, i, j: (i >= 0) & (j >= 0), **LENGTHS)
    assert mask.rule is None
    assert mask.full_blocks.all()


def test_topk_takes_the_highest_and_breaks_ties_by_order():
    scores = torch.zeros(1, 1, 4, 5)
    scores[..., 3] = 1
    mask = BlockMask.from_topk(scores, 3, **LENGTHS)
    assert torch.equal(mask.blocks[0, 0, 0], torch.tensor([True, True, False, True, False]))


def test_topk_never_takes_what_scores_minus_infinity_and_always_what_is_forced():
    scores = torch.full((1, 2, 4, 5), -torch.inf)
    scores[..., 0] = 0
    force = torch.eye(4, 5, dtype=torch.bool)
    mask = BlockMask.from_topk(scores, 4, force=force, **LENGTHS)
    expected = force.clone()
    expected[:, 0] = True
    assert torch.equal(mask.blocks, expected.expand(1, 2, 4, 5))


def test_topk_with_a_larger_budget_is_everything():
    assert BlockMask.from_topk(torch.zeros(4, 5), 99, **LENGTHS).blocks.all()


def test_topk_with_a_rule_keeps_the_rule():
    mask = BlockMask.from_topk(torch.zeros(4, 5), 99, rule=causal, **LENGTHS)
    assert torch.equal(mask.to_token_mask(), expand(causal, heads=1))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_csr_there_and_back(seed):
    blocks = draw_blocks(seed, batch=2)
    offsets, columns = BlockMask.from_dense_blocks(blocks, **LENGTHS).to_csr()
    assert torch.equal(BlockMask.from_csr(offsets, columns, batch=2, heads=2, **LENGTHS).blocks, blocks)


@given(st.integers(0, 10_000), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_union_and_intersection_are_those_of_the_tokens(seed, first_rule, second_rule):
    first = BlockMask.from_dense_blocks(draw_blocks(seed), rule=near if first_rule else None, **LENGTHS)
    second = BlockMask.from_dense_blocks(
        draw_blocks(seed + 1), rule=causal if second_rule else None, **LENGTHS
    )
    tokens = first.to_token_mask(), second.to_token_mask()
    assert torch.equal((first | second).to_token_mask(), tokens[0] | tokens[1])
    assert torch.equal((first & second).to_token_mask(), tokens[0] & tokens[1])


def test_masks_of_one_head_combine_with_masks_of_many():
    wide, narrow = (
        BlockMask.from_dense_blocks(draw_blocks(0), **LENGTHS),
        BlockMask.from_rule(causal, **LENGTHS),
    )
    assert torch.equal((wide & narrow).to_token_mask(), wide.to_token_mask() & expand(causal))


@pytest.mark.parametrize("rule", [None, causal, near])
def test_the_transpose_exchanges_queries_and_keys(rule):
    mask = BlockMask.from_dense_blocks(draw_blocks(3), rule=rule, **LENGTHS)
    assert torch.equal(mask.transpose().to_token_mask(), mask.to_token_mask().mT)
    assert mask.transpose().block_size == (8, 16)


def test_the_transpose_and_its_lists_are_made_once(monkeypatch):
    mask = BlockMask.from_dense_blocks(draw_blocks(3), rule=causal, **LENGTHS)
    across, rows = mask.transpose(), mask.transpose().rows
    monkeypatch.setattr(BlockMask, "from_dense_blocks", None)
    assert mask.transpose() is across
    assert all(a is b for a, b in zip(mask.transpose().rows, rows, strict=True))
    assert torch.equal(pickle.loads(pickle.dumps(mask)).transpose().to_token_mask(), across.to_token_mask())


def test_a_mask_that_is_there_already_stays_what_it_is():
    mask = BlockMask.from_dense_blocks(draw_blocks(3), rule=causal, **LENGTHS)
    rows, across = mask.rows, mask.transpose()
    assert mask.to(mask.kv_num.device) is mask
    assert mask.to("cpu") is mask
    assert mask.to("cpu").rows is rows
    moved = mask.to("meta")
    assert {x.device.type for x in (moved.kv_num, moved.kv_idx, moved.full_kv_num, moved.full_kv_idx)} == {
        "meta"
    }
    assert not {"rows", "_transposed", "tiles"} & set(vars(moved))
    assert mask.transpose() is across


def test_what_a_mask_is_made_of_cannot_be_exchanged():
    """What it has worked out would no longer be true."""
    mask = BlockMask.from_dense_blocks(draw_blocks(3), rule=causal, **LENGTHS)
    for name in ("kv_num", "kv_idx", "full_kv_num", "full_kv_idx", "block_size", "q_len", "kv_len", "rule"):
        with pytest.raises(FrozenInstanceError):
            setattr(mask, name, getattr(mask, name))


@pytest.mark.parametrize("rule", [None, causal, near])
def test_pairs_and_density_count_tokens(rule):
    mask = BlockMask.from_dense_blocks(draw_blocks(5), rule=rule, **LENGTHS)
    tokens = mask.to_token_mask()
    assert torch.equal(mask.pairs(), tokens.sum((-2, -1)))
    assert mask.density() == pytest.approx(tokens.float().mean().item())
    allowed = BlockMask.from_rule(causal, **LENGTHS)
    assert mask.density(allowed) == pytest.approx(tokens.sum().item() / (2 * expand(causal, 1).sum().item()))


def test_equal_patterns_are_kept_once():
    mask = BlockMask.from_rule(causal, q_len=512, kv_len=512, block_size=64)
    assert mask.tiles[0].shape == (1, 64, 64)
    assert torch.equal(mask.tiles[0][0], torch.ones(64, 64, dtype=torch.bool).tril())


def test_rows_name_the_pattern_of_every_listed_block():
    mask = BlockMask.from_dense_blocks(draw_blocks(7), rule=near, **LENGTHS)._settle()
    offsets, columns, pattern = mask.rows
    assert offsets[-1] == len(columns) == len(pattern) == mask.blocks.sum()
    assert (pattern >= 0).sum() == mask.partial_blocks.sum()


def test_torch_reads_the_mask_as_we_do():
    mask = BlockMask.from_dense_blocks(draw_blocks(9, batch=2), rule=near, **LENGTHS)
    theirs = mask.to_torch()
    assert theirs.kv_num_blocks.dtype == torch.int32
    assert torch.equal(create_mask(theirs.mask_mod, 2, 2, 50, 37, device="cpu"), mask.to_token_mask())


def test_flex_attention_agrees():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16, generator=generator) for n in (50, 37, 37))
    mask = BlockMask.from_dense_blocks(draw_blocks(11, batch=2), rule=near, **LENGTHS)
    theirs = flex_attention(q, k, v, block_mask=mask.to_torch())
    torch.testing.assert_close(block_sparse_attention(q, k, v, mask), theirs, atol=2e-6, rtol=1e-5)


def test_coverage_is_the_union_over_heads():
    blocks = torch.zeros(1, 2, 4, 5, dtype=torch.bool)
    blocks[0, 0, :, 0], blocks[0, 1, :, 1] = True, True
    mask = BlockMask.from_dense_blocks(blocks, **LENGTHS)
    assert mask.coverage() == pytest.approx(2 / 5)
    allowed = BlockMask.from_dense_blocks(torch.arange(5).expand(4, 5) < 2, **LENGTHS)
    assert mask.coverage(allowed) == 1.0


def test_a_block_that_comes_back_is_not_cache_efficient():
    square = {"block_size": 16, "q_len": 64, "kv_len": 64}
    blocks = torch.ones(4, 4, dtype=torch.bool).tril()
    assert BlockMask.from_dense_blocks(blocks, **square).kv_efficient()
    blocks[2, 0] = False
    assert not BlockMask.from_dense_blocks(blocks, **square).kv_efficient()
    blocks[3, 0] = False
    assert BlockMask.from_dense_blocks(blocks, **square).kv_efficient()


def test_memory_is_that_of_blocks():
    """A mask over 32 thousand tokens is far smaller than one byte per pair."""
    mask = BlockMask.from_topk(torch.rand(1, 1, 512, 512), 32, block_size=64, q_len=32_768, kv_len=32_768)
    assert mask.full_kv_idx.shape == (1, 1, 512, 32)


REFUSED = {
    "block_size: expected powers of two, got 48": {"block_size": 48},
    "block_size: expected powers of two, got 0": {"block_size": 0},
    "q_len and kv_len: expected at least one token, got 0 and 37": {"q_len": 0},
    "blocks: expected 7 query blocks for 100 tokens and 5 key blocks for 37 tokens at block 16 x 8, got": {
        "q_len": 100
    },
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_sizes_that_do_not_fit_are_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        BlockMask.from_dense_blocks(draw_blocks(0), **(LENGTHS | REFUSED[sentence]))


def test_scores_that_are_no_numbers_and_negative_budgets_are_refused():
    with pytest.raises(ValueError, match="scores: expected numbers, got NaN"):
        BlockMask.from_topk(torch.full((4, 5), torch.nan), 2, **LENGTHS)
    with pytest.raises(ValueError, match="k: expected 0 or more, got -1"):
        BlockMask.from_topk(torch.zeros(4, 5), -1, **LENGTHS)


def test_rows_that_do_not_fit_are_refused():
    offsets, columns = BlockMask.from_dense_blocks(draw_blocks(0), **LENGTHS).to_csr()
    with pytest.raises(ValueError, match="offsets: expected 5 entries of which the last is"):
        BlockMask.from_csr(offsets, columns, **LENGTHS)
    with pytest.raises(ValueError, match="columns: expected blocks 0 to 4, got"):
        BlockMask.from_csr(offsets, columns + 2, heads=2, **LENGTHS)


def test_masks_of_other_lengths_do_not_combine():
    other = BlockMask.from_rule(causal, q_len=51, kv_len=37, block_size=(16, 8))
    with pytest.raises(ValueError, match="masks: expected equal block size and lengths"):
        BlockMask.from_rule(causal, **LENGTHS) | other


def test_a_rule_may_look_into_a_table():
    keep = torch.rand(37, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    mask = BlockMask.from_rule(lambda b, h, i, j: keep[i, j], q_len=37, kv_len=50, block_size=16)
    assert torch.equal(mask.to_token_mask()[0, 0], keep)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


def documents(b, h, i, j):
    return (i // 700 == j // 700) & (i >= j)


@pytest.mark.parametrize("rule", [causal, documents])
def test_no_tensor_of_all_pairs_is_made_for_a_rule(rule):
    """8192 tokens: 64 MiB in bytes. What is held at once stays the same however many there are."""
    with Largest() as largest:
        mask = BlockMask.from_rule(rule, q_len=8192, kv_len=8192)
        mask.pairs()
    assert largest.bytes < 17 * 2**20
    with Largest() as few:
        BlockMask.from_rule(rule, q_len=4096, kv_len=4096).pairs()
    assert few.bytes == largest.bytes
    length = torch.arange(8192)
    assert mask.pairs().item() == (length - (length // 700 * 700 if rule is documents else 0) + 1).sum()


@given(st.integers(0, 10_000), st.sampled_from([(1, 1), (1, 2), (2, 16), (8, 4), (16, 32)]))
@settings(max_examples=20, deadline=None)
def test_patterns_come_back_whatever_the_block(seed, block_size):
    table = torch.rand(50, 37, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask = BlockMask.from_rule(lambda b, h, i, j: table[i, j], block_size=block_size, q_len=50, kv_len=37)
    tiles, which = mask.tiles
    assert len(which) == mask.partial_blocks.sum()
    assert len(tiles.flatten(1).unique(dim=0)) == len(tiles)
    (bq, bk), found = block_size, torch.zeros(50 + 32, 37 + 32, dtype=torch.bool)
    for (_, _, row, column), pattern in zip(
        mask.partial_blocks.nonzero().tolist(), which.tolist(), strict=True
    ):
        found[row * bq : (row + 1) * bq, column * bk : (column + 1) * bk] = tiles[pattern]
    whole = mask.full_blocks[0, 0].repeat_interleave(bq, 0).repeat_interleave(bk, 1)[:50, :37]
    assert not found[50:].any()
    assert not found[:, 37:].any()
    assert torch.equal(found[:50, :37] | whole, table)


def test_rows_of_one_number_are_still_told_apart(monkeypatch):
    """Patterns are sorted by a number each; here it is the same for all."""
    monkeypatch.setattr(torch, "randint", lambda high, size, **options: torch.full(size, -1) // 2)
    words = torch.tensor([[3, 5], [5, 3], [3, 5], [0, 0]])
    unique, which = patterns._unique(words)
    assert torch.equal(unique[which], words)
    assert len(unique) == 3


def test_a_mask_of_one_head_is_that_of_the_first_in_every_implementation():
    """Its rule reads the sample and the head, which the mask has one of."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator) for n in (50, 37, 37))
    mask = BlockMask.from_rule(lambda b, h, i, j: (i - j).abs() % (h + 2 * b + 2) == 0, **LENGTHS)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_token_mask())
    for name in ("reference", "numba", "gather"):
        ours = block_sparse_attention(q, k, v, mask, implementation=name)
        torch.testing.assert_close(ours, exact, atol=2e-6, rtol=1e-5)
    theirs = flex_attention(q, k, v, block_mask=mask.to_torch())
    torch.testing.assert_close(theirs, exact, atol=2e-6, rtol=1e-5)
    both = mask & BlockMask.from_dense_blocks(torch.ones(2, 3, 4, 5, dtype=torch.bool), **LENGTHS)
    assert torch.equal(both.to_token_mask(), mask.to_token_mask().expand(2, 3, -1, -1))


@pytest.mark.parametrize("answer", [True, torch.tensor(True), torch.ones(1, dtype=torch.long)])
def test_a_rule_may_say_the_same_of_everything(answer):
    assert BlockMask.from_rule(lambda b, h, i, j: answer, **LENGTHS).full_blocks.all()


MISTAKES = {
    "blocks: expected bool, got torch.float32; compare scores": lambda: BlockMask.from_dense_blocks(
        torch.ones(4, 5), **LENGTHS
    ),
    "full: expected bool, got torch.int64": lambda: BlockMask.from_dense_blocks(
        draw_blocks(0), full=torch.ones(4, 5, dtype=torch.long), **LENGTHS
    ),
    "block_size: expected powers of two, got 16.0": lambda: BlockMask.from_dense_blocks(
        draw_blocks(0), **(LENGTHS | {"block_size": 16.0})
    ),
    r"force: expected bool that broadcasts to scores \[4, 5\], got torch.bool \[3, 3\]": lambda: BlockMask.from_topk(
        torch.rand(4, 5), 1, force=torch.ones(3, 3, dtype=torch.bool), **LENGTHS
    ),
    r"force: expected bool that broadcasts to scores \[4, 5\], got torch.float32": lambda: BlockMask.from_topk(
        torch.rand(4, 5), 1, force=torch.ones(4, 5), **LENGTHS
    ),
    "offsets: expected numbers that rise from 0 to the 2 columns": lambda: BlockMask.from_csr(
        torch.tensor([0, 3, 1, 2, 2]), torch.tensor([0, 1]), **LENGTHS
    ),
    r"masks: expected equal samples and heads, or 1, got \(1, 2\) and \(1, 3\)": lambda: (
        BlockMask.from_dense_blocks(draw_blocks(0), **LENGTHS)
        & BlockMask.from_dense_blocks(draw_blocks(0, heads=3), **LENGTHS)
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_are_named(sentence):
    with pytest.raises(ValueError, match=sentence):
        MISTAKES[sentence]()


def test_a_mask_combines_with_masks_only():
    with pytest.raises(TypeError, match="masks: expected two of BlockMask, got one and Tensor"):
        BlockMask.from_rule(causal, **LENGTHS) | torch.ones(4, 5)


def test_a_key_that_a_query_names_twice_counts_once():
    mask = IndexMask(index=torch.tensor([[[[5, -1, 5, 2], [0, 1, 2, 3], [3, 3, 3, -1]]]]), kv_len=6)
    assert mask.index[0, 0].tolist() == [[5, -1, -1, 2], [0, 1, 2, 3], [3, -1, -1, -1]]
    assert mask.density() == pytest.approx(7 / 18)
    pages = IndexMask.from_pages(torch.tensor([[[[1, 0, 1]]]]), 4, 6)
    assert pages.index.flatten().tolist() == [4, 5, -1, -1, 0, 1, 2, 3, -1, -1, -1, -1]
    with pytest.raises(ValueError, match=r"index: expected integers, got torch.float32"):
        IndexMask(index=torch.zeros(1, 1, 1, 1), kv_len=6)


def test_a_layout_has_no_tiles_for_no_tokens():
    with pytest.raises(ValueError, match="block: expected at least 1 token, got 0"):
        Layout3D(frames=2, height=4, width=4).fit(0)
