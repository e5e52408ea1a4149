"""Rows of numbers in four bits each: the bytes that every implementation reads."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(x: Tensor) -> Tensor:
    """Rows [.., r] in four bits each, between the row's least and largest: uint8 [.., 4 + ceil(r / 2)], of which the first
    four bytes are the least and the step in float16, and every other byte holds two codes, the earlier one high."""
    low = x.amin(-1, keepdim=True).half()
    step = ((x.amax(-1, keepdim=True) - low.float()) / 15).half()
    codes = (
        torch.where(step > 0, (x - low.float()) / step.float().clamp_min(1e-8), 0)
        .round()
        .clamp(0, 15)
        .to(torch.uint8)
    )
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    head = torch.cat([low, step], -1).contiguous().view(torch.uint8)
    return torch.cat([head, codes[..., ::2] * 16 + codes[..., 1::2]], -1)


def dequantise(packed: Tensor, r: int) -> Tensor:
    """Rows [.., r] of what `quantise` made."""
    head = packed[..., :4].contiguous().view(torch.float16).float()
    codes = torch.stack([packed[..., 4:] // 16, packed[..., 4:] % 16], -1).flatten(-2)[..., :r]
    return head[..., :1] + head[..., 1:] * codes
