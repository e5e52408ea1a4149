"""The key-value cache: what was appended comes back, whatever the pages; eviction, side caches, offload."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.masks import IndexMask
from sparse_core.kernels.gather_decode import decode_attention


def draw(n, seed=0, heads=2, width=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, n, width, generator=generator) for _ in range(2)]


def fill(k, v, sizes, **options):
    cache = KVCache(2, k.shape[1], k.shape[3], **options)
    start = 0
    for size in sizes:
        cache.append(k[:, :, start : start + size], v[:, :, start : start + size])
        start += size
    return cache


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.sampled_from([1, 4, 16]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_was_appended_comes_back(sizes, page, offload):
    k, v = draw(sum(sizes))
    cache = fill(k, v, sizes, page=page, offload=offload)
    assert torch.equal(cache.keys, k)
    assert torch.equal(cache.values, v)
    assert cache.shape == k.shape


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_decoding_reads_the_cache_as_it_reads_tensors(offload, heads):
    k, v = draw(37)
    cache = fill(k, v, (20, 1, 16), page=4, offload=offload)
    q = torch.randn(2, heads, 1, 8, generator=torch.Generator().manual_seed(3))
    scores = torch.rand(2, heads, 1, 37, generator=torch.Generator().manual_seed(4))
    selection = IndexMask.from_topk(scores, 9)
    torch.testing.assert_close(decode_attention(q, cache, selection), decode_attention(q, (k, v), selection))


def test_evicted_pages_are_gone_for_their_head_alone_and_used_again():
    k, v = draw(16)
    cache = fill(k, v, (16,), page=4)
    pages = torch.zeros(2, 2, 4, dtype=torch.bool)
    pages[0, 1, :2] = True
    before = cache.bytes
    cache.evict(pages)
    held = torch.ones(2, 2, 16, dtype=torch.bool)
    held[0, 1, :8] = False
    assert torch.equal(cache.held(), held)
    assert torch.equal(cache.keys, k * held[..., None])
    pages[:] = True
    cache.evict(pages)
    later = draw(16, seed=1)
    cache.append(*later)
    assert torch.equal(cache.keys[:, :, 16:], later[0])
    assert cache.bytes == before


def test_a_head_that_forgets_needs_constant_memory():
    cache, seen = KVCache(1, 1, 8, page=4), []
    for step in range(200):
        x = torch.full((1, 1, 1, 8), float(step))
        cache.append(x, x)
        old = torch.arange(-(-cache.length // 4)) < (cache.length - 12) // 4
        cache.evict(old[None, None])
        seen.append(cache.bytes)
    assert seen[-1] == seen[50]
    assert cache.keys[0, 0, -12:, 0].tolist() == list(range(188, 200))


class Operations(TorchDispatchMode):
    """How many operations torch was asked for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_prefill_of_single_token_pages_opens_them_together_and_the_next_token_adds_an_eighth():
    k, v = (torch.zeros(1, 2, 2**15, 8) for _ in range(2))
    cache = KVCache(1, 2, 8, page=1)
    with Operations() as done:
        cache.append(k, v)
    assert done.count < 100  # page by page it were some for each of 32,768
    exact = 2 * k.numel() * k.element_size()
    assert cache.bytes == exact
    cache.append(k[:, :, :1], v[:, :, :1])
    assert cache.bytes == exact * 9 // 8
    sizes = []
    for _ in range(40):
        cache.append(k[:, :, :1000], v[:, :, :1000])
        sizes.append(cache.bytes / (exact * cache.shape[2] / 2**15))
    assert max(sizes) <= 9 / 8 + 1e-3


def test_heads_that_gave_back_different_pages_take_their_own_free_ones():
    k, v = draw(32)
    cache = fill(k, v, (32,), page=4)
    pages = torch.zeros(2, 2, 8, dtype=torch.bool)
    pages[0, 0, :3], pages[0, 1, 5], pages[1, 0, [0, 6]] = True, True, True
    cache.evict(pages)
    before = cache.bytes
    later = draw(23, seed=1)
    cache.append(*later)
    held = ~pages.repeat_interleave(4, 2)[..., None]
    assert torch.equal(cache.keys, torch.cat([k * held, later[0]], 2))
    assert torch.equal(cache.values, torch.cat([v * held, later[1]], 2))
    assert before < cache.bytes <= before * (32 + 24) / 32


def test_a_side_cache_that_refuses_leaves_everything_as_it_was():
    k, v = draw(6)
    cache = KVCache(2, 2, 8, page=4)

    def positive(k, v):
        if (k == 7).any():
            raise ValueError("no sevens")
        return k[..., :1]

    cache.keep_beside("first", positive)
    cache.append(k, v)
    before = cache.bytes
    with pytest.raises(ValueError, match="no sevens"):
        cache.append(torch.full((2, 2, 40, 8), 7.0), torch.zeros(2, 2, 40, 8))
    assert (cache.bytes, cache.shape[2]) == (before, 6)
    assert torch.equal(cache.side("first"), k[..., :1])


def test_evicted_keys_are_absent_in_decoding():
    k, v = draw(16)
    cache = fill(k, v, (16,), page=4)
    cache.evict(torch.tensor([True, False, False, False]).expand(2, 2, 4))
    q = torch.randn(2, 2, 1, 8)
    everything = IndexMask(index=torch.arange(16).expand(2, 2, 1, 16), kv_len=16)
    rest = IndexMask(index=torch.arange(4, 16).expand(2, 2, 1, 12), kv_len=16)
    torch.testing.assert_close(decode_attention(q, cache, everything), decode_attention(q, (k, v), rest))


def test_the_page_that_is_being_filled_stays():
    cache = fill(*draw(6), (6,), page=4)
    cache.evict(torch.ones(2, 2, 2, dtype=torch.bool))
    assert cache.held()[0, 0].tolist() == [False] * 4 + [True] * 2


def test_side_caches_keep_what_was_asked():
    k, v = draw(10)
    cache = KVCache(2, 2, 8)
    cache.keep_beside("first", lambda k, v: k[..., :3])
    for part in range(0, 10, 5):
        cache.append(k[:, :, part : part + 5], v[:, :, part : part + 5])
    assert torch.equal(cache.side("first"), k[..., :3])


REFUSED = {
    "page: expected a power of two, got 3": lambda: KVCache(1, 1, 8, page=3),
    "batch, heads, width: expected at least 1 each, got 1, 0, 8": lambda: KVCache(1, 0, 8),
    r"k, v: expected both \[1, 2, n, 8\], got": lambda: KVCache(1, 2, 8).append(*draw(3)),
    "side: expected one of none, got 'labels'": lambda: KVCache(1, 1, 8).side("labels"),
    "late: expected an empty cache, got one of 6 tokens": lambda: fill(*draw(6), (6,)).keep_beside(
        "late", max
    ),
    "cache: expected at least one token, got none; prefill it first": lambda: KVCache(1, 1, 8).rows(
        torch.zeros(1, 1, 1)
    ),
    "positions: expected at most 5, got 6": lambda: fill(*draw(6), (6,)).rows(torch.full((2, 2, 1), 6)),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()


def test_decode_before_prefill_is_refused():
    selection = IndexMask(index=torch.zeros(1, 1, 1, 1, dtype=torch.long), kv_len=1)
    with pytest.raises(
        ValueError, match="cache: expected keys .* of at least one token, got .*; prefill it first"
    ):
        decode_attention(torch.zeros(1, 1, 1, 8), KVCache(1, 1, 8), selection)
