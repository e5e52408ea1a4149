"""Block-sparse attention on a CPU, forward and backward, at the speed of a tuned BLAS.

The work is cut into tiles of 64 queries and 64 keys. Scores are kept transposed, keys down and queries across, so that a
softmax is a walk down vectors and no sum runs across one. A query tile is packed once; keys and values are read where
they lie, unless their blocks are small or the last one is ragged. The backward pass walks the same lists with five
products per tile and saves nothing but the inputs, the output and two numbers per query: the largest score and the
logarithm of the sum that is taken relative to it. Their sum, the log-sum-exp, would not do for large scores: at 1e5
float32 knows it to 0.004, and a weight with it.

Everything here is flat and made of words, see `sparse_core.kernels.simd`: float32, or pairs of bfloat16 (`pack` 2), whose
products are twice as fast. Such a matrix comes twice: as it lies, its pairs along a row, and with its pairs down two rows
(`q2`); of float32 both are the same array. Scores, statistics and gradients are float32 throughout.
`sparse_core.kernels.block_attention` checks what comes in.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_core import counters
from sparse_core.kernels.arrays import flat_rows
from sparse_core.kernels.compiled import cached
from sparse_core.kernels.simd import (
    COLUMNS,
    PAIRS,
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

SIMD = 3  # `sparse_core.kernels.simd.VERSION` that this file was compiled against; numba's cache looks at this file alone
TILE = 64
NOTHING = np.float32(-1e30)  # the score of a pair that is not kept; finite, so that differences are no NaN
LOWEST = np.float32(
    -1e29
)  # where the running maximum starts: pairs that are not kept weigh exp(-9e29) = 0 against it
FIRST, COUNT, KIND, SHIFT = 0, 1, 2, 3  # of a run of keys, see `_plan_tile`
WIDTH = 32  # head widths are padded to multiples of this

kernel = cached(nogil=True, no_cfunc_wrapper=True)
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
def _turn_queries(x, start, rows, words, across):
    """Rows of a tile transposed, across [words, 64]; absent ones are 0."""
    for i in range(TILE):
        for d in range(words):
            across[d * TILE + i] = x[(start + i) * words + d] if i < rows else x.dtype.type(0)


@part
def _copy_rows(x, first, rows, width, out):
    """`rows` rows to the beginning of `out`, whose rest becomes 0."""
    for d in range(rows * width):
        out[d] = x[first * width + d]
    for d in range(rows * width, len(out)):
        out[d] = x.dtype.type(0)


@part
def _load(x, base, width, runs, spans, pack, in_place, scratch):
    """Where the keys (or values) of a tile begin, and in which array: as they lie, or run after run in `scratch`, whose
    rest becomes 0. A row of words holds `pack` of them."""
    if in_place:
        return (base + spans[0, FIRST] // pack) * width
    place = np.int64(0)
    for r in range(runs):
        first, size = (base + spans[r, FIRST] // pack) * width, -(-spans[r, COUNT] // pack) * width
        for d in range(size):
            scratch[place + d] = x[first + d]
        place += size
    for d in range(place, len(scratch)):
        scratch[d] = x.dtype.type(0)
    return np.int64(0)


@part
def _scatter_add(x, base, width, runs, spans, out):
    """Add the rows of `x` back to where `_load` took them from."""
    place = np.int64(0)
    for r in range(runs):
        first, size = (base + spans[r, FIRST]) * width, spans[r, COUNT] * width
        for d in range(size):
            out[first + d] += x[place + d]
        place += size


@part
def _scores(k, at, across, words, rows, columns, factor, s):
    """s [rows, 64] = factor keys times turned queries."""
    for i in range(0, rows, ROWS):
        for j in range(0, columns, COLUMNS):
            gemm_set(
                k, np.int64(at + i * words), np.int64(words), np.int64(1), across, np.int64(j), np.int64(TILE), s,
                np.int64(i * TILE + j), np.int64(TILE), np.int64(words), factor,
            )  # fmt: skip


@part
def _add_down(p, rows, x, at, width, columns, out):
    """out [columns, width] += transpose of p [rows, 64] times x [rows, width], rows of words."""
    for i in range(0, columns, ROWS):
        for j in range(0, width, COLUMNS):
            gemm_add(
                p, np.int64(i), np.int64(1), np.int64(TILE), x, np.int64(at + j), np.int64(width), out,
                np.int64(i * width + j), np.int64(width), np.int64(rows),
            )  # fmt: skip


@part
def _add_across(p, rows, x, width, columns, out, at):
    """out [rows, width] += p [rows, 64] times x [columns, width], columns of words; whole register tiles, so out has a
    multiple of ROWS rows."""
    for i in range(0, rows, ROWS):
        for j in range(0, width, COLUMNS):
            gemm_add(
                p, np.int64(i * TILE), np.int64(TILE), np.int64(1), x, np.int64(j), np.int64(width), out,
                np.int64(at + i * width + j), np.int64(width), np.int64(columns),
            )  # fmt: skip


@part
def _plan_tile(row, entry, inner, offsets, columns, pattern, bk, kv_len, spans):
    """The next at most 64 keys of a row of the mask as runs in `spans`: first key, count, pattern, first inside its block.

    Returns how many runs and keys there are, the next entry and the next key inside it, and whether the keys can be
    read in place (one run of a whole number of register tiles).
    """
    runs, taken = np.int64(0), np.int64(0)
    while entry < offsets[row + 1] and taken < TILE:
        first = columns[entry] * bk + inner
        size = _least(_least(bk - inner, TILE - taken), kv_len - first)
        if size <= 0:
            entry, inner = entry + 1, np.int64(0)
            continue
        spans[runs, FIRST], spans[runs, COUNT] = first, size
        spans[runs, KIND], spans[runs, SHIFT] = pattern[entry], inner
        runs, taken, inner = runs + 1, taken + size, inner + size
        if inner >= bk:
            entry, inner = entry + 1, np.int64(0)
        if bk >= TILE:
            break
    return runs, taken, entry, inner, runs == 1 and spans[0, COUNT] % ROWS == 0


@part
def _mask_tile(s, rows, runs, spans, tiles, bq, bk, q0, queries, pack):
    """Give the pairs that the patterns of partial blocks do not keep the score of nothing; and how many rows there are for
    pairs of rows, where an odd last one gets a row of nothing beside it."""
    place = np.int64(0)
    for r in range(runs):
        if spans[r, KIND] >= 0:
            for j in range(spans[r, COUNT]):
                for i in range(queries):
                    if not tiles[(spans[r, KIND] * bq + q0 + i) * bk + spans[r, SHIFT] + j]:
                        s[(place + j) * TILE + i] = NOTHING
        place += spans[r, COUNT]
    odd = rows % pack
    for i in range(rows * TILE, (rows + odd) * TILE):
        s[i] = NOTHING
    return rows + odd


@kernel
def forward(q, k, v2, out, top, logs, offsets, columns, pattern, tiles, sizes, scale, low, high):
    """Output, largest score and logarithm of the sum relative to it of the query tiles low .. high, counted over samples,
    query heads and tiles.

    q [B Hq Tq words], k [B Hkv Tk words], v2 [B Hkv Tk/pack width], out [B Hq Tq width], top, logs [B Hq Tq] flat;
    offsets, columns, pattern: the mask's rows of key blocks, and -1 for a full block or the index of its pattern in tiles
    [n bq bk]; sizes: see `_prepare`.
    """
    hq, hkv, tq, tk, width, pack, bq, bk, mb, mh = sizes
    words, tk2, one = (
        width // pack,
        -(-tk // pack),
        np.int64(1),
    )  # numba compiles anew for a constant argument
    height = _least(bq, np.int64(TILE))
    per_head, per_block = -(-tq // height), bq // height
    blocks = -(-tq // bq)
    across, s, o = (
        np.empty(words * TILE, q.dtype),
        np.empty(TILE * TILE, top.dtype),
        np.empty(TILE * width, top.dtype),
    )
    p = s.view(q.dtype)
    keys, values = np.empty(TILE * words, q.dtype), np.empty(TILE * words, q.dtype)
    m, before, total, shrink = (np.empty(TILE, top.dtype), np.empty(TILE, top.dtype), np.empty(TILE, top.dtype),
                                np.empty(TILE, top.dtype))  # fmt: skip
    spans = np.empty((TILE, 4), offsets.dtype)
    for task in range(low, high):
        head, tile = task // per_head, task % per_head
        sample, h = head // hq, head % hq
        start = tile * height
        queries = _least(height, tq - start)
        across_columns = -(-queries // COLUMNS) * COLUMNS
        row = ((sample if mb > 1 else 0) * mh + (h if mh > 1 else 0)) * blocks + tile // per_block
        q0 = (tile % per_block) * height
        owner = sample * hkv + h // (hq // hkv)
        _turn_queries(q, head * tq + start, queries, words, across)
        _fill(m, LOWEST)
        _fill(total, np.float32(0))
        _fill(o, np.float32(0))
        entry, inner = offsets[row], np.int64(0)
        while entry < offsets[row + 1]:
            runs, rows, entry, inner, in_place = _plan_tile(
                row, entry, inner, offsets, columns, pattern, bk, tk, spans
            )
            if runs == 0:
                break
            padded = -(-rows // ROWS) * ROWS
            at = _load(k, owner * tk, words, runs, spans, one, in_place, keys)
            _scores(k if in_place else keys, at, across, words, padded, across_columns, scale, s)
            even = _mask_tile(s, rows, runs, spans, tiles, bq, bk, q0, queries, pack)
            for j in range(0, across_columns, COLUMNS):
                for e in range(j, j + COLUMNS):
                    before[e] = m[e]
                strip_max(s, np.int64(j), np.int64(TILE), np.int64(rows), m, np.int64(j))
                exp_difference(before, np.int64(j), m, np.int64(j), shrink, np.int64(j))
                for e in range(j, j + COLUMNS):
                    total[e] *= shrink[e]
                strip_exp(
                    s, np.int64(j), np.int64(TILE), np.int64(even), m, np.int64(j), total, np.int64(j), p
                )
            for i in range(queries):
                for d in range(width):
                    o[i * width + d] *= shrink[i]
            at = _load(v2, owner * tk2, width, runs, spans, pack, in_place, values)
            _add_down(p, even // pack, v2 if in_place else values, at, width, across_columns, o)
        for i in range(queries):
            place = head * tq + start + i
            kept = m[i] > LOWEST
            top[place] = m[i] if kept else np.float32(-np.inf)
            logs[place] = np.float32(math.log(total[i])) if kept else np.float32(0)
            factor = np.float32(1) / total[i] if kept else np.float32(0)
            for d in range(width):
                out[place * width + d] = o[i * width + d] * factor


@kernel
def backward(
    q, q2, k, k2, v, lse, delta, g, g2, dq, dk, dv, offsets, columns, pattern, tiles, sizes, scale, low, high
):
    """Gradients of the key-value heads low .. high, counted over samples and heads; a head is one task, so that its dk and
    dv have one owner.

    Weights are exp(score - lse). g is the gradient of the output, like q; delta [B Hq Tq] its product with the output,
    less the gradient of the log-sum-exp; both over the sum of a row's weights, where that is not 1. dq, dk, dv
    [B H T width] are float32. Per tile: scores and dp = v g, then p and ds in place, then dv += p g, dk += ds q,
    dq += ds k.
    """
    hq, hkv, tq, tk, width, pack, bq, bk, mb, mh = sizes
    words, tq2, tk2, one = width // pack, -(-tq // pack), -(-tk // pack), np.int64(1)
    height, group = _least(bq, np.int64(TILE)), hq // hkv
    per_head, per_block = -(-tq // height), bq // height
    blocks = -(-tq // bq)
    across, g_across = np.empty(words * TILE, q.dtype), np.empty(words * TILE, q.dtype)
    down, g_down = np.empty(TILE * words, q.dtype), np.empty(TILE * words, q.dtype)
    s, dp = np.empty(TILE * TILE, lse.dtype), np.empty(TILE * TILE, lse.dtype)
    p, ds = s.view(q.dtype), dp.view(q.dtype)
    ds2 = ds if pack == 1 else np.empty(TILE * TILE, q.dtype)
    keys, values = np.empty(TILE * words, q.dtype), np.empty(TILE * words, q.dtype)
    keys2 = keys if pack == 1 else np.empty(TILE * words, q.dtype)
    d_query = np.empty(TILE * width, lse.dtype)
    d_keys, d_values = np.empty(TILE * width, lse.dtype), np.empty(TILE * width, lse.dtype)
    logs, mean = np.empty(TILE, lse.dtype), np.empty(TILE, lse.dtype)
    spans = np.empty((TILE, 4), offsets.dtype)
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
            q0 = (tile % per_block) * height
            first2, rows2 = head * tq2 + start // pack, -(-queries // pack)
            _turn_queries(q, head * tq + start, queries, words, across)
            _turn_queries(g, head * tq + start, queries, words, g_across)
            _copy_rows(q2, first2, rows2, width, down)
            _copy_rows(g2, first2, rows2, width, g_down)
            for i in range(TILE):  # an absent row, or one without keys, weighs nothing
                logs[i], mean[i] = -NOTHING, np.float32(0)
                if i < queries and lse[head * tq + start + i] > LOWEST:
                    logs[i], mean[i] = lse[head * tq + start + i], delta[head * tq + start + i]
            _fill(d_query, np.float32(0))
            entry, inner = offsets[row], np.int64(0)
            while entry < offsets[row + 1]:
                runs, rows, entry, inner, in_place = _plan_tile(
                    row, entry, inner, offsets, columns, pattern, bk, tk, spans
                )
                if runs == 0:
                    break
                padded = -(-rows // ROWS) * ROWS
                at = _load(k, task * tk, words, runs, spans, one, in_place, keys)
                _load(v, task * tk, words, runs, spans, one, in_place, values)
                at2 = at
                if pack > 1:
                    at2 = _load(k2, task * tk2, width, runs, spans, pack, in_place, keys2)
                _scores(k if in_place else keys, at, across, words, padded, across_columns, scale, s)
                _scores(
                    v if in_place else values, at, g_across, words, padded, across_columns, np.float32(1), dp
                )
                even = _mask_tile(s, rows, runs, spans, tiles, bq, bk, q0, queries, pack)
                for j in range(0, across_columns, COLUMNS):
                    strip_gradient(
                        s, dp, np.int64(j), np.int64(TILE), np.int64(even), logs, mean, np.int64(j), scale, p, ds, ds2
                    )  # fmt: skip
                if not in_place:
                    _fill(d_keys, np.float32(0))
                    _fill(d_values, np.float32(0))
                count = rows if in_place else padded
                into = (task * tk + spans[0, FIRST]) * width if in_place else np.int64(0)
                depth = across_columns // pack
                _add_across(p, count, g_down, width, depth, dv if in_place else d_values, into)
                _add_across(ds, count, down, width, depth, dk if in_place else d_keys, into)
                if not in_place:
                    _scatter_add(d_values, task * tk, width, runs, spans, dv)
                    _scatter_add(d_keys, task * tk, width, runs, spans, dk)
                _add_down(ds2, even // pack, k2 if in_place else keys2, at2, width, across_columns, d_query)
            for i in range(queries):
                place = (head * tq + start + i) * width
                for d in range(width):
                    dq[place + d] = d_query[i * width + d]


@kernel
def _pair_rows(x, out, tokens, words, low, high):
    """Heads low .. high of x [heads tokens words] of bfloat16 along rows as out [heads tokens/2 2 words], whose words hold
    the same place of two rows; the last row may have none beside it."""
    height = -(-tokens // 2)
    for pair in range(low * height, high * height):
        head, row = pair // height, 2 * (pair % height)
        first, into = (head * tokens + row) * words, pair * 2 * words
        for d in range(words):
            a, b = x[first + d], x[first + words + d] if row + 1 < tokens else np.uint32(0)
            out[into + 2 * d] = (a & np.uint32(0xFFFF)) | (b << np.uint32(16))
            out[into + 2 * d + 1] = (a >> np.uint32(16)) | (b & np.uint32(0xFFFF0000))


class _Rows:
    """A tensor [B, H, T, D] as the words that the kernels read: as they lie, and with pairs down two rows."""

    def __init__(self, x: Tensor, pack: int):
        self.shape, self.pack = x.shape, pack
        self.words = flat_rows(x, WIDTH) if pack == 1 else _flat_pairs(x)

    @cached_property
    def down(self) -> np.ndarray:
        if self.pack == 1:
            return self.words
        b, h, t, d = self.shape
        words = (d + -d % WIDTH) // 2
        out = np.empty(b * h * -(-t // 2) * 2 * words, np.uint32)
        split(_pair_rows, (self.words, out, t, words), b * h)
        return out


def _flat_pairs(x: Tensor) -> np.ndarray:
    """[.., D] of bfloat16 as flat words of two, rows padded with zeros; the tensor's own memory where that fits."""
    spare = -x.shape[-1] % WIDTH
    x = torch.nn.functional.pad(x.detach(), (0, spare)) if spare else x.detach()
    return x.contiguous().view(-1).view(torch.int32).numpy().view(np.uint32)


