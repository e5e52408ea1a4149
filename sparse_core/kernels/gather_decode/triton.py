"""Decoding over selected keys on a GPU: the list of a head is cut into parts, so that one query fills the whole GPU.

A program reads one part of one list for the query heads that share it, in the dtype of the cache, and leaves an output
with its log-sum-exp in float32; a second kernel merges the parts of a head. Rows are gathered straight from the cache,
whatever its strides are: nothing is copied, and a page is a run of keys in the list.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
WAVES = 4  # programs that are wanted per processor: memory latency hides behind several of them
MOST = 64  # parts of a list, which the merge holds at once
GROUP = 32  # query heads per program, each with an output in its registers; half of them without matrix units
TILE = 2**14  # bytes of keys that a program reads at once
UNITS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _products(near_q, near_k, rows: tl.constexpr):
    """[rows, keys]. A single query would leave most of a matrix unit empty, and the memory is slower than either way."""
    if rows == 1:
        return tl.sum(near_k * near_q, 1)[None, :]
    else:
        return tl.dot(near_q, tl.trans(near_k), input_precision="ieee")


@triton.jit
def _mixed(weights, near_v, rows: tl.constexpr):
    """[rows, width]."""
    if rows == 1:
        return tl.sum(tl.trans(weights) * near_v, 0)[None, :]
    else:
        return tl.dot(weights.to(near_v.dtype), near_v, input_precision="ieee")


@triton.jit(do_not_specialize=["n", "chunk"])  # they change from step to step
def attend_part(q, k, v, index, out, lse, scores, n, chunk, scale, lists, group, sharing, index_sample, index_list,
                k_sample, k_head, v_sample, v_head, k_token: tl.constexpr, v_token: tl.constexpr, width: tl.constexpr,
                padded: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr, unit: tl.constexpr):  # fmt: skip
    """Output and log-sum-exp of one part of one list, and its scores.

    Program ids: sample, list and bundle of `rows` query heads; part. lists per sample, each read by `group` query heads;
    `sharing` lists read one head of the cache. unit: dtype of products.
    """
    bundles = tl.cdiv(group, rows)
    task, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    which = task // bundles  # of all samples
    sample, mine = which // lists, which % lists
    member, j, d = task % bundles * rows + tl.arange(0, rows), tl.arange(0, tile), tl.arange(0, padded)
    there, across = member < group, (d < width)[None, :]
    head = which * group + member
    k += sample * k_sample + mine // sharing * k_head
    v += sample * v_sample + mine // sharing * v_head
    index += sample * index_sample + mine * index_list
    near_q = tl.load(q + head[:, None] * width + d[None, :], mask=there[:, None] & across, other=0.0).to(unit)
    m = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    result = tl.zeros([rows, padded], tl.float32)
    first = part * chunk
    end = tl.minimum(first + chunk, n)
    key = tl.load(index + first + j, mask=first + j < end, other=-1).to(tl.int64)
    for start in range(first, end, tile):
        at = start + j
        kept = key >= 0
        inside = kept[:, None] & across
        # Keys, values and the next places are all asked for before the first of them is needed.
        near_k = tl.load(k + key[:, None] * k_token + d[None, :], mask=inside, other=0.0).to(unit)
        near_v = tl.load(v + key[:, None] * v_token + d[None, :], mask=inside, other=0.0).to(unit)
        key = tl.load(index + at + tile, mask=at + tile < end, other=-1).to(tl.int64)
        s = tl.where(kept[None, :], _products(near_q, near_k, rows) * scale, float("-inf"))
        tl.store(scores + head[:, None] * n + at[None, :], s, mask=there[:, None] & (at < end)[None, :])
        best = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(best == float("-inf"), 0.0, best)  # so that no infinity is taken from itself
        p = tl.exp2((s - safe[:, None]) * LOG2E)
        shrink = tl.exp2((m - safe) * LOG2E)
        total = total * shrink + tl.sum(p, 1)
        result = result * shrink[:, None] + _mixed(p, near_v, rows)
        m = best
    some = total != 0  # also of NaN
    divisor = tl.where(some, total, 1.0)
    slot = head * parts + part
    place = out + slot[:, None] * width + d[None, :]
    tl.store(place, (result / divisor[:, None]).to(out.dtype.element_ty), mask=there[:, None] & across)
    tl.store(lse + slot, tl.where(some, m + tl.log(divisor), float("-inf")), mask=there)


@triton.jit
def merge(part_out, part_lse, out, lse, parts, width: tl.constexpr, padded: tl.constexpr, most: tl.constexpr):
    """The parts of one head, as one softmax over all of its keys would have it."""
    head = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, most), tl.arange(0, padded)
    there, across = part < parts, d < width
    slot = head * parts + part
    near = tl.load(part_lse + slot, mask=there, other=float("-inf"))
    largest = tl.max(near, 0)
    safe = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2((near - safe) * LOG2E)
    total = tl.sum(weights, 0)
    some = total != 0
    divisor = tl.where(some, total, 1.0)
    inside = there[:, None] & across[None, :]
    near_out = tl.load(part_out + slot[:, None] * width + d[None, :], mask=inside, other=0.0)
    result = tl.sum(weights[:, None] * near_out, 0) / divisor
    tl.store(out + head * width + d, result.to(out.dtype.element_ty), mask=across)
    tl.store(lse + head, tl.where(some, safe + tl.log(divisor), float("-inf")))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _constants(q: Tensor, k: Tensor, v: Tensor, group: int) -> dict[str, Any]:
    """What the kernel is compiled for: strides, widths, tiles, and the dtype of products: float32 unless all are of one
    half precision."""
    width = q.shape[-1]
    padded = max(16, triton.next_power_of_2(width))
    tile = min(128, max(16, TILE // (padded * max(k.element_size(), v.element_size()))))
    unit = tl.float32
    # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    if group > 1 and q.dtype == k.dtype == v.dtype and (q.device.type != "cpu" or q.dtype == torch.float16):
        unit = UNITS.get(q.dtype, unit)
    most = GROUP // 2 if unit == tl.float32 else GROUP
    rows = 1 if group == 1 else min(most, max(16, triton.next_power_of_2(group)))
    return {
        "k_token": k.stride(2), "v_token": v.stride(2), "width": width, "padded": padded, "rows": rows, "tile": tile,
        "unit": unit,
    }  # fmt: skip


def _parts(programs: int, n: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Parts that each list of n keys is cut into, and keys per part, whole tiles."""
    wanted = min(MOST, triton.cdiv(WAVES * _processors(device), max(1, programs)))
    chunk = max(1, triton.cdiv(triton.cdiv(n, wanted), tile)) * tile
    return max(1, triton.cdiv(n, chunk)), chunk


def attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, Hq, D] in the dtype of q, log-sum-exp [B, Hq] and scores [B, Hq, n] in float32 of q [B, Hq, D] over the
    keys index [B, H, n] of k, v [B, Hkv, T, D], where H is Hq, or fewer and a group of query heads shares each list and
    what it names; not differentiable."""
    (b, hq, d), (lists, n) = q.shape, index.shape[1:]
    q = q.contiguous()
    k, v, index = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v, index))
    constants = _constants(q, k, v, hq // lists)
    programs = b * lists * triton.cdiv(hq // lists, constants["rows"])
    parts, chunk = _parts(programs, n, constants["tile"], q.device)
    exact = {"device": q.device, "dtype": torch.float32}
    out, lse, scores = torch.empty_like(q), torch.empty(b, hq, **exact), torch.empty(b, hq, n, **exact)
    part_out, part_lse = out, lse
    if parts > 1:
        part_out, part_lse = torch.empty(b, hq, parts, d, **exact), torch.empty(b, hq, parts, **exact)
    with torch.cuda.device_of(q):
        attend_part[(programs, parts)](
            q, k, v, index, part_out, part_lse, scores, n, chunk, scale, lists, hq // lists,
            lists // k.shape[1], *index.stride()[:2], *k.stride()[:2], *v.stride()[:2], **constants, num_stages=1
        )  # fmt: skip
        if parts > 1:
            sizes = {"width": d, "padded": constants["padded"], "most": MOST}
            merge[(b * hq,)](part_out, part_lse, out, lse, parts, **sizes)
    return out, lse, scores
