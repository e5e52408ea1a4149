"""The meter: what it counts, and of what."""

import pytest
import torch

from sparse_core import counters
from sparse_core.attention.masks import BlockMask, IndexMask, TokenCSR
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.csr_attention import csr_attention
from sparse_core.kernels.gather_decode import decode_attention


def draw(length=256):
    return [x.requires_grad_() for x in torch.zeros(3, 1, 2, length, 16).unbind()]


def local(length=256):
    return BlockMask.from_dense_blocks(
        torch.eye(length // 64, dtype=torch.bool), block_size=64, q_len=length, kv_len=length
    )


@pytest.mark.parametrize("length", [256, 512])
def test_only_a_dense_kernel_holds_all_scores_at_once(length):
    peaks = {}
    for name in ("reference", "gather", "numba"):
        with counters.count() as counter:
            block_sparse_attention(*draw(length), local(length), implementation=name)
        peaks[name] = counter.peak_tile_bytes
    assert peaks["reference"] == 2 * length * length * 4
    assert peaks["gather"] == 2 * length * 64 * 4
    assert peaks["numba"] == 64 * 64 * 4


def test_the_peak_is_the_highest_and_of_the_innermost_kernel():
    q, k, v = (x.detach() for x in draw())
    rows = TokenCSR.from_token_mask(local().to_token_mask())
    keys = IndexMask(index=torch.arange(10).expand(1, 2, 1, 10), kv_len=256)
    with counters.count() as both:
        with counters.count() as counter:
            csr_attention(q, k, v, rows)
        assert counter.peak_tile_bytes == 64 * 4
        with counters.count() as counter:
            decode_attention(q[:, :, :1], (k, v), keys)
        assert counter.peak_tile_bytes == 2 * 10 * 4
    assert both.peak_tile_bytes == 64 * 4


@pytest.mark.parametrize("implementation", ["numba", "gather"])
def test_a_backward_pass_is_not_counted(implementation):
    with counters.count() as counter:
        out = block_sparse_attention(*draw(), local(), implementation=implementation)
        forward = (counter.multiply_adds, counter.products, counter.kv_bytes)
        out.sum().backward()
    assert (counter.multiply_adds, counter.products, counter.kv_bytes) == forward
    assert counter.multiply_adds == 2 * 16 * 2 * 4 * 64 * 64


def test_what_a_backward_pass_needs_is_counted_when_asked():
    q, k, v = draw()
    with counters.count() as counter:
        block_sparse_attention(q, k, v, local())
    assert counter.saved_bytes == 0
    row = 2 * 256 * 4
    with counters.count(saved=True) as counter, torch.no_grad():
        block_sparse_attention(q, k, v, local())
    assert counter.saved_bytes == 0
    with counters.count(saved=True) as counter:
        out = block_sparse_attention(q, k, v, local(), implementation="numba")
    # q, k and v lie in one piece of memory; the output has padded rows of 32; and two numbers per query.
    assert counter.saved_bytes == (3 * 16 + 32 + 2) * row
    with counters.count(saved=True) as counter:
        block_sparse_attention(q, k, v, local(), implementation="reference")
    assert counter.saved_bytes > 2 * 256 * 256 * 4
    out.sum().backward()
    torch.testing.assert_close(v.grad, torch.ones_like(v))


def test_counting_what_is_saved_changes_no_gradient_and_lets_go_of_it():
    gradients = []
    for saved in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        with counters.count(saved=saved) as counter:
            layer(torch.randn(5, 8)).exp().sum().backward()
        gradients.append([x.grad for x in layer.parameters()])
        # Inputs, what the ReLU gives, both weights of which a gradient is needed, the output: 5 x (8 + 16 + 1), 16.
        assert counter.saved_bytes == (4 * (5 * (8 + 16 + 1) + 16) if saved else 0)
    for ours, exact in zip(*gradients, strict=True):
        assert torch.equal(ours, exact)


def test_a_tensor_that_changed_is_noticed_while_counting():
    x = torch.ones(3, requires_grad=True)
    with counters.count(saved=True):
        y = x * 2
        z = y.square()
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