def _words(q: Tensor, mask: BlockMask) -> int:
    """How many numbers a word holds: 2 for bfloat16 where the processor multiplies pairs and no block is one token."""
    return 2 if PAIRS and q.dtype == torch.bfloat16 and min(mask.block_size) > 1 else 1


def _prepare(q: Tensor, k: Tensor, mask: BlockMask, pack: int) -> tuple[Any, ...]:
    """The mask's arrays, and the sizes that the kernels read."""
    _, hq, tq, d = q.shape
    offsets, columns, pattern = (part.numpy() for part in mask.rows)
    tiles = mask.tiles[0].contiguous().view(-1).numpy()
    tiles = tiles if len(tiles) else np.zeros(1, np.bool_)
    sizes = (hq, k.shape[1], tq, k.shape[2], d + -d % WIDTH, pack, *mask.block_size, *mask.shape[:2])
    return offsets, columns, pattern, tiles, sizes


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        pack = _words(q, mask)
        call = _prepare(q, k, mask, pack)
        width, tiles = call[-1][4], -(-q.shape[2] // min(mask.block_size[0], TILE))
        out, top, logs = torch.empty(*q.shape[:3], width), torch.empty(q.shape[:3]), torch.empty(q.shape[:3])
        rows = (_Rows(q, pack).words, _Rows(k, pack).words, _Rows(v, pack).down)
        split(
            forward,
            (*rows, *(x.view(-1).numpy() for x in (out, top, logs)), *call, np.float32(scale)),
            q.shape[0] * q.shape[1] * tiles,
            optimize=1,
        )
        result = out[..., : q.shape[-1]].to(q.dtype)
        counters.reach(peak_tile_bytes=4 * TILE * TILE)
        ctx.save_for_backward(q, k, v, result, top, logs)
        ctx.mask, ctx.scale = mask, scale
        return result, top + logs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, top, logs = ctx.saved_tensors
        grad, grad_lse = gradients
        pack = _words(q, ctx.mask)
        call = _prepare(q, k, ctx.mask, pack)
        delta = (grad.float() * out.float()).sum(-1) - grad_lse
        if pack == 1:  # weights relative to the largest score, and what they are multiplied by over their sum
            grad, delta, lse = grad.float() * (-logs).exp()[..., None], delta * (-logs).exp(), top
        else:  # in bfloat16 the scores themselves are no better known
            lse = top + logs
        dq, dk, dv = (torch.zeros(*x.shape[:3], call[-1][4]) for x in (q, k, v))
        queries, keys, slopes = (_Rows(x, pack) for x in (q, k, grad))
        rows = (queries.words, queries.down, keys.words, keys.down, _Rows(v, pack).words)
        statistics = (x.contiguous().view(-1).numpy() for x in (lse, delta))
        results = (x.view(-1).numpy() for x in (dq, dk, dv))
        split(
            backward,
            (*rows, *statistics, slopes.words, slopes.down, *results, *call, np.float32(ctx.scale)),
            k.shape[0] * k.shape[1],
            optimize=1,
        )
        back = [x[..., : q.shape[-1]].to(like.dtype) for x, like in ((dq, q), (dk, k), (dv, v))]
        return (*back, None, None)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, D] in the dtype of q, and log-sum-exp [B, Hq, Tq] in float32; both may be differentiated."""
    return _Attend.apply(q, k, v, mask, scale)  # type: ignore[return-value]
