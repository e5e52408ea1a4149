"""Run the Triton kernels on the CPU, in Triton's interpreter, against the definition. Prints one line per case.

A program of its own, since TRITON_INTERPRET must be set before triton is imported.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import runpy
from pathlib import Path
from unittest import mock

import torch

from sparse_core.attention.masks import BlockMask, causal
from sparse_core.kernels.block_attention import block_sparse_attention

CASES = ("one tile", "ragged", "grouped heads", "odd width", "causal", "token rule", "empty rows", "nothing")


def build_once() -> None:
    """Training steps over one mask make the lists of the keys in the first of them alone."""
    q, mask = torch.randn(1, 1, 64, 16, requires_grad=True), BlockMask.from_rule(causal, q_len=64, kv_len=64)
    gradients = []
    with mock.patch.object(BlockMask, "from_dense_blocks", wraps=BlockMask.from_dense_blocks) as made:
        for _ in range(3):
            out = block_sparse_attention(q, q, q, mask, implementation="triton")
            gradients.append(torch.autograd.grad(out.sum(), q)[0])
    assert made.call_count == 1
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    print("agrees: lists are made once", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    run = runpy.run_path(str(Path(__file__).with_name("test_block_attention.py")))["run"]
    for case in CASES:
        for ours, exact in zip(run(case, "triton"), run(case, "reference"), strict=True):
            torch.testing.assert_close(ours, exact, atol=3e-5, rtol=1e-4)
        print("agrees:", case, flush=True)
    build_once()


if __name__ == "__main__":
    main()
