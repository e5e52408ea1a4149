"""Blocks of tokens as bitmaps and as index lists, and what sizes they may have."""

from __future__ import annotations

import torch
from torch import Tensor


def blocks_of(length: int, block: int) -> int:
    """Blocks of `block` tokens that `length` tokens fill, the last perhaps in part."""
    return -(-length // block)


def sizes_of(length: int, block: int) -> Tensor:
    """Tokens of each block."""
    return (length - torch.arange(blocks_of(length, block)) * block).clamp_max(block)


def check_sizes(block_size: int | tuple[int, int], q_len: int, kv_len: int) -> tuple[int, int]:
    """Block size (bq, bk). Raises ValueError for sizes that are no powers of two, and for no tokens."""
    size = tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(size) != 2 or any(not isinstance(n, int) or n < 1 or n & (n - 1) for n in size):
        raise ValueError(f"block_size: expected powers of two, got {block_size}; 64 suits every kernel")
    if q_len < 1 or kv_len < 1:
        raise ValueError(f"q_len and kv_len: expected at least one token, got {q_len} and {kv_len}")
    return size


def check_blocks(name: str, blocks: Tensor, size: tuple[int, int], q_len: int, kv_len: int) -> Tensor:
    """Blocks as [B, H, Kq, Kk]. Raises ValueError where they do not fit the lengths."""
    expected = (blocks_of(q_len, size[0]), blocks_of(kv_len, size[1]))
    if blocks.ndim < 2 or blocks.ndim > 4 or tuple(blocks.shape[-2:]) != expected:
        raise ValueError(
            f"{name}: expected {expected[0]} query blocks for {q_len} tokens and {expected[1]} key blocks for {kv_len} "
            f"tokens at block {size[0]} x {size[1]}, got {list(blocks.shape)}"
        )
    return blocks[(None,) * (4 - blocks.ndim)]


def check_kept(name: str, blocks: Tensor, size: tuple[int, int], q_len: int, kv_len: int) -> Tensor:
    """Bool blocks as [B, H, Kq, Kk]. Raises ValueError for another dtype, and as `check_blocks`."""
    if blocks.dtype != torch.bool:
        raise ValueError(
            f"{name}: expected bool, got {blocks.dtype}; compare scores, or take BlockMask.from_topk"
        )
    return check_blocks(name, blocks, size, q_len, kv_len)


def check_force(force: Tensor, scores: Tensor) -> Tensor:
    """`force` itself. Raises ValueError where it is no bool that broadcasts to `scores`."""
    try:
        fits = force.dtype == torch.bool and torch.broadcast_shapes(force.shape, scores.shape) == scores.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"force: expected bool that broadcasts to scores {list(scores.shape)}, got {force.dtype} {list(force.shape)}"
        )
    return force


def to_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, H, Kq] and ascending indices [B, H, Kq, cap] of bool [B, H, Kq, Kk]."""
    count = blocks.sum(-1)
    cap = max(1, int(count.max())) if count.numel() else 1
    order = (~blocks).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :cap]
    return count.int(), order.int().contiguous()


def to_bitmap(count: Tensor, index: Tensor, columns: int) -> Tensor:
    """bool [B, H, Kq, columns] of counts and indices; the inverse of `to_lists`."""
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    blocks = torch.zeros(*count.shape, columns + 1, dtype=torch.bool, device=index.device)
    blocks.scatter_(-1, torch.where(listed, index, columns).long(), True)
    return blocks[..., :columns]
