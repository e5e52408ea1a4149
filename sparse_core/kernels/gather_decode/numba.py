"""Decoding over selected keys on a CPU. Memory latency is the limit, so rows are asked for before they are needed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_core.kernels.compiled import cached
from sparse_core.kernels.simd import VL, add_rows, dot, prefetch
from sparse_core.kernels.threads import split

SIMD = 3  # `sparse_core.kernels.simd.VERSION` that this file was compiled against; numba's cache looks at this file alone
AHEAD = 8  # rows that are asked for before they are read
LINE = 16  # floats in a cache line


@cached(nogil=True)
def _ask(x, row, width):
    for d in range(0, width, LINE):
        prefetch(x, np.int64(row + d))


@cached(nogil=True)
def decode(q, k, v, index, out, lse, found, sizes, scale, low, high):
    """Output, log-sum-exp and scores of the heads low .. high, counted over samples and query heads.

    q, out [B Hq width], k, v [B Hkv T width], index and found [B Hq n] flat; sizes (Hq, Hkv, T, width, n).
    """
    hq, hkv, length, width, n = sizes
    rows, scores = np.empty(n + 3, np.int64), np.empty(n + 3, np.float32)
    for task in range(low, high):
        base = (task // hq * hkv + task % hq // (hq // hkv)) * length
        kept = 0
        for j in range(n):
            if index[task * n + j] >= 0:
                rows[kept] = (base + index[task * n + j]) * width
                kept += 1
            else:
                found[task * n + j] = np.float32(-np.inf)
        largest = np.float32(-np.inf)
        for j in range(kept):
            if j + AHEAD < kept:
                _ask(k, rows[j + AHEAD], width)
            scores[j] = dot(q, np.int64(task * width), k, np.int64(rows[j]), np.int64(width)) * scale
            if not scores[j] <= largest:
                largest = scores[j]
        taken = 0
        for j in range(n):
            if index[task * n + j] >= 0:
                found[task * n + j] = scores[taken]
                taken += 1
        for d in range(width):
            out[task * width + d] = np.float32(0)
        if kept == 0:
            lse[task] = np.float32(-np.inf)
            continue
        total = np.float32(0)
        for j in range(kept):
            scores[j] = np.float32(math.exp(scores[j] - largest))
            total += scores[j]
        for j in range(kept, kept + 3):  # rows come in fours; the spare ones weigh nothing
            rows[j], scores[j] = rows[0], np.float32(0)
        for j in range(kept):
            scores[j] /= total
        for j in range(0, kept, 4):
            for r in range(j + AHEAD, min(j + AHEAD + 4, kept)):
                _ask(v, rows[r], width)
            add_rows(
                scores, np.int64(j), v, np.int64(rows[j]), np.int64(rows[j + 1]), np.int64(rows[j + 2]),
                np.int64(rows[j + 3]), out, np.int64(task * width), np.int64(width),
            )  # fmt: skip
        lse[task] = largest + np.float32(math.log(total))


def attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, Hq, D] in the dtype of q, log-sum-exp [B, Hq] and scores [B, Hq, n] in float32; not differentiable."""
    index = index[:, :, None].expand(-1, -1, q.shape[1] // index.shape[1], -1).flatten(1, 2)
    b, hq, d = q.shape
    spare = -d % VL
    near = [torch.nn.functional.pad(x.float(), (0, spare)).contiguous() if spare or x.dtype != torch.float32
            else x.contiguous() for x in (q.detach(), k.detach(), v.detach())]  # fmt: skip
    out, lse, found = torch.empty(b, hq, d + spare), torch.empty(b, hq), torch.empty(index.shape)
    arrays: list[Any] = [x.view(-1).numpy() for x in (*near, index.long().contiguous(), out, lse, found)]
    sizes = (hq, k.shape[1], k.shape[2], d + spare, index.shape[-1])
    split(decode, (*arrays, sizes, np.float32(scale)), b * hq)
    return out[..., :d].to(q.dtype), lse, found
