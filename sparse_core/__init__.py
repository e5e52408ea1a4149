"""Sparse computation for torch: attention over what a mask keeps, methods of many papers by name, and a meter for all.

Needs torch and numpy; the kernels for a CPU (numba) and for a GPU (Triton) are imported when they are first used.
"""

from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.layout import Layout3D
from sparse_core.attention.masks import BlockMask, IndexMask
from sparse_core.attention.slot import AttentionSlot, share_masks
from sparse_core.counters import Counter, count
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.gather_decode import decode_attention
from sparse_core.registry import get_method, list_methods, make_attention
from sparse_core.sparsify import sparsify

__all__ = [
    "AttentionSlot",
    "BlockMask",
    "Counter",
    "IndexMask",
    "KVCache",
    "Layout3D",
    "block_sparse_attention",
    "count",
    "decode_attention",
    "get_method",
    "list_methods",
    "make_attention",
    "share_masks",
    "sparsify",
]
