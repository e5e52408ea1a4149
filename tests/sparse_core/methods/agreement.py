"""Every mask that a method makes, as the method makes it, through every implementation of the kernels that read its kind,
against dense attention of torch under the same pairs: for blocks numba, gather, Triton in its interpreter and flex.

A program of its own, since TRITON_INTERPRET must be set before triton is imported. Prints one line per mask.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import runpy
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from sparse_core import BlockMask, IndexMask, block_sparse_attention, decode_attention
from sparse_core.attention.column_attention import column_block_attention
from sparse_core.attention.masks import ClusterMask, ColumnBlockMask, TokenCSR
from sparse_core.kernels.csr_attention import csr_attention
from sparse_core.kernels.segment_attention import segment_attention


def decode(q, k, v, mask, implementation):
    return decode_attention(q, (k, v), mask, implementation=implementation)


LENGTH = 37  # ragged: three blocks of 16
CLOSE = {"atol": 3e-5, "rtol": 1e-4}
KERNELS = {
    BlockMask: (block_sparse_attention, ("reference", "numba", "gather", "triton")),
    ColumnBlockMask: (column_block_attention, ("reference", "numba", "gather", "triton")),
    TokenCSR: (csr_attention, ("reference", "numba", "gather")),
    ClusterMask: (segment_attention, ("reference", "gather")),
    IndexMask: (decode, ("reference", "numba", "gather")),
}


def masked(q, k, v, kept):
    """Dense attention under bool [B, H, Tq, Tk], 0 for rows of nothing."""
    some = kept.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept | ~some) * some


def exact(q, k, v, mask):
    """What the mask means; of clusters, the mean over those in which a query sees a key."""
    if not isinstance(mask, ClusterMask):
        return masked(q, k, v, mask.to_token_mask())
    each = mask.to_token_masks().unbind(2)
    times = sum(kept.any(-1, keepdim=True) for kept in each)
    return sum(masked(q, k, v, kept) for kept in each) / times.clamp_min(1)


def with_gradients(attend, inputs, weight):
    """Output and gradients."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = attend(*inputs)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)


def check(name, mask, tokens):
    """Outputs, and gradients where there is a backward pass."""
    attend, implementations = KERNELS[type(mask)]
    blocks = mask.blocks if isinstance(mask, ColumnBlockMask) else mask
    if isinstance(blocks, BlockMask) and min(blocks.block_size) < 16:  # which Triton refuses
        implementations = tuple(each for each in implementations if each != "triton")
    weight = torch.randn(tokens[0].shape, generator=torch.Generator().manual_seed(4))
    wanted = with_gradients(lambda *x: exact(*x, mask), tokens, weight)
    for implementation in implementations:
        if isinstance(mask, IndexMask):  # decoding has no backward pass
            found = (attend(*tokens, mask, implementation=implementation),)
        else:
            found = with_gradients(
                lambda *x, by=implementation: attend(*x, mask, implementation=by), tokens, weight
            )
        for ours, theirs in zip(found, wanted, strict=False):
            torch.testing.assert_close(
                ours, theirs, **CLOSE, msg=lambda text, by=implementation: f"{name} by {by}: {text}"
            )
    if isinstance(mask, BlockMask):
        torch.testing.assert_close(flex_attention(*tokens, block_mask=mask.to_torch()), wanted[0], **CLOSE)
        implementations = (*implementations, "flex")
    print(f"agrees: {name} ({type(mask).__name__} by {', '.join(implementations)})", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    contract = runpy.run_path(str(Path(__file__).with_name("contract.py")))
    for name, mask, (first, last) in contract["own_masks"](LENGTH):
        tokens = [x[:, first:last] for x in contract["draw"](LENGTH, batch=1, seed=3)]
        if isinstance(mask, IndexMask):
            tokens[0] = tokens[0][:, :, -1:]
        check(name, mask, tokens)


if __name__ == "__main__":
    main()
