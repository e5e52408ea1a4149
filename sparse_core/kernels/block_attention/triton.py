"""Block-sparse attention on a GPU: one program per query tile forward, per query tile and per key tile backward.

Rows of the mask come as compressed lists with a pattern per entry, as the CPU kernel reads them: -1 for a block that is
kept whole, else an index into the token patterns. Statistics are float32, products run in the dtype of the inputs. The
forward pass starts with the longest rows, so that unequal rows do not leave the GPU waiting for one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_core import counters

if TYPE_CHECKING:
    from sparse_core.attention.masks import BlockMask


LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def _load(pointer, rows, columns, limit, width: tl.constexpr, stride: tl.constexpr):
    inside = (rows < limit)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _pattern(tiles, which, i, j, bq: tl.constexpr, bk: tl.constexpr):
    return tl.load(tiles + (which * bq + i[:, None]) * bk + j[None, :]) != 0


@triton.jit
def forward(q, k, v, out, lse, offsets, columns, pattern, tiles, order, hq, hkv, tq, tk, scale, mb, mh, per_head,
            bq: tl.constexpr, bk: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, tile_q: tl.constexpr,
            tile_k: tl.constexpr):  # fmt: skip
    """Output and log-sum-exp of one tile of queries; order: tiles of all samples and heads, longest rows first."""
    task = tl.load(order + tl.program_id(0))
    head, tile = task // per_head, task % per_head
    sample, h = head // hq, head % hq
    start = tile * tile_q
    row = (tl.where(mb > 1, sample, 0) * mh + tl.where(mh > 1, h, 0)) * tl.cdiv(tq, bq) + start // bq
    queries, d = start + tl.arange(0, tile_q), tl.arange(0, padded)
    keys_at = ((sample * hkv + h // (hq // hkv)).to(tl.int64)) * tk * width
    here = head.to(tl.int64) * tq
    near_q = _load(q + here * width, queries, d, tq, width, width)
    m = tl.full([tile_q], NOTHING, tl.float32)
    total = tl.zeros([tile_q], tl.float32)
    result = tl.zeros([tile_q, padded], tl.float32)
    for entry in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        first, which = tl.load(columns + entry) * bk, tl.load(pattern + entry)
        for inner in range(0, bk, tile_k):
            j = inner + tl.arange(0, tile_k)
            keys = first + j
            near_k = _load(k + keys_at, keys, d, tk, width, width)
            s = tl.dot(near_q, tl.trans(near_k)).to(tl.float32) * (scale * LOG2E)
            kept = (keys < tk)[None, :] & (queries < tq)[:, None]
            if which >= 0:
                kept = kept & _pattern(tiles, which, queries % bq, j, bq, bk)
            s = tl.where(kept, s, NOTHING)
            best = tl.maximum(m, tl.max(s, 1))
            p = tl.where(kept, tl.exp2(s - best[:, None]), 0.0)
            shrink = tl.exp2(m - best)
            total = total * shrink + tl.sum(p, 1)
            near_v = _load(v + keys_at, keys, d, tk, width, width)
            result = result * shrink[:, None] + tl.dot(p.to(near_v.dtype), near_v).to(tl.float32)
            m = best
    some = total > 0
    result = result / tl.where(some, total, 1.0)[:, None]
    inside = (queries < tq)[:, None] & (d < width)[None, :]
    tl.store(
        out + (here + queries)[:, None] * width + d[None, :], result.to(out.dtype.element_ty), mask=inside
    )
    found = tl.where(some, m / LOG2E + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(lse + here + queries, found, mask=queries < tq)


@triton.jit
def _weights(near_q, near_k, grad, near_v, logs, delta, kept, scale):
    """p [queries, keys] and ds of one tile."""
    s = tl.dot(near_q, tl.trans(near_k)).to(tl.float32) * scale
    p = tl.where(kept, tl.exp2((s - logs[:, None]) * LOG2E), 0.0)
    dp = tl.dot(grad, tl.trans(near_v)).to(tl.float32)
    return p, tl.where(kept, p * (dp - delta[:, None]), 0.0)


@triton.jit
def backward_queries(q, k, v, grad, lse, delta, dq, offsets, columns, pattern, tiles, hq, hkv, tq, tk, scale, mb, mh,
                     per_head, bq: tl.constexpr, bk: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
                     tile_q: tl.constexpr, tile_k: tl.constexpr):  # fmt: skip
    """Gradient of one tile of queries, over the row lists."""
    task = tl.program_id(0)
    head, tile = task // per_head, task % per_head
    sample, h = head // hq, head % hq
    start = tile * tile_q
    row = (tl.where(mb > 1, sample, 0) * mh + tl.where(mh > 1, h, 0)) * tl.cdiv(tq, bq) + start // bq
    queries, d = start + tl.arange(0, tile_q), tl.arange(0, padded)
    keys_at = ((sample * hkv + h // (hq // hkv)).to(tl.int64)) * tk * width
    here = head.to(tl.int64) * tq
    near_q = _load(q + here * width, queries, d, tq, width, width)
    near_grad = _load(grad + here * width, queries, d, tq, width, width)
    logs = tl.load(lse + here + queries, mask=queries < tq, other=0.0)
    known = logs > NOTHING
    logs = tl.where(known, logs, 0.0)
    mean = tl.load(delta + here + queries, mask=queries < tq, other=0.0)
    result = tl.zeros([tile_q, padded], tl.float32)
    for entry in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        first, which = tl.load(columns + entry) * bk, tl.load(pattern + entry)
        for inner in range(0, bk, tile_k):
            j = inner + tl.arange(0, tile_k)
            keys = first + j
            near_k = _load(k + keys_at, keys, d, tk, width, width)
            near_v = _load(v + keys_at, keys, d, tk, width, width)
            kept = (keys < tk)[None, :] & ((queries < tq) & known)[:, None]
            if which >= 0:
                kept = kept & _pattern(tiles, which, queries % bq, j, bq, bk)
            _, ds = _weights(near_q, near_k, near_grad, near_v, logs, mean, kept, scale)
            result += tl.dot(ds.to(near_k.dtype), near_k).to(tl.float32)
    inside = (queries < tq)[:, None] & (d < width)[None, :]
    place = dq + (here + queries)[:, None] * width + d[None, :]
    tl.store(place, (result * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def backward_keys(q, k, v, grad, lse, delta, dk, dv, offsets, columns, pattern, tiles, hq, hkv, tq, tk, scale, mb, mh,
                  per_head, bq: tl.constexpr, bk: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
                  tile_q: tl.constexpr, tile_k: tl.constexpr):  # fmt: skip
    """Gradients of one tile of keys and values, over the transposed lists, for all query heads of the group."""
    task = tl.program_id(0)
    head, tile = task // per_head, task % per_head
    sample, g, group = head // hkv, head % hkv, hq // hkv
    start = tile * tile_k
    keys, d = start + tl.arange(0, tile_k), tl.arange(0, padded)
    keys_at = head.to(tl.int64) * tk * width
    near_k = _load(k + keys_at, keys, d, tk, width, width)
    near_v = _load(v + keys_at, keys, d, tk, width, width)
    sum_k, sum_v = tl.zeros([tile_k, padded], tl.float32), tl.zeros([tile_k, padded], tl.float32)
    for h in range(g * group, (g + 1) * group):
        row = (tl.where(mb > 1, sample, 0) * mh + tl.where(mh > 1, h, 0)) * tl.cdiv(tk, bk) + start // bk
        here = (sample * hq + h).to(tl.int64) * tq
        for entry in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
            first, which = tl.load(columns + entry) * bq, tl.load(pattern + entry)
            for inner in range(0, bq, tile_q):
                i = inner + tl.arange(0, tile_q)
                queries = first + i
                near_q = _load(q + here * width, queries, d, tq, width, width)
                near_grad = _load(grad + here * width, queries, d, tq, width, width)
                logs = tl.load(lse + here + queries, mask=queries < tq, other=0.0)
                known = logs > NOTHING
                logs = tl.where(known, logs, 0.0)
                mean = tl.load(delta + here + queries, mask=queries < tq, other=0.0)
                kept = (keys < tk)[None, :] & ((queries < tq) & known)[:, None]
                if which >= 0:
                    kept = kept & _pattern(tiles, which, i, keys % bk, bq, bk)
                p, ds = _weights(near_q, near_k, near_grad, near_v, logs, mean, kept, scale)
                sum_v += tl.dot(tl.trans(p).to(near_grad.dtype), near_grad).to(tl.float32)
                sum_k += tl.dot(tl.trans(ds).to(near_q.dtype), near_q).to(tl.float32)
    inside = (keys < tk)[:, None] & (d < width)[None, :]
    place = keys_at + keys[:, None] * width + d[None, :]
    tl.store(dk + place, (sum_k * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + place, sum_v.to(dv.dtype.element_ty), mask=inside)


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """What every kernel of a call is told, and the tiles it is cut into."""

    numbers: tuple[Any, ...]
    constants: dict[str, int]

    @property
    def tile_q(self) -> int:
        return self.constants["tile_q"]

    @property
    def tile_k(self) -> int:
        return self.constants["tile_k"]


def _launch(q: Tensor, k: Tensor, mask: BlockMask, scale: float) -> _Launch:
    (bq, bk), width = mask.block_size, q.shape[-1]
    if min(bq, bk) < 16:
        raise ValueError(
            f"block_size: expected at least 16 x 16 for triton, got {bq} x {bk}; use implementation='gather'"
        )
    constants = {
        "bq": bq, "bk": bk, "width": width, "padded": max(16, 2 ** math.ceil(math.log2(width))),
        "tile_q": min(bq, 128 if width <= 64 else 64), "tile_k": min(bk, 64),
    }  # fmt: skip
    numbers = (q.shape[1], k.shape[1], q.shape[2], k.shape[2], scale, mask.shape[0], mask.shape[1])
    return _Launch(numbers=numbers, constants=constants)


def _rows(mask: BlockMask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = mask.tiles[0].to(torch.uint8).contiguous()
    return (*mask.rows, tiles if tiles.numel() else tiles.new_zeros(1))


def _longest_first(mask: BlockMask, heads: tuple[int, int], tile: int, per_head: int) -> Tensor:
    """Tasks of the forward pass by falling number of key blocks."""
    lengths = (
        mask.blocks.sum(-1)
        .expand(*heads, -1)
        .repeat_interleave(max(1, mask.block_size[0] // tile), -1)[..., :per_head]
    )
    return lengths.flatten().argsort(descending=True, stable=True).int()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.contiguous() for x in (q, k, v))
        launch, mask = _launch(q, k, mask, scale), mask.to(q.device)
        per_head = triton.cdiv(q.shape[2], launch.tile_q)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
        order = _longest_first(mask, (q.shape[0], q.shape[1]), launch.tile_q, per_head)
        forward[(len(order),)](
            q, k, v, out, lse, *_rows(mask), order, *launch.numbers, per_head, **launch.constants
        )
        counters.reach(peak_tile_bytes=4 * launch.tile_q * launch.tile_k)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.launch = mask, launch
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse), (grad, grad_lse) = ctx.saved_tensors, gradients
        grad, launch = grad.contiguous(), ctx.launch
        delta = ((grad.float() * out.float()).sum(-1) - grad_lse).contiguous()
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        given = (q, k, v, grad, lse, delta)
        per_head = triton.cdiv(q.shape[2], launch.tile_q)
        backward_queries[(q.shape[0] * q.shape[1] * per_head,)](
            *given, dq, *_rows(ctx.mask), *launch.numbers, per_head, **launch.constants
        )
        across = ctx.mask.transpose()
        offsets, columns, pattern, tiles = _rows(across)
        per_head = triton.cdiv(k.shape[2], launch.tile_k)
        tiles = (
            tiles.mT.contiguous() if tiles.ndim == 3 else tiles
        )  # patterns are read queries down, keys across
        backward_keys[(k.shape[0] * k.shape[1] * per_head,)](
            *given, dk, dv, offsets, columns, pattern, tiles, *launch.numbers, per_head, **launch.constants
        )
        return dq, dk, dv, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, D] in the dtype of q, and log-sum-exp [B, Hq, Tq] in float32; both may be differentiated."""
    return _Attend.apply(q, k, v, mask, scale)  # type: ignore[return-value]
