"""Which keys each query looks at: masks kept as lists, so that no [Tq, Tk] tensor ever exists.

Every method of `sparse_core.methods.attention` makes one of these masks, and the kernels read them.
"""

from sparse_core.attention.masks.block import BlockMask, causal
from sparse_core.attention.masks.clusters import ClusterMask
from sparse_core.attention.masks.column import ColumnBlockMask
from sparse_core.attention.masks.csr import TokenCSR
from sparse_core.attention.masks.index import IndexMask
from sparse_core.attention.masks.patterns import Rule
from sparse_core.attention.masks.span import SpanPlan
from sparse_core.attention.masks.window import window_mask

__all__ = [
    "BlockMask",
    "ClusterMask",
    "ColumnBlockMask",
    "IndexMask",
    "Rule",
    "SpanPlan",
    "TokenCSR",
    "causal",
    "window_mask",
]
