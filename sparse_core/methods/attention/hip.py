"""HiP attention (arXiv 2406.09827): a tree search finds each query block's key blocks in O(T log T), without training.

For a block of queries that may see N key blocks, [0, N) is cut into m = budget / block_k nodes. Every round halves each
node, scores each half by one key block in its middle, max over (query, key) of q k, and keeps the m best halves, until
nodes are single blocks. These, a sliding window and the first tokens are attended to exactly. A query row costs
2 budget log2(T / budget) dot products instead of T: below some eight thousand tokens at the paper's budget that is no
saving. A whole scan is what the method never makes, so keys without locality are found less well.

The choice leaks when causal: the queries of a block choose together, so which keys a query looks at depends on the up to
block_q - 1 queries after it, although it never looks at later keys. Only block_q = 1, as in decoding, does not leak.

Fidelity: exact (the paper's block version; the first block of a half may stand for it, as in the paper's draft code).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_core import counters
from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.masks import BlockMask, IndexMask, causal
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.gather_decode import decode_attention
from sparse_core.registry import Method, configure, register

KEYS = 2**22  # floats of keys that are gathered at once
Read = Callable[[Tensor, Tensor], Tensor]
"""Keys [N, P, D] at positions [N, P], each row for the query block `owner` [N] of B, H, n counted in that order."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """budget, window, sink in tokens; block_q, block_k tokens per block; rep: `mid` or `first` block of a half stands for
    it; q_stride: score only every so many query rows; refresh: decoding steps that share one search; dense_layers: so many
    first layers of a model attend to everything, in the paper's language models three."""

    budget: int = 512
    block_q: int = 32
    block_k: int = 2
    window: int = 256
    sink: int = 16
    causal: bool = True
    rep: str = "mid"
    q_stride: int = 1
    refresh: int = 8
    dense_layers: int = 0

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name}: expected a power of two, got {size}")
        if self.budget < 1 or self.budget % self.block_k:
            raise ValueError(f"budget: expected a multiple of block_k {self.block_k}, got {self.budget}")
        if self.rep not in ("mid", "first"):
            raise ValueError(f"rep: expected 'mid' or 'first', got {self.rep!r}")
        if min(self.window, self.sink, self.dense_layers) < 0 or min(self.q_stride, self.refresh) < 1:
            raise ValueError(
                "window, sink, dense_layers: expected 0 or more, and q_stride, refresh at least 1"
            )

    @property
    def nodes(self) -> int:
        """Key blocks that the search keeps."""
        return self.budget // self.block_k


