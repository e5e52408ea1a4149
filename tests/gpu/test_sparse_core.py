"""Sparse attention on a CUDA device, held against the definition on the CPU."""

import runpy
from pathlib import Path

import pytest
import torch

from sparse_core import BlockMask, IndexMask, block_sparse_attention, decode_attention
from sparse_core.attention.masks import causal

pytestmark = pytest.mark.gpu
contract = runpy.run_path(str(Path(__file__).parents[1] / "sparse_core" / "methods" / "contract.py"))
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}  # matrix units round float32 to ten bits


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_the_triton_kernels_agree_with_the_definition(dtype, width, block):
    generator = torch.Generator().manual_seed(0)
    length, results = 500, []
    q, k, v, grad = (torch.randn(2, h, length, width, generator=generator).to(dtype) for h in (4, 2, 2, 4))
    mask = BlockMask.from_rule(causal, q_len=length, kv_len=length, block_size=block)
    for device, implementation in (("cpu", "reference"), ("cuda", "triton")):
        inputs = [x.to(device).requires_grad_() for x in (q, k, v)]
        out = block_sparse_attention(*inputs, mask.to(device), implementation=implementation)
        found = (out, *torch.autograd.grad(out, inputs, grad.to(device)))
        results.append([x.detach().float().cpu() for x in found])
    for ours, exact in zip(results[1], results[0], strict=True):
        assert (ours - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [40, 64, 128])
@pytest.mark.parametrize(("heads", "lists"), [(2, 2), (8, 2), (8, 8), (80, 2)])
def test_decoding_agrees_with_the_definition(dtype, width, heads, lists):
    """One query for each list and many; lists cut into many parts, one of them empty; a head without keys."""
    generator = torch.Generator().manual_seed(0)
    length, count, results = 3000, 1100, []
    q, k, v = (
        torch.randn(2, h, n, width, generator=generator).to(dtype)
        for h, n in ((heads, 1), (2, length), (2, length))
    )
    index = torch.randint(-1, length, (2, lists, 1, count), generator=generator)
    index[0, 0, :, 300:700] = -1
    index[1, 1] = -1
    for device, implementation in (("cpu", "reference"), ("cuda", "triton")):
        selection = IndexMask(index=index.to(device), kv_len=length)
        inputs = [x.to(device) for x in (q, k, v)]
        found = decode_attention(
            inputs[0], (inputs[1], inputs[2]), selection, return_lse=True, return_scores=True,
            implementation=implementation,
        )  # fmt: skip
        assert [x.dtype for x in found] == [dtype, torch.float32, torch.float32]
        results.append([x.float().cpu() for x in found])
    for ours, exact in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, exact, atol=TOLERANCE[dtype] * 0.1, rtol=TOLERANCE[dtype])


def test_decoding_reads_rows_past_the_reach_of_32_bits():
    length, near = 2**25 + 200, 100  # 2 ** 31 numbers, and some more
    k = torch.zeros(1, 1, length, 64, dtype=torch.bfloat16, device="cuda")
    k[:, :, -near:] = torch.randn(near, 64, device="cuda")
    q, last = torch.randn(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda"), k[:, :, -near:].contiguous()
    every = torch.arange(near, device="cuda")[None, None, None]
    far = IndexMask(index=every + length - near, kv_len=length)
    ours = decode_attention(q, (k, k), far, implementation="triton")
    exact = decode_attention(q, (last, last), IndexMask(index=every, kv_len=near), implementation="reference")
    torch.testing.assert_close(ours, exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", contract["LAYERS"])
def test_every_method_runs_where_its_tokens_are(name):
    layer, tokens = contract["build"](name), contract["draw"](64)
    exact = layer(*tokens)
    moved = layer.to("cuda")(*(x.cuda() for x in tokens))
    assert moved.device.type == "cuda"
    # A choice between scores that are equal but for rounding may fall the other way in a few rows.
    wrong = ((moved.cpu() - exact).abs().amax(-1) > 1e-2).float().mean()
    assert wrong < 0.05
