"""Every implementation of block-sparse attention against the definition: values and gradients, odd sizes, every dtype."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.masks import BlockMask, IndexMask, TokenCSR, causal
from sparse_core.kernels.block_attention import block_sparse_attention

FAST = ("numba", "gather")


def draw(q_shape, kv_shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (q_shape, kv_shape, kv_shape)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def random_mask(tq, tk, block, share, *, batch=1, heads=1, rule=None, empty=()):
    bq, bk = (block, block) if isinstance(block, int) else block
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand(batch, heads, -(-tq // bq), -(-tk // bk), generator=generator) < share
    for row in empty:
        blocks[:, :, row] = False
    return BlockMask.from_dense_blocks(blocks, block_size=(bq, bk), q_len=tq, kv_len=tk, rule=rule)


def striped(b, h, i, j):
    return (i + 2 * j + h) % 3 != 0


CASES = {
    "one tile": ((1, 1, 64, 64), (1, 1, 64, 64), 64, 1.0, {}),
    "ragged": ((2, 2, 200, 64), (2, 2, 173, 64), 64, 0.6, {"heads": 2, "batch": 2}),
    "grouped heads": ((2, 4, 130, 32), (2, 2, 150, 32), 64, 0.6, {"heads": 4}),
    "odd width": ((1, 2, 70, 40), (1, 2, 70, 40), 32, 0.7, {"heads": 2}),
    "wide": ((1, 2, 257, 128), (1, 2, 300, 128), (256, 32), 0.5, {"heads": 2}),
    "causal": ((1, 2, 300, 32), (1, 2, 300, 32), 128, 0.8, {"rule": causal}),
    "token rule": ((1, 3, 90, 16), (1, 3, 101, 16), 16, 0.6, {"heads": 3, "rule": striped}),
    "tiny blocks": ((1, 2, 130, 16), (1, 1, 77, 16), (32, 2), 0.4, {"heads": 2}),
    "empty rows": ((1, 2, 200, 32), (1, 2, 200, 32), 32, 0.5, {"heads": 2, "empty": (0, 3)}),
    "nothing": ((1, 1, 40, 16), (1, 1, 40, 16), 32, 0.0, {}),
    "one query": ((1, 2, 1, 64), (1, 2, 500, 64), (16, 64), 0.5, {"heads": 2}),
}


def run(case, implementation, dtype=torch.float32):
    """Output, log-sum-exp where it is finite, and gradients of both."""
    q_shape, kv_shape, block, share, options = CASES[case]
    q, k, v = draw(q_shape, kv_shape, dtype=dtype)
    mask = random_mask(q_shape[2], kv_shape[2], block, share, **options)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, implementation=implementation)
    generator = torch.Generator().manual_seed(2)
    weight, weight_lse = (
        torch.randn(out.shape, generator=generator),
        torch.randn(lse.shape, generator=generator),
    )
    known = lse.detach() > -torch.inf
    ((out.float() * weight).sum() + (lse[known] * weight_lse[known]).sum()).backward()
    return [out.detach(), lse.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_definition(case, implementation):
    names = ("out", "lse", "dq", "dk", "dv")
    for name, ours, exact in zip(names, run(case, implementation), run(case, "reference"), strict=True):
        torch.testing.assert_close(
            ours, exact, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_their_dtype_and_float32_statistics(implementation, dtype):
    ours, exact = run("ragged", implementation, dtype), run("ragged", "reference", dtype)
    assert [x.dtype for x in ours] == [dtype, torch.float32, dtype, dtype, dtype]
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(
            mine.float(), theirs.float(), atol=3e-2 if dtype.itemsize == 2 else 2e-5, rtol=2e-2
        )


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_on_a_cpu_has_exact_statistics_with_and_without_products_of_pairs(case, pairs, monkeypatch):
    """The definition is given the same bfloat16 numbers."""
    kernel = pytest.importorskip("sparse_core.kernels.block_attention.numba")
    if pairs and not kernel.PAIRS:
        pytest.skip("this processor multiplies no pairs of bfloat16")
    monkeypatch.setattr(kernel, "PAIRS", pairs)
    ours, exact = run(case, "numba", torch.bfloat16), run(case, "reference", torch.bfloat16)
    torch.testing.assert_close(ours[1], exact[1], atol=2e-5, rtol=1e-5)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), atol=3e-2, rtol=2e-2)


def test_bfloat16_rows_lie_in_pairs():
    """An odd number of tokens: the last pair has nothing beside it."""
    kernel = pytest.importorskip("sparse_core.kernels.block_attention.numba")
    x = torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = kernel._Rows(x, 2)
    down = torch.from_numpy(rows.down.view("int16")).view(torch.bfloat16).view(2, 3, 32, 2)
    assert torch.equal(down[:, :, :3, 0], x[0, :, 0::2])
    assert torch.equal(down[:, :2, :3, 1], x[0, :, 1::2])
    assert (down[:, 2, :, 1] == 0).all()
    assert (down[:, :, 3:] == 0).all()


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_a_mask_of_everything_is_dense_attention(implementation):
    q, k, v = draw((1, 2, 100, 32), (1, 2, 100, 32))
    ours = block_sparse_attention(q, k, v, random_mask(100, 100, 64, 2.0), implementation=implementation)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_the_scale_may_be_given(implementation):
    q, k, v = draw((1, 1, 50, 16), (1, 1, 50, 16))
    ours = block_sparse_attention(
        q, k, v, random_mask(50, 50, 16, 2.0), scale=0.7, implementation=implementation
    )
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, scale=0.7), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", FAST)
def test_keys_of_dropped_blocks_are_never_read(implementation):
    """They hold NaN, and so do the gradients of nothing."""
    q, k, v = draw((1, 1, 128, 32), (1, 1, 192, 32))
    mask = BlockMask.from_dense_blocks(
        torch.tensor([[True, False, True], [True, False, False]]), block_size=64, q_len=128, kv_len=192
    )
    with torch.no_grad():
        k[:, :, 64:128], v[:, :, 64:128] = torch.nan, torch.nan
    out = block_sparse_attention(q, k, v, mask, implementation=implementation)
    out.sum().backward()
    assert out.isfinite().all()
    assert q.grad.isfinite().all()
    assert (k.grad[:, :, 64:128] == 0).all()
    assert k.grad[:, :, :64].abs().sum() > 0


@pytest.mark.parametrize("implementation", FAST)
def test_a_nan_among_the_kept_keys_shows(implementation):
    q, k, v = draw((1, 1, 64, 32), (1, 1, 64, 32))
    with torch.no_grad():
        k[0, 0, 5, 3] = torch.nan
    assert (
        block_sparse_attention(q, k, v, random_mask(64, 64, 64, 2.0), implementation=implementation)
        .isnan()
        .all()
    )


def test_large_scores_do_not_overflow():
    q, k, v = (100 * x.detach() for x in draw((1, 1, 70, 32), (1, 1, 70, 32)))
    ours = block_sparse_attention(q, k, v, random_mask(70, 70, 64, 2.0), implementation="numba")
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("logit", [1e3, 1e5, 1e6])
@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_large_equal_scores_share_the_values(implementation, logit):
    """float32 knows the log-sum-exp of such scores to 0.03 at most; weights must not come from it."""
    _, _, v = draw((1, 1, 64, 64), (1, 1, 64, 64))
    q, k = torch.ones(1, 1, 64, 64, requires_grad=True), torch.full((1, 1, 64, 64), logit / 8)
    mask = random_mask(64, 64, 64, 2.0)
    out = block_sparse_attention(q, k.requires_grad_(), v, mask, implementation=implementation)
    out.sum().backward()
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(v.grad, torch.ones_like(v), atol=1e-5, rtol=0)


def test_several_threads_give_what_one_gives(monkeypatch):
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("SPARSE_CORE_THREADS", threads)
        results.append(run("ragged", "numba"))
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_double_runs_are_bit_for_bit_equal():
    assert all(torch.equal(a, b) for a, b in zip(run("causal", "numba"), run("causal", "numba"), strict=True))


def test_the_counter_counts_kept_pairs_and_bytes():
    q, k, v = draw((1, 2, 128, 32), (1, 2, 192, 32))
    blocks = torch.tensor([[True, False, True], [False, False, False]])
    mask = BlockMask.from_dense_blocks(blocks, block_size=64, q_len=128, kv_len=192)
    with counters.count() as counter:
        block_sparse_attention(q, k, v, mask)
    assert counter.products == 2 * 64 * 128
    assert counter.multiply_adds == 2 * 32 * counter.products
    assert counter.kv_bytes == 2 * 2 * 128 * 32 * 4


def test_work_follows_density():
    q, k, v = draw((1, 1, 512, 16), (1, 1, 512, 16))
    seen = []
    for share in (0.1, 0.3, 0.6, 1.0):
        with counters.count() as counter:
            block_sparse_attention(q, k, v, random_mask(512, 512, 32, share))
        seen.append(counter.products)
    assert all(a < b for a, b in pairwise(seen))
    assert seen[-1] == 512 * 512


REFUSED = {
    r"q, k, v: expected \[B, H, T, D\], got": lambda q, k, v, m: (q[0], k, v, m),
    r"k, v: expected both \[1, H, T, 16\]": lambda q, k, v, m: (q, k, v[:, :, 1:], m),
    "heads: expected a multiple of the 3 key-value heads": lambda q, k, v, m: (
        q, k[:, :1].expand(-1, 3, -1, -1), v[:, :1].expand(-1, 3, -1, -1), m,
    ),
    "mask: expected one for 63 queries and 64 keys, got 64 and 64": lambda q, k, v, m: (q[:, :, 1:], k, v, m),
    "mask: expected 1 or 1 samples and 1 or 2 heads, got 1 and 3": lambda q, k, v, m: (
        q, k, v, random_mask(64, 64, 64, 1.0, heads=3),
    ),
    r"k, v: expected at least one head and one channel, got 0 and 16 in \[1, 0, 64, 16\]": lambda q, k, v, m: (
        q, k[:, :0], v[:, :0], m,
    ),
    "k, v: expected at least one head and one channel, got 2 and 0": lambda q, k, v, m: (
        q[..., :0], k[..., :0], v[..., :0], m,
    ),
    "q, k, v: expected one floating dtype": lambda q, k, v, m: (q, k.double(), v, m),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused(sentence):
    q, k, v = (x.detach() for x in draw((1, 2, 64, 16), (1, 2, 64, 16)))
    with pytest.raises(ValueError, match=sentence):
        block_sparse_attention(*REFUSED[sentence](q, k, v, random_mask(64, 64, 64, 1.0)))


@pytest.mark.parametrize(
    "other",
    [
        None,
        torch.ones(64, 64, dtype=torch.bool),
        IndexMask(index=torch.zeros(1, 1, 64, 1, dtype=torch.long), kv_len=64),
        TokenCSR.from_token_mask(torch.ones(1, 1, 64, 64, dtype=torch.bool)),
    ],
    ids=lambda other: type(other).__name__,
)
def test_another_kind_of_mask_is_refused(other):
    q, k, v = draw((1, 1, 64, 16), (1, 1, 64, 16))
    with pytest.raises(TypeError, match=f"mask: expected a BlockMask, got {type(other).__name__}; .*attend"):
        block_sparse_attention(q, k, v, other)
    with pytest.raises(TypeError, match="q, k, v: expected tensors, got ndarray, Tensor, Tensor"):
        block_sparse_attention(q.detach().numpy(), k, v, random_mask(64, 64, 64, 1.0))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_no_samples_give_no_samples(implementation):
    inputs = draw((0, 2, 64, 16), (0, 2, 64, 16))
    out = block_sparse_attention(*inputs, random_mask(64, 64, 32, 0.5), implementation=implementation)
    assert out.shape == (0, 2, 64, 16)
    out.sum().backward()
    assert inputs[0].grad.shape == (0, 2, 64, 16)


def test_an_unknown_implementation_is_refused():
    q, k, v = draw((1, 1, 64, 16), (1, 1, 64, 16))
    with pytest.raises(ValueError, match="implementation: expected auto or one of reference, numba"):
        block_sparse_attention(q, k, v, random_mask(64, 64, 64, 1.0), implementation="cuda")


def test_triton_without_its_interpreter_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = draw((1, 1, 64, 16), (1, 1, 64, 16))
    with pytest.raises(ValueError, match="implementation: expected one for tensors on the cpu, got 'triton'"):
        block_sparse_attention(q, k, v, random_mask(64, 64, 64, 1.0), implementation="triton")


def test_the_triton_kernels_agree_in_the_interpreter():
    """Arithmetic only, and small: the interpreter needs about ten milliseconds per tile."""
    program = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees:") == 9
