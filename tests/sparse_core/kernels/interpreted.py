"""Run the Triton kernels on the CPU, in Triton's interpreter, against the definition. Prints one line per case.

A program of its own, since TRITON_INTERPRET must be set before triton is imported.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import runpy
from pathlib import Path

import torch

CASES = ("one tile", "ragged", "grouped heads", "odd width", "causal", "token rule", "empty rows", "nothing")


def main() -> None:
    torch.set_num_threads(1)
    run = runpy.run_path(str(Path(__file__).with_name("test_block_attention.py")))["run"]
    for case in CASES:
        for ours, exact in zip(run(case, "triton"), run(case, "reference"), strict=True):
            torch.testing.assert_close(ours, exact, atol=3e-5, rtol=1e-4)
        print("agrees:", case, flush=True)


if __name__ == "__main__":
    main()
