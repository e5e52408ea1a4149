"""Block-sparse attention on a CPU, forward and backward, at the speed of a tuned BLAS.

The work is cut into tiles of 64 queries and 64 keys. Scores are kept transposed, keys down and queries across, so that a
softmax is a walk down vectors and no sum runs across one. A query tile is packed once; keys and values are read where
they lie, unless their blocks are small or the last one is ragged. The backward pass walks the same lists with five
products per tile and saves nothing but the inputs, the output and the log-sum-exp.

Everything here is float32 and flat; `sparse_core.kernels.block_attention` checks and prepares it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sparse_core.kernels.arrays import flat_rows
from sparse_core.kernels.simd import (
    COLUMNS,
    ROWS,
    exp_difference,
    gemm_add,
    gemm_set,
    strip_exp,
    strip_gradient,
    strip_max,
)
from sparse_core.kernels.threads import split

if TYPE_CHECKING:
    from sparse_core.attention.masks import BlockMask

SIMD = 2  # `sparse_core.kernels.simd.VERSION` that this file was compiled against; numba's cache looks at this file alone
TILE = 64
NOTHING = np.float32(-1e30)  # the score of a pair that is not kept; finite, so that differences are no NaN
LOWEST = np.float32(
    -1e29
)  # where the running maximum starts: pairs that are not kept weigh exp(-9e29) = 0 against it
WIDTH = 32  # head widths are padded to multiples of this

# A function that only kernels call: it needs no way in from Python, and lies in their cache.
part = njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]


@part
def _least(a, b):  # numba compiles its own `min` anew for every call
    return a if a < b else b


@part
def _fill(x, value):  # as a loop: numba takes longest to compile slices
    for i in range(len(x)):
        x[i] = value


@part
def _sum(x, n):
    total = np.int64(0)
    for i in range(n):
        total += x[i]
    return total


@part
def _pack_queries(x, start, rows, width, factor, across, down):
    """Rows of a tile, scaled, as they lie (down [64, width]) and transposed (across [width, 64]); absent ones are 0."""
    for i in range(TILE):
        for d in range(width):
            value = x[(start + i) * width + d] * factor if i < rows else np.float32(0)
            across[d * TILE + i] = value
            down[i * width + d] = value


@part
def _gather(x, base, width, starts, counts, n, into):
    """Copy `n` runs of rows one after the other to the beginning of `into`; the rest of the tile becomes 0."""
    place = np.int64(0)
    for s in range(n):
        first, size = (base + starts[s]) * width, counts[s] * width
        for d in range(size):
            into[place + d] = x[first + d]
        place += size
    for d in range(place, TILE * width):
        into[d] = np.float32(0)


@part
def _scatter_add(x, base, width, starts, counts, n, out):
    """Add the rows of `x` back to where `_gather` took them from."""
    place = np.int64(0)
    for s in range(n):
        first, size = (base + starts[s]) * width, counts[s] * width
        for d in range(size):
            out[first + d] += x[place + d]
        place += size


@part
def _scores(k, at, across, width, rows, columns, s):
    """s [rows, 64] = keys times packed queries."""
    for i in range(0, rows, ROWS):
        for j in range(0, columns, COLUMNS):
            gemm_set(
                k, np.int64(at + i * width), np.int64(width), np.int64(1), across, np.int64(j), np.int64(TILE), s,
                np.int64(i * TILE + j), np.int64(TILE), np.int64(width),
            )  # fmt: skip


@part
def _add_down(s, rows, x, at, width, columns, out):
    """out [columns, width] += transpose of s [rows, 64] times x [rows, width]."""
    for i in range(0, columns, ROWS):
        for j in range(0, width, COLUMNS):
            gemm_add(
                s, np.int64(i), np.int64(1), np.int64(TILE), x, np.int64(at + j), np.int64(width), out,
                np.int64(i * width + j), np.int64(width), np.int64(rows),
            )  # fmt: skip


@part
def _add_across(s, rows, x, width, columns, out, at):
    """out [rows, width] += s [rows, 64] times x [64, width]; whole register tiles, so out has a multiple of ROWS rows."""
    for i in range(0, rows, ROWS):
        for j in range(0, width, COLUMNS):
            gemm_add(
                s, np.int64(i * TILE), np.int64(TILE), np.int64(1), x, np.int64(j), np.int64(width), out,
                np.int64(at + i * width + j), np.int64(width), np.int64(columns),
            )  # fmt: skip


@part
def _mask_scores(s, tiles, tile, bq, bk, q0, k0, place, keys, queries):
    """Give the pairs of a partial block that its pattern does not keep the score of nothing."""
    for j in range(keys):
        for i in range(queries):
            if not tiles[(tile * bq + q0 + i) * bk + k0 + j]:
                s[(place + j) * TILE + i] = NOTHING


@part
def _plan_tile(row, entry, inner, offsets, columns, pattern, bk, kv_len, starts, counts, kinds, shifts):
    """The next at most 64 keys of a row of the mask: runs of keys (first, count, pattern, first key inside the block).

    Returns how many runs there are, the next entry and the next key inside it, and whether the keys can be read in
    place (one run of a whole number of register tiles).
    """
    runs, taken = 0, 0
    while entry < offsets[row + 1] and taken < TILE:
        first = columns[entry] * bk + inner
        size = _least(_least(bk - inner, TILE - taken), kv_len - first)
        if size <= 0:
            entry, inner = entry + 1, np.int64(0)
            continue
        starts[runs], counts[runs], kinds[runs], shifts[runs] = first, size, pattern[entry], inner
        runs, taken, inner = runs + 1, taken + size, inner + size
        if inner >= bk:
            entry, inner = entry + 1, np.int64(0)
        if bk >= TILE:
            break
    return runs, entry, inner, runs == 1 and counts[0] % ROWS == 0


@part
def _load_keys(x, base, width, runs, starts, counts, in_place, scratch):
    """Where the keys (or values) of a tile begin, and in which array: as they lie, or gathered in `scratch`."""
    if in_place:
        return (base + starts[0]) * width
    _gather(x, base, width, starts, counts, runs, scratch)
    return np.int64(0)


@part
def _mask_tile(s, runs, counts, kinds, shifts, tiles, bq, bk, q0, queries):
    """Apply the patterns of the partial blocks of a tile to its scores."""
    place = np.int64(0)
    for r in range(runs):
        if kinds[r] >= 0:
            _mask_scores(s, tiles, kinds[r], bq, bk, q0, shifts[r], place, counts[r], queries)
        place += counts[r]


@njit(cache=True, nogil=True)
def forward(q, k, v, out, lse, offsets, columns, pattern, tiles, sizes, scale, low, high):
    """Output and log-sum-exp of the query tiles low .. high, counted over samples, query heads and tiles.

    q, out [B Hq Tq width], k, v [B Hkv Tk width] and lse [B Hq Tq] flat; offsets, columns, pattern: the mask's rows of
    key blocks, and -1 for a full block or the index of its pattern in tiles [n bq bk]; sizes: see `Sizes`.
    """
    hq, hkv, tq, tk, width, bq, bk, mb, mh = sizes
    height = _least(bq, TILE)
    per_head, per_block = -(-tq // height), bq // height
    blocks = -(-tq // bq)
    across, down = np.empty(width * TILE, np.float32), np.empty(TILE * width, np.float32)
    s, o = np.empty(TILE * TILE, np.float32), np.empty(TILE * width, np.float32)
    keys, values = np.empty(TILE * width, np.float32), np.empty(TILE * width, np.float32)
    m, before, total, shrink = (np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32),
                                np.empty(TILE, np.float32))  # fmt: skip
    starts, counts, kinds, shifts = (np.empty(TILE, np.int64), np.empty(TILE, np.int64), np.empty(TILE, np.int64),
                                     np.empty(TILE, np.int64))  # fmt: skip
    for task in range(low, high):
        head, tile = task // per_head, task % per_head
        sample, h = head // hq, head % hq
        start = tile * height
        queries = _least(height, tq - start)
        across_columns = -(-queries // COLUMNS) * COLUMNS
        row = ((sample if mb > 1 else 0) * mh + (h if mh > 1 else 0)) * blocks + tile // per_block
        q0 = (tile % per_block) * height
        base = (sample * hkv + h // (hq // hkv)) * tk
        _pack_queries(q, head * tq + start, queries, width, scale, across, down)
        _fill(m, LOWEST)
        _fill(total, np.float32(0))
        _fill(o, np.float32(0))
        entry, inner = offsets[row], np.int64(0)
        while entry < offsets[row + 1]:
            runs, entry, inner, in_place = _plan_tile(
                row, entry, inner, offsets, columns, pattern, bk, tk, starts, counts, kinds, shifts
            )
            if runs == 0:
                break
            rows = _sum(counts, runs)
            padded = -(-rows // ROWS) * ROWS
            at = _load_keys(k, base, width, runs, starts, counts, in_place, keys)
            _scores(k if in_place else keys, at, across, width, padded, across_columns, s)
            _mask_tile(s, runs, counts, kinds, shifts, tiles, bq, bk, q0, queries)
            for j in range(0, across_columns, COLUMNS):
                for e in range(j, j + COLUMNS):
                    before[e] = m[e]
                strip_max(s, np.int64(j), np.int64(TILE), np.int64(rows), m, np.int64(j))
                exp_difference(before, np.int64(j), m, np.int64(j), shrink, np.int64(j))
                for e in range(j, j + COLUMNS):
                    total[e] *= shrink[e]
                strip_exp(s, np.int64(j), np.int64(TILE), np.int64(rows), m, np.int64(j), total, np.int64(j))
            for i in range(queries):
                for d in range(width):
                    o[i * width + d] *= shrink[i]
            at = _load_keys(v, base, width, runs, starts, counts, in_place, values)
            _add_down(s, rows, v if in_place else values, at, width, across_columns, o)
        for i in range(queries):
            place = head * tq + start + i
            kept = m[i] > LOWEST
            lse[place] = m[i] + np.float32(math.log(total[i])) if kept else np.float32(-np.inf)
            factor = np.float32(1) / total[i] if kept else np.float32(0)
            for d in range(width):
                out[place * width + d] = o[i * width + d] * factor


@njit(cache=True, nogil=True)
def backward(
    q, k, v, lse, delta, grad, dq, dk, dv, offsets, columns, pattern, tiles, sizes, scale, low, high
):
    """Gradients of the key-value heads low .. high, counted over samples and heads; a head is one task, so that its dk and
    dv have one owner.

    grad [B Hq Tq width] is that of the output, delta [B Hq Tq] its product with the output, less the gradient of lse.
    Per tile: scores and dp = v grad, then p and ds in place, then dv += p grad, dk += ds q, dq += ds k.
    """
    hq, hkv, tq, tk, width, bq, bk, mb, mh = sizes
    height, group = min(bq, TILE), hq // hkv
    per_head, per_block = -(-tq // height), bq // height
    blocks = -(-tq // bq)
    across, down = np.empty(width * TILE, np.float32), np.empty(TILE * width, np.float32)
    g_across, g_down = np.empty(width * TILE, np.float32), np.empty(TILE * width, np.float32)
    s, dp, d_query = (
        np.empty(TILE * TILE, np.float32),
        np.empty(TILE * TILE, np.float32),
        np.empty(TILE * width, np.float32),
    )
    keys, values = np.empty(TILE * width, np.float32), np.empty(TILE * width, np.float32)
    d_keys, d_values = np.empty(TILE * width, np.float32), np.empty(TILE * width, np.float32)
    logs, mean = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    starts, counts, kinds, shifts = (np.empty(TILE, np.int64), np.empty(TILE, np.int64), np.empty(TILE, np.int64),
                                     np.empty(TILE, np.int64))  # fmt: skip
    for task in range(low, high):
        for step in range(group * per_head):
            sample, h = task // hkv, (task % hkv) * group + step // per_head
            head, tile = sample * hq + h, step % per_head
            start = tile * height
            queries = _least(height, tq - start)
            across_columns = -(-queries // COLUMNS) * COLUMNS
            row = ((sample if mb > 1 else 0) * mh + (h if mh > 1 else 0)) * blocks + tile // per_block
            if offsets[row] == offsets[row + 1]:
                continue
            q0, base = (tile % per_block) * height, task * tk
            _pack_queries(q, head * tq + start, queries, width, scale, across, down)
            _pack_queries(grad, head * tq + start, queries, width, np.float32(1), g_across, g_down)
            for i in range(TILE):
                logs[i], mean[i] = (
                    -NOTHING,
                    np.float32(0),
                )  # an absent row, or one without keys, weighs nothing
                if i < queries and lse[head * tq + start + i] > LOWEST:
                    logs[i], mean[i] = lse[head * tq + start + i], delta[head * tq + start + i]
            _fill(d_query, np.float32(0))
            entry, inner = offsets[row], np.int64(0)
            while entry < offsets[row + 1]:
                runs, entry, inner, in_place = _plan_tile(
                    row, entry, inner, offsets, columns, pattern, bk, tk, starts, counts, kinds, shifts
                )
                if runs == 0:
                    break
                rows = _sum(counts, runs)
                padded = -(-rows // ROWS) * ROWS
                at = _load_keys(k, base, width, runs, starts, counts, in_place, keys)
                _load_keys(v, base, width, runs, starts, counts, in_place, values)
                _scores(k if in_place else keys, at, across, width, padded, across_columns, s)
                _scores(v if in_place else values, at, g_across, width, padded, across_columns, dp)
                _mask_tile(s, runs, counts, kinds, shifts, tiles, bq, bk, q0, queries)
                for j in range(0, across_columns, COLUMNS):
                    strip_gradient(
                        s, np.int64(j), dp, np.int64(j), np.int64(TILE), np.int64(rows), logs, np.int64(j), mean,
                        np.int64(j),
                    )  # fmt: skip
                if not in_place:
                    _fill(d_keys, np.float32(0))
                    _fill(d_values, np.float32(0))
                count = rows if in_place else padded
                _add_across(s, count, g_down, width, across_columns, dv if in_place else d_values, at)
                _add_across(dp, count, down, width, across_columns, dk if in_place else d_keys, at)
                if not in_place:
                    _scatter_add(d_values, base, width, starts, counts, runs, dv)
                    _scatter_add(d_keys, base, width, starts, counts, runs, dk)
                _add_down(dp, rows, k if in_place else keys, at, width, across_columns, d_query)
            for i in range(queries):
                place = (head * tq + start + i) * width
                for d in range(width):
                    dq[place + d] = d_query[i * width + d] * scale


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """Flat arrays of a call, and the sizes that the kernels read."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    rows: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    sizes: tuple[int, ...]


