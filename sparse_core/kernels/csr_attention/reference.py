"""The definition of attention over compressed rows of keys: that of blocks, since both begin by writing the mask out.
Every other implementation must agree."""

from sparse_core.kernels.block_attention.reference import attend

__all__ = ["attend"]
