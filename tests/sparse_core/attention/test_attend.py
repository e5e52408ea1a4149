"""Every kind of mask under one function, and in the slots of a model."""

import pytest
import torch
from torch.nn import functional as F

from sparse_core import AttentionSlot, BlockMask, IndexMask, sparsify
from sparse_core.attention.attend import attend
from sparse_core.attention.layout import Layout3D
from sparse_core.attention.masks import ClusterMask, ColumnBlockMask, SpanPlan, TokenCSR, causal

LENGTH = 41


def generator():
    return torch.Generator().manual_seed(0)


def draw(heads=(4, 2)):
    seeded = generator()
    return [torch.randn(2, h, LENGTH, 8, generator=seeded) for h in (heads[0], heads[1], heads[1])]


def blocks():
    return BlockMask.from_rule(causal, q_len=LENGTH, kv_len=LENGTH, block_size=16)


def index(heads=4):
    return torch.randint(-1, LENGTH, (2, heads, LENGTH, 9), generator=generator())


MASKS = {
    "blocks": blocks,
    "columns": lambda: ColumnBlockMask.from_columns(
        BlockMask.from_dense_blocks(torch.eye(3, dtype=torch.bool), block_size=16, q_len=LENGTH, kv_len=LENGTH),
        torch.tensor([[[3, 20, 40]]]),
    ),
    "keys in rows": lambda: TokenCSR.from_index(IndexMask(index=index(), kv_len=LENGTH)),
    "keys in lists": lambda: IndexMask(index=index(), kv_len=LENGTH),
    "one cluster": lambda: ClusterMask(
        q_index=torch.arange(LENGTH).expand(1, 1, 1, -1), k_index=torch.arange(0, LENGTH, 3).expand(1, 1, 1, -1),
        q_len=LENGTH, kv_len=LENGTH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_attention_is_dense_attention_under_the_mask(kind):
    mask, (q, k, v) = MASKS[kind](), draw()
    keep = mask.to_token_mask()
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    exact = exact.masked_fill(~keep.any(-1)[..., None], 0)
    torch.testing.assert_close(attend(q, k, v, mask), exact, atol=1e-5, rtol=1e-4)


def test_spans_take_the_length_of_the_tokens():
    plan, (q, k, v) = SpanPlan.uniform(4, sink=2, window=9), draw()
    keep = plan.to_token_mask(LENGTH, LENGTH)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, plan), exact, atol=1e-5, rtol=1e-4)


def test_a_key_that_is_named_twice_counts_once():
    mask = IndexMask(index=torch.tensor([[[[2, -1, 2, 0], [-1, -1, -1, -1]]]]), kv_len=3)
    rows = TokenCSR.from_index(mask)
    assert torch.equal(rows.to_token_mask(), mask.to_token_mask())
    assert rows.counts.flatten().tolist() == [2, 0]


def test_a_mask_goes_into_a_model_and_out_again():
    slot, (q, k, v) = AttentionSlot(4, 8), draw((4, 4))
    dense = slot(q, k, v)
    handle = sparsify(slot, blocks())
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(slot(q, k, v), exact, atol=1e-5, rtol=1e-4)
    place = {"name": "", "method": "BlockMask", "calls": 1, "tokens": LENGTH, "dense": ""}
    assert handle.report() == [place | {"density": pytest.approx(21 / 41)}]
    handle.detach()
    assert torch.equal(slot(q, k, v), dense)


def test_the_sink_is_kept_beside_columns():
    layout = Layout3D(frames=39, sink=2)
    mask = layout.keep_sink(MASKS["columns"]())
    keep = mask.to_token_mask()[0, 0]
    assert keep[:, 39:].all()
    assert keep[39:].all()
    assert keep[:16, 20].all()
    assert not keep[:16, 21].any()


def test_what_is_no_mask_is_refused():
    with pytest.raises(TypeError, match="mask: expected one of sparse_core.attention.masks, got Tensor"):
        attend(*draw(), torch.ones(LENGTH, LENGTH))
    with pytest.raises(ValueError, match="mask: expected one for 40 queries and 41 keys, got 41 and 41"):
        attend(draw()[0][:, :, :40], *draw()[1:], blocks())
