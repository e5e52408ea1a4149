"""Attention over compressed rows against the definition in float64: values and gradients, odd sizes, empty rows."""

import pytest
import torch
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.masks import TokenCSR
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.csr_attention import csr_attention, gather

FAST = ["numba", "gather"]
CASES = {  # q shape, kv shape, share of kept keys, samples and heads of the mask
    "plain": ((1, 2, 40, 32), (1, 2, 40, 32), 0.3, (1, 2)),
    "grouped heads": ((2, 4, 33, 16), (2, 2, 51, 16), 0.4, (2, 4)),
    "one mask for all": ((2, 2, 19, 16), (2, 2, 37, 16), 0.5, (1, 1)),
    "one mask per sample": ((2, 2, 19, 16), (2, 1, 37, 16), 0.5, (2, 1)),
    "odd width": ((1, 3, 21, 7), (1, 1, 23, 7), 0.3, (1, 3)),
    "long rows": ((1, 1, 5, 48), (1, 1, 133, 48), 1.0, (1, 1)),
    "one query": ((1, 2, 1, 64), (1, 2, 70, 64), 0.5, (1, 2)),
    "nothing": ((1, 1, 6, 16), (1, 1, 9, 16), 0.0, (1, 1)),
}


def draw(case, dtype=torch.float32):
    q_shape, kv_shape, share, lead = CASES[case]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in (q_shape, kv_shape, kv_shape))
    mask = torch.rand(*lead, q_shape[2], kv_shape[2], generator=generator) < share
    mask[:, :, 2:4] = False
    return [x.requires_grad_() for x in (q, k, v)], TokenCSR.from_token_mask(mask)


