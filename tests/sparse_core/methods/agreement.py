"""Every mask that a method makes, through four implementations: numba, Triton in its interpreter, flex, the definition.

A program of its own, since TRITON_INTERPRET must be set before triton is imported. Prints one line per mask.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import runpy
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import flex_attention

from sparse_core import BlockMask, block_sparse_attention

LENGTH = 37  # ragged: three blocks of 16


def check(name, keep, contract):
    """One mask bool [B, H, Tq, T]: outputs, and gradients where there is a backward pass."""
    b, h, tq, tk = keep.shape
    q, k, v = contract["draw"](tk, h, b, seed=3)
    q = q[:, :, -tq:].contiguous()
    mask = BlockMask.from_rule(
        lambda b, h, i, j: keep[b, h, i, j], q_len=tq, kv_len=tk, block_size=16, batch=b, heads=h
    )
    assert torch.equal(mask.to_token_mask(), keep), name
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(4))
    exact = run(q, k, v, mask, weight, "reference")
    for implementation in ("numba", "gather", "triton"):
        for ours, theirs in zip(run(q, k, v, mask, weight, implementation), exact, strict=True):
            torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)
    flex = flex_attention(q, k, v, block_mask=mask.to_torch())
    torch.testing.assert_close(flex, exact[0], atol=2e-5, rtol=1e-4)
    print("agrees:", name, flush=True)


def run(q, k, v, mask, weight, implementation):
    """Output and gradients."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*inputs, mask, implementation=implementation)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)


def main() -> None:
    torch.set_num_threads(1)
    contract = runpy.run_path(str(Path(__file__).with_name("contract.py")))
    for name, keep in contract["token_masks"](LENGTH).items():
        check(name, keep[:1, :2].contiguous(), contract)


if __name__ == "__main__":
    main()
