"""Attention over compressed rows of keys on a CPU: per row the scores, their softmax and the sum of values, and back.

Rows name single keys, so there are no tiles of scores: a row is a handful of dot products with rows of k, and a handful
of sums of rows of v, both as wide vectors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_core import counters
from sparse_core.kernels.arrays import flat_rows
from sparse_core.kernels.compiled import cached
from sparse_core.kernels.simd import COLUMNS, VL, add_rows, dot, exp_difference
from sparse_core.kernels.threads import split

if TYPE_CHECKING:
    from sparse_core.attention.masks import TokenCSR

SIMD = 3  # `sparse_core.kernels.simd.VERSION` that this file was compiled against; numba's cache looks at this file alone
NOTHING = np.float32(-1e30)  # the score of a place that holds no key: its weight is exactly 0


@cached(nogil=True)
def _weigh(scores, kept, largest, level):
    """scores = exp(scores - largest) in whole strips; places from `kept` on become 0."""
    level[:] = largest
    for j in range(kept, -(-kept // COLUMNS) * COLUMNS):
        scores[j] = largest + NOTHING
    for j in range(0, kept, COLUMNS):
        exp_difference(scores, np.int64(j), level, np.int64(0), scores, np.int64(j))


@cached(nogil=True)
def _sum_rows(weights, rows, kept, x, out, at, width):
    """out[at ..] += sum of weights times the rows of x that begin at `rows`; in fours, the spare weigh nothing."""
    for j in range(kept, -(-kept // 4) * 4):
        rows[j], weights[j] = rows[0], np.float32(0)
    for j in range(0, kept, 4):
        add_rows(
            weights, np.int64(j), x, np.int64(rows[j]), np.int64(rows[j + 1]), np.int64(rows[j + 2]),
            np.int64(rows[j + 3]), out, np.int64(at), np.int64(width),
        )  # fmt: skip


@cached(nogil=True)
def _add_scaled(factor, x, xo, out, oo, width):
    for d in range(width):
        out[oo + d] += factor * x[xo + d]


@cached(nogil=True)
def forward(q, k, v, out, top, logs, crow, col, sizes, scale, low, high):
    """Output, largest score and logarithm of the sum relative to it of the rows low .. high, counted over samples, query
    heads and queries.

    q, out [B Hq Tq width], k, v [B Hkv Tk width] and top, logs [B Hq Tq] flat, out filled with 0; crow, col: the mask's
    rows; sizes (Hq, Hkv, Tq, Tk, width, samples and heads of the mask, longest row).
    """
    hq, hkv, tq, tk, width, mb, mh, longest = sizes
    room = -(-longest // COLUMNS) * COLUMNS + COLUMNS
    rows, scores, level = np.empty(room, np.int64), np.empty(room, np.float32), np.empty(COLUMNS, np.float32)
    for task in range(low, high):
        head, i = task // tq, task % tq
        sample, h = head // hq, head % hq
        row = ((sample if mb > 1 else 0) * mh + (h if mh > 1 else 0)) * tq + i
        base, first = (sample * hkv + h // (hq // hkv)) * tk, crow[row]
        kept = crow[row + 1] - first
        if kept == 0:
            top[task], logs[task] = np.float32(-np.inf), np.float32(0)
            continue
        largest = np.float32(-np.inf)
        for j in range(kept):
            rows[j] = (base + col[first + j]) * width
            scores[j] = dot(q, np.int64(task * width), k, np.int64(rows[j]), np.int64(width)) * scale
            if not scores[j] <= largest:
                largest = scores[j]
        _weigh(scores, kept, largest, level)
        total = np.float32(0)
        for j in range(kept):
            total += scores[j]
        for j in range(kept):
            scores[j] /= total
        _sum_rows(scores, rows, kept, v, out, task * width, width)
        top[task], logs[task] = largest, np.float32(math.log(total))


@cached(nogil=True)
def backward(q, k, v, top, delta, grad, dq, dk, dv, crow, col, sizes, scale, low, high):
    """Gradients of the key-value heads low .. high, counted over samples and heads; a head is one task, so that its dk and
    dv have one owner.

    grad [B Hq Tq width] is that of the output, delta [B Hq Tq] its product with the output, less the gradient of lse, both
    over the row's sum of exp(score - top). Per key of a row: p = exp(score - top), ds = p (v grad - delta), dv += p grad,
    dk += ds q; then dq = ds k. Weights from the log-sum-exp would be wrong by what float32 does not hold of large scores.
    """
    hq, hkv, tq, tk, width, mb, mh, longest = sizes
    room, group = -(-longest // COLUMNS) * COLUMNS + COLUMNS, hq // hkv
    rows, level = np.empty(room, np.int64), np.empty(COLUMNS, np.float32)
    p, ds = np.empty(room, np.float32), np.empty(room, np.float32)
    for owner in range(low, high):
        for step in range(group * tq):
            sample, h, i = owner // hkv, (owner % hkv) * group + step // tq, step % tq
            task = (sample * hq + h) * tq + i
            row = ((sample if mb > 1 else 0) * mh + (h if mh > 1 else 0)) * tq + i
            first = crow[row]
            kept, at = crow[row + 1] - first, task * width
            if kept == 0:
                continue
            for j in range(kept):
                rows[j] = (owner * tk + col[first + j]) * width
                p[j] = dot(q, np.int64(at), k, np.int64(rows[j]), np.int64(width)) * scale
            _weigh(p, kept, top[task], level)
            for j in range(kept):
                dp = dot(grad, np.int64(at), v, np.int64(rows[j]), np.int64(width))
                ds[j] = p[j] * (dp - delta[task]) * scale
                _add_scaled(p[j], grad, at, dv, rows[j], width)
                _add_scaled(ds[j], q, at, dk, rows[j], width)
            _sum_rows(ds, rows, kept, k, dq, at, width)


def _sizes(q: Tensor, k: Tensor, mask: TokenCSR) -> tuple[int, ...]:
    _, hq, tq, d = q.shape
    longest = int(mask.counts.max()) if mask.counts.numel() else 0
    return hq, k.shape[1], tq, k.shape[2], d + -d % VL, mask.batch, mask.heads, longest


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: TokenCSR, scale: float
    ) -> tuple[Tensor, Tensor]:
        sizes = _sizes(q, k, mask)
        out, top, logs = (
            torch.zeros(*q.shape[:3], sizes[4]),
            torch.empty(q.shape[:3]),
            torch.empty(q.shape[:3]),
        )
        arrays = (*(flat_rows(x, VL) for x in (q, k, v)), *(x.view(-1).numpy() for x in (out, top, logs)))
        rows = (mask.crow.numpy(), mask.col.numpy())
        split(forward, (*arrays, *rows, sizes, np.float32(scale)), top.numel())
        result = out[..., : q.shape[-1]].to(q.dtype)
        counters.reach(peak_tile_bytes=4 * sizes[-1])
        ctx.save_for_backward(q, k, v, result, top, logs)
        ctx.mask, ctx.scale = mask, scale
        return result, top + logs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, top, logs = ctx.saved_tensors
        grad, grad_lse = gradients
        sizes, mask = _sizes(q, k, ctx.mask), ctx.mask
        share = (-logs).exp()
        delta = ((grad.float() * out.float()).sum(-1) - grad_lse) * share
        grad = grad.float() * share[..., None]
        back = [torch.zeros(*x.shape[:3], sizes[4]) for x in (q, k, v)]
        flat = (x.contiguous().view(-1).numpy() for x in (top, delta))
        arrays = (
            *(flat_rows(x, VL) for x in (q, k, v)),
            *flat,
            flat_rows(grad, VL),
            *(x.view(-1).numpy() for x in back),
        )
        rows = (mask.crow.numpy(), mask.col.numpy())
        split(backward, (*arrays, *rows, sizes, np.float32(ctx.scale)), k.shape[0] * k.shape[1])
        dq, dk, dv = (x[..., : q.shape[-1]].to(like.dtype) for x, like in zip(back, (q, k, v), strict=True))
        return dq, dk, dv, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: TokenCSR, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, D] in the dtype of q, and log-sum-exp [B, Hq, Tq] in float32; both may be differentiated."""
    return _Attend.apply(q, k, v, mask.to("cpu"), scale)  # type: ignore[return-value]