def run(case, implementation, dtype=torch.float32):
    """Output, log-sum-exp where it is finite, and gradients of both."""
    (q, k, v), mask = draw(case, dtype)
    out, lse = csr_attention(q, k, v, mask, return_lse=True, implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator) for x in (out, lse)]
    known = lse.detach() > -torch.inf
    ((out.float() * weights[0]).sum() + (lse[known] * weights[1][known]).sum()).backward()
    return [x.float() for x in (out.detach(), lse.detach(), q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_float64(case, implementation):
    exact = run(case, "reference", torch.float64)
    for name, mine, theirs in zip(
        ("out", "lse", "dq", "dk", "dv"), run(case, implementation), exact, strict=True
    ):
        torch.testing.assert_close(
            mine, theirs, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_all_four_ways_agree_on_one_mask(case):
    (q, k, v), mask = draw(case)
    ways = {name: csr_attention(q, k, v, mask, implementation=name) for name in ("reference", *FAST)}
    ways["blocks"] = block_sparse_attention(q, k, v, mask.to_block_mask(16))
    dense = F.scaled_dot_product_attention(q, k, v, mask.to_token_mask(), enable_gqa=True).nan_to_num(0)
    for name, out in ways.items():
        torch.testing.assert_close(
            out, dense, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_rows_without_keys_give_zero_and_no_gradient(implementation):
    (q, k, v), mask = draw("plain")
    out, lse = csr_attention(q, k, v, mask, return_lse=True, implementation=implementation)
    out.square().sum().backward()
    assert (out[:, :, 2:4] == 0).all()
    assert (lse[:, :, 2:4] == -torch.inf).all()
    assert (q.grad[:, :, 2:4] == 0).all()
    assert q.grad[:, :, 4:].abs().sum() > 0


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_float32_statistics(implementation, dtype):
    (q, k, v), mask = draw("grouped heads", dtype)
    out, lse = csr_attention(q, k, v, mask, return_lse=True, implementation=implementation)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for mine, theirs in zip(
        run("grouped heads", implementation, dtype),
        run("grouped heads", "reference", torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=6e-2, rtol=3e-2)


@pytest.mark.parametrize("implementation", FAST)
def test_keys_that_no_row_names_are_never_read(implementation):
    (q, k, v), _ = draw("plain")
    mask = torch.zeros(1, 2, 40, 40, dtype=torch.bool)
    mask[..., ::3] = True
    with torch.no_grad():
        for x in (k, v):
            x[:, :, 1::3] = torch.nan
    out = csr_attention(q, k, v, TokenCSR.from_token_mask(mask), implementation=implementation)
    out.sum().backward()
    assert out.isfinite().all()
    assert q.grad.isfinite().all()
    assert (k.grad[:, :, 1::3] == 0).all()


@pytest.mark.parametrize("implementation", FAST)
def test_a_nan_among_the_kept_keys_shows(implementation):
    (q, k, v), _ = draw("plain")
    with torch.no_grad():
        k[0, 0, 5, 3] = torch.nan
    everything = TokenCSR.from_token_mask(torch.ones(1, 1, 40, 40, dtype=torch.bool))
    out = csr_attention(q, k, v, everything, implementation=implementation)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


@pytest.mark.parametrize("implementation", FAST)
def test_large_scores_do_not_overflow(implementation):
    (q, k, v), mask = draw("long rows")
    q, k = (100 * x.detach() for x in (q, k))
    ours, exact = (
        csr_attention(q, k, v, mask, implementation=name) for name in (implementation, "reference")
    )
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", FAST)
def test_the_scale_may_be_given(implementation):
    (q, k, v), _ = draw("plain")
    everything = TokenCSR.from_token_mask(torch.ones(1, 1, 40, 40, dtype=torch.bool))
    ours = csr_attention(q, k, v, everything, scale=0.7, implementation=implementation)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, scale=0.7), atol=2e-6, rtol=1e-5)


def test_rows_in_several_helpings_are_the_same(monkeypatch):
    whole = run("grouped heads", "gather")
    monkeypatch.setattr(gather, "GATHERED", 16 * 40)
    for mine, theirs in zip(run("grouped heads", "gather"), whole, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_several_threads_give_what_one_gives(monkeypatch):
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("SPARSE_CORE_THREADS", threads)
        results.append(run("grouped heads", "numba"))
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_the_counter_counts_kept_pairs():
    (q, k, v), mask = draw("one mask for all")
    with counters.count() as counter:
        csr_attention(q, k, v, mask)
    pairs = 2 * 2 * int(mask.to_token_mask().sum())
    assert counter.products == pairs
    assert counter.multiply_adds == 2 * 16 * pairs
    assert counter.kv_bytes == 2 * 16 * 4 * pairs


REFUSED = {
    r"q, k, v: expected \[B, H, T, D\], got": lambda q, k, v, m: (q[0], k, v, m),
    "mask: expected one for 39 queries and 40 keys, got 40 and 40": lambda q, k, v, m: (q[:, :, 1:], k, v, m),
    "mask: expected 1 or 1 samples and 1 or 4 heads, got 1 and 2": lambda q, k, v, m: (
        q.repeat(1, 2, 1, 1),
        k,
        v,
        m,
    ),
    "q, k, v: expected one floating dtype": lambda q, k, v, m: (q, k.double(), v, m),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused(sentence):
    (q, k, v), mask = draw("plain")
    with pytest.raises(ValueError, match=sentence):
        csr_attention(*REFUSED[sentence](q, k, v, mask))


def test_another_kind_of_mask_is_refused():
    q = torch.zeros(1, 1, 4, 8)
    blocks = TokenCSR.from_token_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool)).to_block_mask(4)
    with pytest.raises(
        TypeError, match="mask: expected a TokenCSR, got BlockMask; .*attend takes every kind"
    ):
        csr_attention(q, q, q, blocks)


@pytest.mark.parametrize("implementation", ["reference", "numba", "gather"])
def test_no_samples_give_no_samples(implementation):
    q = torch.zeros(0, 1, 4, 8, requires_grad=True)
    mask = TokenCSR.from_token_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool))
    out = csr_attention(q, q, q, mask, implementation=implementation)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 1, 4, 8)


@pytest.mark.parametrize("implementation", ["reference", "numba", "gather"])
def test_large_equal_scores_share_the_values(implementation):
    """float32 knows the log-sum-exp of such scores to 0.03 at most; weights must not come from it."""
    v = torch.randn(1, 1, 32, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q, k = torch.ones_like(v), torch.full_like(v, 1e6 / 8)
    mask = TokenCSR.from_token_mask(torch.ones(1, 1, 32, 32, dtype=torch.bool))
    out = csr_attention(q, k, v, mask, implementation=implementation)
    out.sum().backward()
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(v.grad, torch.ones_like(v), atol=1e-5, rtol=0)


def test_an_unknown_implementation_is_refused():
    (q, k, v), mask = draw("plain")
    with pytest.raises(
        ValueError, match="implementation: expected auto or one of reference, numba, gather, got 'cuda'"
    ):
        csr_attention(q, k, v, mask, implementation="cuda")
