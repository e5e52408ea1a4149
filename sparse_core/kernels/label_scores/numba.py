"""Scores of packed labels on a CPU, without unpacking them: a byte holds two codes and has 256 values, so what it adds to
a score is looked up in a table that is made once per query."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_core.kernels.compiled import cached
from sparse_core.kernels.threads import split


@cached(nogil=True)
def score_rows(q, packed, halves, out, sizes, low, high):
    """Scores of the heads low .. high, counted over samples and query heads.

    q [B Hq 2 n], packed [B Hkv T (4 + n)], out [B Hq T] flat, n bytes of codes in a row; halves: the float32 of every
    float16 by its bits; sizes (Hq, Hkv, T, n).
    """
    hq, hkv, length, n = sizes
    table = np.empty((n, 256), np.float32)
    for task in range(low, high):
        total = np.float32(0)
        for byte in range(n):
            first, second = q[task * 2 * n + 2 * byte], q[task * 2 * n + 2 * byte + 1]
            total += first + second
            for value in range(256):
                table[byte, value] = first * np.float32(value >> 4) + second * np.float32(value & 15)
        place = (task // hq * hkv + task % hq // (hq // hkv)) * length * (4 + n)
        for row in range(length):
            found = np.float32(0)
            for byte in range(n):
                found += table[byte, packed[place + 4 + byte]]
            least = halves[packed[place] | packed[place + 1] << 8]
            step = halves[packed[place + 2] | packed[place + 3] << 8]
            out[task * length + row] = least * total + step * found
            place += 4 + n


@cache
def _halves() -> Any:
    return torch.arange(2**16).to(torch.uint16).view(torch.float16).float().numpy()


def score(q: Tensor, packed: Tensor) -> Tensor:
    """Scores [B, Hq, T] of q [B, Hq, r] with the rows packed [B, Hkv, T, 4 + ceil(r / 2)]; not differentiable."""
    (b, hq, r), (_, hkv, length, width) = q.shape, packed.shape
    out = torch.empty(b, hq, length)
    near = torch.nn.functional.pad(q.detach().float(), (0, r % 2)).contiguous()
    arrays = [x.view(-1).numpy() for x in (near, packed.contiguous())]
    split(score_rows, (*arrays, _halves(), out.view(-1).numpy(), (hq, hkv, length, width - 4)), b * hq)
    return out
