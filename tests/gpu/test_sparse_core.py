"""Sparse attention on a CUDA device, held against the definition on the CPU."""

import runpy
from pathlib import Path

import pytest
import torch

from sparse_core import BlockMask, block_sparse_attention
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


@pytest.mark.parametrize("name", contract["LAYERS"])
def test_every_method_runs_where_its_tokens_are(name):
    layer, tokens = contract["build"](name), contract["draw"](64)
    exact = layer(*tokens)
    moved = layer.to("cuda")(*(x.cuda() for x in tokens))
    assert moved.device.type == "cuda"
    # A choice between scores that are equal but for rounding may fall the other way in a few rows.
    wrong = ((moved.cpu() - exact).abs().amax(-1) > 1e-2).float().mean()
    assert wrong < 0.05