def _prepare(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> _Prepared:
    _, hq, tq, d = q.shape
    offsets, columns, pattern = (part.numpy() for part in mask.rows)
    tiles = mask.tiles[0].contiguous().view(-1).numpy()
    tiles = tiles if len(tiles) else np.zeros(1, np.bool_)
    sizes = (hq, k.shape[1], tq, k.shape[2], d + -d % WIDTH, *mask.block_size, *mask.shape[:2])
    return _Prepared(
        q=flat_rows(q, WIDTH),
        k=flat_rows(k, WIDTH),
        v=flat_rows(v, WIDTH),
        rows=(offsets, columns, pattern, tiles),
        sizes=sizes,
    )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        call = _prepare(q, k, v, mask)
        width, tiles = call.sizes[4], -(-q.shape[2] // min(mask.block_size[0], TILE))
        out, lse = torch.empty(*q.shape[:3], width), torch.empty(q.shape[:3])
        split(
            forward,
            (
                call.q,
                call.k,
                call.v,
                out.view(-1).numpy(),
                lse.view(-1).numpy(),
                *call.rows,
                call.sizes,
                np.float32(scale),
            ),
            q.shape[0] * q.shape[1] * tiles,
        )
        result = out[..., : q.shape[-1]].to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.mask, ctx.scale = mask, scale
        return result, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        call, (grad, grad_lse) = _prepare(q, k, v, ctx.mask), gradients
        delta = (grad.float() * out.float()).sum(-1) - grad_lse
        sizes = [(*x.shape[:3], call.sizes[4]) for x in (q, k, v)]
        dq, dk, dv = torch.zeros(sizes[0]), torch.zeros(sizes[1]), torch.zeros(sizes[2])
        flat = (x.contiguous().view(-1).numpy() for x in (lse, delta))
        flat = (*flat, flat_rows(grad, WIDTH), *(x.view(-1).numpy() for x in (dq, dk, dv)))
        split(
            backward,
            (call.q, call.k, call.v, *flat, *call.rows, call.sizes, np.float32(ctx.scale)),
            k.shape[0] * k.shape[1],
        )
        back = [x[..., : q.shape[-1]].to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v))]
        return (*back, None, None)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, D] in the dtype of q, and log-sum-exp [B, Hq, Tq] in float32; both may be differentiated."""
    return _Attend.apply(q, k, v, mask, scale)  # type: ignore[return-value]
