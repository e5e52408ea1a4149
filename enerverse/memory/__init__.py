"""Sparse memory: which past frames the world model sees, in constant space."""

from enerverse.memory.policies import (
    POLICIES,
    DenseMemory,
    FifoMemory,
    MemoryPolicy,
    NoMemory,
    SparseUniformMemory,
    make_memory,
)
from enerverse.memory.state import MemoryState, push_chunk, read_context, start_memory

__all__ = [
    "POLICIES",
    "DenseMemory",
    "FifoMemory",
    "MemoryPolicy",
    "MemoryState",
    "NoMemory",
    "SparseUniformMemory",
    "make_memory",
    "push_chunk",
    "read_context",
    "start_memory",
]
