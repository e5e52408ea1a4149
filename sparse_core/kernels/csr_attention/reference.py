"""The definition of attention over compressed rows of keys: that of blocks, since a mask written out is a mask written out.
Every other implementation must agree."""

from sparse_core.kernels.block_attention.reference import attend

__all__ = ["attend"]
