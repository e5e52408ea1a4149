"""What a rule keeps of single tokens: asked some blocks at a time, so that no [Tq, Tk] tensor ever exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""rule(b, h, i, j) -> bool: whether query i of head h and sample b looks at key j; index tensors that broadcast."""

CHUNK = 2**20  # token pairs whose rule is asked at once
WORD = 64  # pairs that an integer holds
TRUE = 0x0101010101010101  # eight bytes of True
GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: their bits, in order, in the highest byte


def classify(
    rule: Rule, blocks: Tensor, block_size: tuple[int, int], q_len: int, kv_len: int
) -> tuple[Tensor, Tensor]:
    """Of bool `blocks` [B, H, Kq, Kk], those of which `rule` keeps every pair, and those of which it keeps any."""
    places = blocks.flatten().nonzero()[:, 0]
    full, some = torch.zeros(2, blocks.numel(), dtype=torch.bool, device=blocks.device)
    for part, kept, _ in _ask(rule, places, blocks.shape, block_size, q_len, kv_len):
        if kept[0].numel() % 8:
            full[part], some[part] = kept.flatten(1).all(1), kept.flatten(1).any(1)
        else:  # several times as fast
            least, most = torch.aminmax(kept.flatten(1).view(torch.int64), dim=1)
            full[part], some[part] = least == TRUE, most != 0
    return full.view_as(blocks), some.view_as(blocks)


def distinct(
    rule: Rule, blocks: Tensor, block_size: tuple[int, int], q_len: int, kv_len: int
) -> tuple[Tensor, Tensor]:
    """The different patterns of bool `blocks` under `rule`, bool [n, bq, bk], and which one each of them has, in the order
    of `blocks.nonzero()`. Pairs past the last token are False.

    What is held is a bit per pair of the patterns that differ within a part, and a byte per pair of those that differ at
    all.
    """
    places, (bq, bk) = blocks.flatten().nonzero()[:, 0], block_size
    found, which, count = [], [], 0
    for _, kept, inside in _ask(rule, places, blocks.shape, block_size, q_len, kv_len):
        words, index = _unique(_pack(kept & inside))
        found.append(words)
        which.append(index + count)
        count += len(words)
    if not found:
        return torch.zeros(0, bq, bk, dtype=torch.bool, device=blocks.device), places
    words, index = _unique(torch.cat(found))
    return _unpack(words, bq * bk).view(-1, bq, bk), index[torch.cat(which)]


def _ask(
    rule: Rule, places: Tensor, shape: tuple[int, ...], block_size: tuple[int, int], q_len: int, kv_len: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For some of the blocks at `places` of [B, H, Kq, Kk] at a time: their places, what the rule keeps [n, bq, bk], and
    which pairs there are (bool that broadcasts). The rule may look into a table, and so is never asked about tokens that
    there are not: they stand for the last one."""
    (bq, bk), device = block_size, places.device
    i, j = torch.arange(bq, device=device)[:, None], torch.arange(bk, device=device)
    for part in places.split(max(1, CHUNK // (bq * bk))) if len(places) else ():
        b, h, row, column = (x[:, None, None] for x in torch.unravel_index(part, shape))
        query, key = row * bq + i, column * bk + j
        inside = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
        if q_len % bq:
            query, inside = query.clamp_max(q_len - 1), inside & (query < q_len)
        if kv_len % bk:
            key, inside = key.clamp_max(kv_len - 1), inside & (key < kv_len)
        kept = torch.as_tensor(rule(b, h, query, key), device=device).bool()
        yield part, kept.expand(len(part), bq, bk).contiguous(), inside


def _pack(kept: Tensor) -> Tensor:
    """bool [n, bq, bk] as int64 [n, words], a bit per pair."""
    kept = torch.nn.functional.pad(kept.flatten(1), (0, -kept[0].numel() % WORD))
    bits = (kept.contiguous().view(torch.int64) * GATHER >> 56) & 255
    return bits.to(torch.uint8).view(torch.int64)


def _unpack(words: Tensor, pairs: int) -> Tensor:
    """bool [n, pairs] of what `_pack` made."""
    bits = words.view(torch.uint8)[..., None] >> torch.arange(8, dtype=torch.uint8, device=words.device)
    return (bits & 1).bool().flatten(1)[:, :pairs]


def _unique(words: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of int64 [n, words], and which one each row is."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (words.shape[1],), generator=generator).to(words.device) * 2 + 1
    # Rows are sorted by one number each, in which high bits of a word tell rows apart as well as low ones.
    code = ((words ^ (words >> 32)) * factors).sum(1)
    values, which = code.unique(return_inverse=True)
    first = torch.full_like(values, len(words)).scatter_reduce_(
        0, which, torch.arange(len(words), device=words.device), "amin"
    )
    if torch.equal(words[first][which], words):
        return words[first], which
    unique, which = words.unique(dim=0, return_inverse=True)  # two different rows have one number
    return unique, which
