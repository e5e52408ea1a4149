"""Every figure that takes a GPU, in one go; says so and ends well where there is none.

    python -m benchmarks.gpu

Block-sparse attention at 16k tokens and decoding at 32k against torch's kernels by name and compiled flex_attention, then
how fast the world model trains and imagines. Most of the time goes into tuning flex_attention.
"""

from __future__ import annotations

import torch

from benchmarks import throughput
from benchmarks.speed import attention, decode

DEVICE = "cuda"
ATTENTION = [
    attention.Attention(
        lengths=(16384,), block=block, heads=16, width=128, repeats=10, device=DEVICE,
        rivals=("sdpa", "flash", "cudnn", "flex"), case=f"speed/gpu_attention_{block}",
    )
    for block in (64, 128)
]  # fmt: skip
DECODE = decode.Decode(
    batch=8, heads=32, repeats=24, device=DEVICE, case="speed/gpu_decode",
    dense=("sdpa", "flash", "cudnn", "flex", "products", "own_dense"),
)  # fmt: skip


def main() -> None:
    """Measure everything."""
    if not torch.cuda.is_available():
        print("bench-gpu: nothing was measured, since no CUDA device is visible")
        return
    for settings in ATTENTION:
        attention.main(settings)
    decode.main(DECODE)
    throughput.main(throughput.Throughput(device=DEVICE))


if __name__ == "__main__":
    main()
