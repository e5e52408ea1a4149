"""Attention within clusters against the definition, and against dense attention under the mask of each cluster."""

import pytest
import torch
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.masks import ClusterMask
from sparse_core.kernels.segment_attention import gather, segment_attention

CASES = {  # B, Hq, Hkv, T, D, C, w, options
    "plain": (1, 2, 2, 20, 16, 4, 5, {}),
    "causal": (2, 2, 2, 23, 16, 4, 6, {"causal": True}),
    "shared": (1, 3, 3, 17, 8, 3, 6, {"causal": True, "skip_self": True}),
    "shared, looking ahead": (1, 1, 1, 9, 8, 2, 5, {"skip_self": True}),
    "grouped": (2, 4, 2, 31, 24, 5, 7, {"causal": True}),
    "one token each": (1, 2, 2, 8, 8, 8, 1, {"causal": True, "skip_self": True}),
    "everything": (1, 1, 1, 13, 8, 1, 13, {"causal": True}),
}


def pick(b, h, c, w, length, generator):
    """Tokens of each cluster in order of position, some places empty, and all of the first of many clusters."""
    index = torch.rand(b, h, c, length, generator=generator).argsort(-1)[..., :w].sort(-1).values
    if w > 3:
        index[..., -1] = -1
    if c > 2:
        index[:, :, 0] = -1
    return index


def draw(case, dtype=torch.float32):
    b, hq, hkv, length, d, c, w, options = CASES[case]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(b, h, length, d, generator=generator).to(dtype).requires_grad_() for h in (hq, hkv, hkv)
    )
    q_index = pick(b, hq, c, w, length, generator)
    k_index = q_index if options.get("skip_self") else pick(b, hq, c, w, length, generator)
    return q, k, v, ClusterMask(q_index=q_index, k_index=k_index, q_len=length, kv_len=length, **options)


def dense(q, k, v, mask):
    """Mean over clusters of dense attention under the mask of each."""
    total, times = 0, 0
    for kept in mask.to_token_masks().unbind(2):
        some = kept.any(-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=kept | ~some, enable_gqa=True)
        total, times = total + out * some, times + some.float()
    return total / times.clamp_min(1)


@pytest.mark.parametrize("implementation", ["reference", "gather"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_dense_attention_per_cluster(case, implementation):
    q, k, v, mask = draw(case)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    ours = segment_attention(q, k, v, mask, implementation=implementation)
    exact = dense(q, k, v, mask)
    torch.testing.assert_close(ours, exact, atol=3e-6, rtol=1e-5)
    for found, expected in zip(
        *(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, exact)), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_token_masks_are_the_rule_pair_by_pair(case):
    *_, mask = draw(case)
    masks = mask.to_token_masks()
    for b, h, c in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).reshape(-1, 3).tolist():
        queries, keys = ({int(t) for t in x[b, h, c] if t >= 0} for x in (mask.q_index, mask.k_index))
        for i in range(mask.q_len):
            seen = {j for j in keys if i in queries and (j <= i or not mask.causal)}
            if mask.skip_self and seen != {i}:
                seen -= {i}
            assert set(masks[b, h, c, i].nonzero()[:, 0].tolist()) == seen


def test_a_query_without_keys_gives_zero_and_finite_gradients():
    q, k, v = (torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    q.requires_grad_()
    index = torch.tensor([[[[0, 1]]]]), torch.tensor([[[[1, 3]]]])
    mask = ClusterMask(q_index=index[0], k_index=index[1], q_len=4, kv_len=4, causal=True)
    out = segment_attention(q, k, v, mask)
    assert (out[0, 0, [0, 2, 3]] == 0).all()
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, 1])
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.isfinite().all()


def test_what_is_not_named_never_reaches_the_sums():
    q, k, v, mask = draw("causal")
    named = torch.zeros(2, 2, 24, dtype=torch.bool).scatter_(-1, mask.k_index.flatten(2) % 24, True)[..., :23]
    assert not named.all()
    with torch.no_grad():
        clean = segment_attention(q, k, v, mask)
        k[~named] = torch.nan
        v[~named] = torch.nan
        assert torch.equal(segment_attention(q, k, v, mask), clean)


