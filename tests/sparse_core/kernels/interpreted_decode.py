"""Run the Triton kernel of decoding on the CPU, in Triton's interpreter, against the definition. One line per case.

A program of its own, since TRITON_INTERPRET must be set before triton is imported. One processor is pretended, so that
lists are cut into at most four parts, and not at all where there are four programs without it.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_core import counters
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.masks import IndexMask, SpanPlan
from sparse_core.attention.span_cache import SpanKVCache
from sparse_core.kernels.gather_decode import decode_attention, triton

TOLERANCE = {torch.float32: 3e-6, torch.float64: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
generator = torch.Generator().manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def lists(*shape: int, kv_len: int) -> IndexMask:
    """Keys in no order, some twice, some places empty."""
    return IndexMask(index=torch.randint(-1, kv_len, shape, generator=generator), kv_len=kv_len)


def agree(name: str, q: Tensor, cache, selection, most: float | None = None) -> list[Tensor]:
    """Output, log-sum-exp and scores are those of the definition, and so is what is counted."""
    results, counted = [], []
    for implementation in ("triton", "reference"):
        with counters.count() as counter:
            found = decode_attention(
                q, cache, selection, return_lse=True, return_scores=True, implementation=implementation
            )
        results.append(found)
        counted.append((counter.products, counter.multiply_adds, counter.kv_bytes))
    most = TOLERANCE[q.dtype] if most is None else most
    for part, ours, exact in zip(("out", "lse", "scores"), *results, strict=True):
        assert ours.dtype == exact.dtype, name
        torch.testing.assert_close(
            ours, exact, atol=most, rtol=max(most, 1e-5), equal_nan=True,
            msg=lambda text, part=part: f"{name}, {part}: {text}",
        )  # fmt: skip
    assert counted[0] == counted[1], name
    print("agrees:", name, flush=True)
    return list(results[0])


def main() -> None:
    torch.set_num_threads(1)
    shared = runpy.run_path(str(Path(__file__).with_name("test_gather_decode.py")))
    for case in shared["CASES"]:
        q, k, v, selection = shared["draw"](case)
        agree(case, q, (k, v), selection)

    for dtype in TOLERANCE:
        for heads in (2, 4):  # two queries share a list, or each has its own
            q, k, v = (normal(1, h, t, 40, dtype=dtype) for h, t in ((4, 1), (2, 50), (2, 50)))
            agree(f"{dtype}, {heads} lists", q, (k, v), lists(1, heads, 1, 33, kv_len=50))
    q, k, v = (normal(1, 4, 1, 24), *(normal(1, 2, 50, 24, dtype=torch.bfloat16) for _ in range(2)))
    agree("queries wider than the cache", q, (k, v), lists(1, 2, 1, 33, kv_len=50))

    q, k, v = (normal(1, h, t, 16) for h, t in ((1, 1), (1, 400), (1, 400)))
    selection = lists(1, 1, 1, 300, kv_len=400)
    assert triton._parts(1, 300, 128, q.device) == (3, 128)
    agree("three parts", q, (k, v), selection)
    selection.index[..., 128:256] = -1
    agree("a part without keys", q, (k, v), selection)
    selection.index[...] = -1
    out, lse, _ = agree("parts without keys", q, (k, v), selection)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    agree("no places", q, (k, v), lists(1, 1, 1, 0, kv_len=400))
    q, k, v = (normal(2, h, t, 16) for h, t in ((4, 1), (2, 400), (2, 400)))
    assert triton._parts(8, 300, 128, q.device) == (1, 384)
    agree("several tiles", q, (k, v), lists(2, 4, 1, 300, kv_len=400))
    assert triton._parts(1, 1200, 128, q.device) == (4, 384)
    agree("parts of several tiles", q[:1, :1], (k[:1, :1], v[:1, :1]), lists(1, 1, 1, 1200, kv_len=400))
    triton.WAVES = 10_000
    assert triton._parts(1, 8100, 128, q.device) == (64, 128)
    agree(
        "as many parts as there may be", q[:1, :2], (k[:1, :1], v[:1, :1]), lists(1, 1, 1, 8100, kv_len=400)
    )
    triton.WAVES = 4

    q, k, v = (normal(2, h, t, 16) for h, t in ((40, 1), (1, 60), (1, 60)))
    agree("more queries of a list than a program takes", q, (k, v), lists(2, 1, 1, 50, kv_len=60))
    agree("and in half precision", q.half(), (k.half(), v.half()), lists(2, 1, 1, 50, kv_len=60))
    q, k, v = (normal(2, h, t, 16) for h, t in ((4, 1), (4, 60), (4, 60)))
    agree("one list for all", q, (k, v), lists(1, 1, 1, 50, kv_len=60))
    empty = lists(2, 4, 1, 50, kv_len=60)
    empty.index[0, 1] = -1
    out, lse, _ = agree("a head without keys", q, (k, v), empty)
    assert (out[0, 1] == 0).all()
    assert lse[0, 1] == -torch.inf
    agree("large scores", 100 * q, (k, v), lists(2, 4, 1, 50, kv_len=60), most=1e-3)

    turned = [normal(2, 60, 2, 16).transpose(1, 2) for _ in range(2)]
    wide = normal(2, 2, 60, 32)
    agree("tokens before heads", q, (turned[0], turned[1]), lists(2, 4, 1, 50, kv_len=60))
    agree("keys beside values", q, (wide[..., :16], wide[..., 16:]), lists(2, 2, 1, 50, kv_len=60))
    agree("every second number", q, (wide[..., ::2], wide[..., 1::2]), lists(2, 2, 1, 50, kv_len=60))
    narrow = IndexMask(index=lists(2, 4, 1, 50, kv_len=60).index.int(), kv_len=60)
    agree("narrow integers", q, (k, v), narrow)

    selection = lists(2, 4, 1, 9, kv_len=60)
    named = selection.to_token_mask()[:, :, 0]
    holes = [x.masked_fill(~named[..., None], torch.nan) for x in (k, v)]
    assert agree("keys that are not named hold NaN", q, tuple(holes), selection)[0].isfinite().all()
    k[0, 0, 5, 3] = torch.nan
    selection.index[0, 0, 0, 4] = 5
    out, lse, _ = agree("a named one holds NaN", q, (k, v), selection)
    assert out[0, 0].isnan().all()
    assert lse[0, 0].isnan()
    assert out[0, 1:].isfinite().all()

    paged = KVCache(2, 2, 16, page=4)
    paged.append(normal(2, 2, 61, 16), normal(2, 2, 61, 16))
    paged.evict(torch.rand(2, 2, 15, generator=generator) < 0.3)
    pages = torch.randint(-1, 16, (2, 2, 1, 7), generator=generator)
    agree("pages", q, paged, IndexMask.from_pages(pages, 4, 61))
    agree("pages of query heads", q, paged, lists(2, 4, 1, 30, kv_len=61))
    spans = SpanPlan(sink=(2, 4), window=(8, 20))
    rings = SpanKVCache(spans, 2, 2, 16)
    rings.append(normal(2, 2, 61, 16), normal(2, 2, 61, 16))
    agree("spans in one buffer", q, rings, spans)

    q.requires_grad_()
    with pytest.raises(ValueError, match="expected none that needs a gradient for triton, got one; use"):
        decode_attention(q, paged, lists(2, 4, 1, 30, kv_len=61), implementation="triton")
    with torch.no_grad():
        agree("no gradient is asked for", q, paged, lists(2, 4, 1, 30, kv_len=61))


if __name__ == "__main__":
    main()