def hip_mask(q: Tensor, k: Tensor, **config: object) -> BlockMask:
    """The mask [B, Hq, ..] of queries [B, Hq, Tq, D] over keys [B, Hkv, Tk, D]; keyword arguments are those of `Config`.

    When causal, the queries are the last Tq tokens. A budget of Tk or more keeps everything that may be seen.
    """
    settings = configure(Config, config)
    (b, hq, tq, d), (hkv, tk) = q.shape, k.shape[1:3]
    if hq % hkv:
        raise ValueError(f"heads: expected a multiple of the {hkv} key-value heads, got {hq} query heads")
    if settings.causal and tk < tq:
        raise ValueError(f"k: expected at least as many keys as the {tq} queries of a causal mask, got {tk}")
    bq, bk, group = settings.block_q, settings.block_k, hq // hkv
    blocks = -(-tq // bq)
    kept = torch.zeros(
        b, hq, blocks, -(-tk // bk) + 1, dtype=torch.bool, device=q.device
    )  # one more for none
    step = max(1, KEYS // max(1, b * hq * 2 * settings.budget * d))
    for first in range(0, blocks, step):
        rows = torch.arange(first * bq, min(tq, (first + step) * bq), device=q.device)
        tile = torch.nn.functional.pad(rows, (0, -len(rows) % bq), value=-1).view(-1, bq)[
            :, :: settings.q_stride
        ]
        ends = tile.amax(1) + 1 + (tk - tq) if settings.causal else torch.full_like(tile[:, 0], tk)
        if (
            settings.q_stride > 1 and settings.causal
        ):  # the last row of the block may not be among those that are scored
            ends = (torch.arange(first, first + len(tile), device=q.device) * bq + bq).clamp_max(tq) + (
                tk - tq
            )

        def read(owner: Tensor, at: Tensor, count: int = len(tile)) -> Tensor:
            sample, head = owner // (hq * count), owner // count % hq // group
            return k[sample[:, None], head[:, None], at]

        chosen = search(
            settings, q[:, :, tile.clamp_min(0)], tile + (tk - tq), -(-ends // bk), tk, read,
            max(1, tile.shape[1] // bk),
        )  # fmt: skip
        places = torch.where(chosen < 0, kept.shape[-1] - 1, chosen)
        kept[:, :, first : first + len(tile)].scatter_(-1, places, True)
    return _with_window(settings, kept[..., :-1], tq, tk)


def search(
    config: Config, q: Tensor, at: Tensor, ends: Tensor, length: int, read: Read, lane: int | None = None
) -> Tensor:
    """Key blocks [B, H, n, m] that the tree keeps, ascending and -1 where there are fewer.

    q [B, H, n, R, D]: the scored rows of n query blocks, tokens `at` [n, R] (below 0: no row); ends [n]: key blocks that
    they may see, of `length` keys. lane: see `_score`.
    """
    m = config.nodes
    edges = torch.arange(m + 1, device=q.device) * ends[:, None] // m
    low, high = (x.expand(*q.shape[:2], -1, -1).contiguous() for x in (edges[:, :-1], edges[:, 1:]))
    scores = torch.full_like(low, -torch.inf, dtype=torch.float32)
    while bool((high - low > 1).any()):
        middle = (low + high + 1) // 2
        # Blocks that are single and have their score keep it; halves of all others are looked at.
        open_ = (high - low > 1) | (scores == -torch.inf)
        scores = torch.stack([scores, torch.full_like(scores, -torch.inf)], -1).flatten(-2)
        low, high = (torch.stack(pair, -1).flatten(-2) for pair in ((low, middle), (middle, high)))
        asked = open_.repeat_interleave(2, -1) & (high > low)
        rep = low + (high - low) // 2 if config.rep == "mid" else low
        found = _score(config, q, at, rep, asked, length, read, lane)
        scores = torch.where(asked, found, scores).masked_fill(high <= low, -torch.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :m].sort(dim=-1).values
        low, high, scores = (x.gather(-1, best) for x in (low, high, scores))
    return torch.where(high > low, low, -1)


def _score(
    config: Config, q: Tensor, at: Tensor, rep: Tensor, asked: Tensor, length: int, read: Read, lane: int | None
) -> Tensor:  # fmt: skip
    """max over (row, key) of q k for those key blocks rep [B, H, n, C] that are `asked` for, without keys that a row may
    not see.

    Query blocks ask for different numbers of blocks. They are lined up in lanes of `lane` blocks that share a copy of the
    rows, and only the last lane of a query block is filled up; without `lane` each has one, as long as the longest.
    """
    bk, rows = config.block_k, q.flatten(0, 2)
    row, place = asked.flatten(0, 2).nonzero(as_tuple=True)
    count = asked.flatten(0, 2).sum(-1)
    lane, lanes = (int(count.max()), torch.ones_like(count)) if lane is None else (lane, -(-count // lane))
    owner = torch.arange(len(rows), device=q.device).repeat_interleave(lanes)
    rank = torch.arange(len(row), device=q.device) - (count.cumsum(0) - count)[row]
    slot = (lanes.cumsum(0) - lanes)[row] * lane + rank
    blocks = torch.full((len(owner) * lane,), -1, device=q.device)
    blocks[slot] = rep.flatten(0, 2)[row, place]
    places = blocks.view(-1, lane, 1) * bk + torch.arange(bk, device=q.device)
    places = places.flatten(1)
    keys = read(owner, places.clamp(0, length - 1))
    products = (rows[owner].float() @ keys.float().mT).float()  # even under autocast
    counters.add(products=products.numel(), multiply_adds=products.numel() * q.shape[-1])
    near = at[owner % len(at)][..., None]
    seen = ((places >= 0) & (places < length))[:, None] & (near >= 0)
    if config.causal:
        seen = seen & (near >= places[:, None])
    best = products.masked_fill(~seen, -torch.inf).unflatten(-1, (lane, bk)).amax((1, 3))
    found = torch.full_like(asked, -torch.inf, dtype=torch.float32).flatten(0, 2)
    found[row, place] = best.flatten()[slot]
    return found.view(asked.shape)


def _with_window(config: Config, kept: Tensor, tq: int, tk: int) -> BlockMask:
    """The chosen blocks, those of the window around each query and those of the first tokens."""
    bq, bk = config.block_q, config.block_k
    first = torch.arange(kept.shape[2], device=kept.device)[:, None] * bq + (tk - tq if config.causal else 0)
    last, j = first + bq - 1, torch.arange(kept.shape[3], device=kept.device)
    near = (j * bk + bk > first - config.window) & (
        j * bk <= (last if config.causal else last + config.window)
    )
    mask = kept | near | (j * bk < config.sink)
    sizes = {"block_size": (bq, bk), "q_len": tq, "kv_len": tk}
    if not config.causal:
        return BlockMask.from_dense_blocks(mask, **sizes)  # type: ignore[arg-type]
    shift = tk - tq
    full = mask & (j * bk + bk - 1 <= first)
    rule = causal if shift == 0 else lambda b, h, i, key: i + shift >= key
    return BlockMask.from_dense_blocks(mask & (j * bk <= last), full=full, rule=rule, **sizes)  # type: ignore[arg-type]


@dataclass
class Search:
    """What decoding keeps between steps: the chosen key blocks [B, H, 1, m], and how many steps ago they were found."""

    blocks: Tensor | None = None
    age: int = 0


class HiPAttention(AttentionLayer):
    """Attention under the mask that the tree search finds, for prefill and decoding. layer: the place of this layer in its
    model, for `dense_layers`."""

    def __init__(self, config: Config | None = None, *, layer: int | None = None):
        super().__init__()
        self.config, self.layer = config or Config(), layer

    @property
    def dense(self) -> bool:
        """Whether this is one of the first layers, which attend to everything."""
        return self.layer is not None and self.layer < self.config.dense_layers

    @torch.no_grad()
    def mask(self, q: Tensor, k: Tensor, v: Tensor) -> BlockMask:
        """The mask of these queries and keys; no gradient flows through the choice."""
        if not self.dense:
            return hip_mask(q, k, **vars(self.config))
        tq, tk = q.shape[2], k.shape[2]
        blocks = -(-tq // self.config.block_q), -(-tk // self.config.block_k)
        return _with_window(self.config, torch.ones(1, 1, *blocks, dtype=torch.bool, device=q.device), tq, tk)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        """[B, Hq, T, D]."""
        # The kernel for a GPU multiplies 16 keys at least, so smaller blocks are gathered there.
        way = "gather" if q.is_cuda and min(mask.block_size) < 16 else "auto"
        return block_sparse_attention(q, k, v, mask, implementation=way)  # type: ignore[return-value]

    def decode(self, q1: Tensor, cache: KVCache, state: Search) -> Tensor:
        """[B, Hq, 1, D] of the newest token, whose key and value are in the cache; every `refresh` steps it searches again
        and writes the result to `state`, in between it attends to what was found then."""
        length, config = cache.shape[2], self.config
        if self.dense:
            every = torch.arange(length, device=q1.device).expand(*q1.shape[:2], 1, -1)
            return decode_attention(q1, cache, IndexMask(index=every, kv_len=length))  # type: ignore[return-value]
        if state.blocks is None or state.age >= config.refresh:
            state.blocks, state.age = self._search(q1, cache), 0
        state.age += 1
        # Window and sink are whole blocks, as in the mask.
        bk = config.block_k
        begin, end = max(0, (length - 1 - config.window) // bk * bk), min(length, -(-config.sink // bk) * bk)
        always = torch.cat([torch.arange(min(begin, end)), torch.arange(begin, length)]).to(q1.device)
        chosen = state.blocks[..., None] * config.block_k + torch.arange(config.block_k, device=q1.device)
        chosen = chosen.masked_fill(state.blocks[..., None] < 0, -1).flatten(-2)
        again = (chosen < end) | (chosen >= begin)
        index = torch.cat([always.expand(*q1.shape[:2], 1, -1), chosen.masked_fill(again, -1)], -1)
        return decode_attention(q1, cache, IndexMask(index=index, kv_len=length))  # type: ignore[return-value]

    def _search(self, q1: Tensor, cache: KVCache) -> Tensor:
        (b, hkv, length, d), hq = cache.shape, q1.shape[1]

        def read(owner: Tensor, at: Tensor) -> Tensor:
            keys, _, rows = cache.rows(at.reshape(b, hkv, -1))
            found = keys.gather(2, rows.clamp_min(0)[..., None].expand(-1, -1, -1, d))
            return found.view(*at.shape, d)

        if not length:
            raise ValueError("cache: expected at least one token, got none; prefill it first")
        now = torch.tensor([[length - 1]], device=q1.device)
        ends = torch.tensor([-(-length // self.config.block_k)], device=q1.device)
        return search(self.config, q1[:, :, None].expand(-1, hq, -1, -1, -1), now, ends, length, read)


METHOD = register(
    Method(
        name="attention/hip",
        paper="2406.09827",
        fidelity="exact",
        config=Config,
        kind="prefill",
        make=HiPAttention,
        layer=lambda config, heads, kv_heads, width: HiPAttention(config),
        planned=lambda config, plan, place: HiPAttention(config, layer=place.index),
    )
)
