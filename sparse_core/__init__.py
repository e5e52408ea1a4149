"""Sparse computation for torch: attention over what a mask keeps, decoding over selected keys, and a meter for both.

Needs torch and numpy; the kernels for a CPU (numba) and for a GPU (Triton) are imported when they are first used.
"""

from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.masks import BlockMask, IndexMask
from sparse_core.counters import Counter, count
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.gather_decode import decode_attention

__all__ = [
    "BlockMask",
    "Counter",
    "IndexMask",
    "KVCache",
    "block_sparse_attention",
    "count",
    "decode_attention",
]