def test_clusters_in_parts_are_those_in_one_go(monkeypatch):
    q, k, v, mask = draw("grouped")
    whole = segment_attention(q, k, v, mask)
    monkeypatch.setattr(gather, "SCORES", 1)
    torch.testing.assert_close(segment_attention(q, k, v, mask), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_was(dtype):
    q, k, v, mask = draw("causal", dtype)
    ours = segment_attention(q, k, v, mask)
    assert ours.dtype == dtype
    torch.testing.assert_close(
        ours, segment_attention(q, k, v, mask, implementation="reference"), atol=2e-2, rtol=2e-2
    )


def test_one_mask_serves_all_samples_and_heads():
    q, k, v = (torch.randn(3, 2, 12, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    index = torch.arange(12).view(1, 1, 3, 4)
    mask = ClusterMask(q_index=index, k_index=index, q_len=12, kv_len=12)
    blocks = (x.unflatten(2, (3, 4)) for x in (q, k, v))
    exact = F.scaled_dot_product_attention(*blocks).flatten(2, 3)
    torch.testing.assert_close(segment_attention(q, k, v, mask), exact, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "gather"])
def test_no_samples_give_no_samples(implementation):
    index = torch.arange(6).view(1, 1, 2, 3).expand(0, 2, -1, -1)
    q = torch.zeros(0, 2, 6, 8, requires_grad=True)
    out = segment_attention(
        q, q, q, ClusterMask(q_index=index, k_index=index, q_len=6, kv_len=6), implementation=implementation
    )
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 2, 6, 8)


def test_float64_is_not_rounded():
    q, k, v, mask = draw("causal", torch.float64)
    torch.testing.assert_close(segment_attention(q, k, v, mask), dense(q, k, v, mask), atol=1e-13, rtol=1e-12)


def test_work_is_that_of_the_kept_pairs():
    q, k, v, mask = draw("grouped")
    pairs, keys = int(mask.to_token_masks().sum()), int((mask.k_index >= 0).sum())
    with counters.count() as counter:
        segment_attention(q, k, v, mask)
    assert (counter.products, counter.multiply_adds) == (pairs, 2 * pairs * 24)
    assert counter.kv_bytes == 2 * keys * 24 * 4
    assert mask.density() == pytest.approx(pairs / (2 * 4 * 31 * 32 / 2))


def test_nothing_as_large_as_all_pairs_is_kept_for_the_backward_pass():
    sizes = []
    q, k, v = (torch.randn(1, 1, 1024, 8, requires_grad=True) for _ in range(3))
    index = torch.arange(1024).view(1, 1, 32, 32)
    mask = ClusterMask(q_index=index, k_index=index, q_len=1024, kv_len=1024, causal=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        segment_attention(q, k, v, mask).sum().backward()
    assert sizes
    assert max(sizes) <= 1024 * 32


def test_bad_inputs():
    q, k, v, mask = draw("plain")
    index = torch.zeros(1, 1, 2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="mask: expected one for 19 queries and 20 keys, got 20 and 20"):
        segment_attention(q[:, :, 1:], k, v, mask)
    with pytest.raises(
        ValueError, match="implementation: expected auto or one of reference, gather, got 'x'"
    ):
        segment_attention(q, k, v, mask, implementation="x")
    with pytest.raises(ValueError, match=r"q_index, k_index: expected \[B, H, C, w\] and \[B, H, C, u\]"):
        ClusterMask(q_index=index, k_index=index[:, :, :1], q_len=4, kv_len=4)
    with pytest.raises(ValueError, match="k_index: expected tokens 0 to 3, got 4"):
        ClusterMask(q_index=index, k_index=index + 4, q_len=4, kv_len=4)
