"""Which keys each query looks at: masks kept as lists, so that no [Tq, Tk] tensor ever exists.

Every method of `sparse_core.methods.attention` makes one of these masks, and the kernels read them.
"""

from sparse_core.attention.masks.block import BlockMask, Rule, causal
from sparse_core.attention.masks.csr import TokenCSR
from sparse_core.attention.masks.index import IndexMask

__all__ = ["BlockMask", "IndexMask", "Rule", "TokenCSR", "causal"]
