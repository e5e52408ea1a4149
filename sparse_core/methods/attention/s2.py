"""S2-Attention (arXiv 2407.17678): every head keeps the near blocks and a strided shard of the far ones.

With blocks i of queries and j of keys, l local blocks, stride v, and key-value head h of H,

    keep(i, j, h) = i >= j and (i - j < l or (j + h step + offset) mod v = 0),   step = max(1, floor(v / H)).

Positions are absolute, so a block that a row drops is never needed again and a decoder may forget it; together the heads
see everything only if the offsets h step mod v hit every residue. The last `num_dense_heads` key-value heads are dense,
and all query heads of a group share the pattern of their key-value head. Without `causal` positions are relative,
(max(0, |i - j| - l + 1) + h step + offset) mod v = 0: the paper's rule has no head offset there, without which every
head would keep the same blocks.

Fidelity: adapted. That offset is ours, and where the paper's kernels merge query tiles, ours cut blocks into tiles. Packed
sequences are attended to one after another, and decoding takes no padding.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_core.attention.kv_cache import KVCache
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.masks import BlockMask, IndexMask
from sparse_core.attention.masks import causal as causal_rule
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.gather_decode import decode_attention
from sparse_core.registry import Method, configure, register


@dataclass(frozen=True, kw_only=True)
class Config:
    """block tokens per block; local_blocks and stride in blocks; one_pattern: all heads keep the same shard."""

    block: int = 64
    local_blocks: int = 16
    stride: int = 8
    num_dense_heads: int = 0
    one_pattern: bool = False
    offset: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        if self.block < 16 or self.block & (self.block - 1):
            raise ValueError(f"block: expected a power of two of at least 16, got {self.block}")
        if self.local_blocks < 1 or self.stride < 1:
            raise ValueError(
                f"local_blocks and stride: expected at least 1, got {self.local_blocks} and {self.stride}"
            )


def local_stride_mask(
    num_heads: int, seq_len: int, block: int = 64, local_blocks: int = 16, stride: int = 8,
    num_kv_heads: int | None = None, num_dense_heads: int = 0, causal: bool = True, *,
    device: torch.device | str = "cpu", active_head_range: tuple[int, int] | None = None, **config: object,
) -> BlockMask:  # fmt: skip
    """The mask of `num_heads` query heads over `seq_len` tokens; what else is given are the other fields of `Config`.

    active_head_range: only these query heads, first and past the last, as a rank of a tensor-parallel model needs them.
    Warns where the heads together leave out blocks. Raises ValueError for head counts that do not divide.
    """
    given = {
        "block": block, "local_blocks": local_blocks, "stride": stride, "num_dense_heads": num_dense_heads,
        "causal": causal,
    }  # fmt: skip
    settings, kv_heads = configure(Config, {**given, **config}), num_kv_heads or num_heads
    kept = _shards(settings, kv_heads, -(-seq_len // settings.block), device)
    if num_heads % kv_heads:
        raise ValueError(f"num_heads: expected a multiple of the {kv_heads} key-value heads, got {num_heads}")
    kept = kept.repeat_interleave(num_heads // kv_heads, 0)
    first, last = active_head_range or (0, num_heads)
    if not 0 <= first < last <= num_heads:
        raise ValueError(
            f"active_head_range: expected 0 <= first < last <= {num_heads}, got {first} and {last}"
        )
    diagonal = torch.eye(kept.shape[-1], dtype=torch.bool, device=kept.device)
    mask = BlockMask.from_dense_blocks(
        kept[None, first:last], full=kept[None, first:last] & ~diagonal if settings.causal else None,
        rule=causal_rule if settings.causal else None, block_size=settings.block, q_len=seq_len, kv_len=seq_len,
    )  # fmt: skip
    possible = (
        diagonal.new_ones(diagonal.shape).tril() if settings.causal else diagonal.new_ones(diagonal.shape)
    )
    missing = possible & ~kept.any(0)
    if missing.any():
        warnings.warn(
            f"s2: {kv_heads} heads with stride {settings.stride} leave out {int(missing.sum())} of {int(possible.sum())} "
            "blocks; take at least as many heads as the stride, or a stride that the heads divide evenly",
            stacklevel=2,
        )
    return mask


def _shards(config: Config, heads: int, blocks: int, device: torch.device | str) -> Tensor:
    """bool [H, K, K] of the key-value heads."""
    _check_heads(config, heads)
    i, j = torch.arange(blocks, device=device)[:, None], torch.arange(blocks, device=device)
    step = 0 if config.one_pattern else max(1, config.stride // heads)
    shift = torch.arange(heads, device=device)[:, None, None] * step + config.offset
    place = j if config.causal else ((i - j).abs() - config.local_blocks + 1).clamp_min(0)
    near = (i - j < config.local_blocks) if config.causal else (i - j).abs() < config.local_blocks
    kept = near | ((place + shift) % config.stride == 0)
    kept[heads - config.num_dense_heads :] = True
    return kept & (i >= j) if config.causal else kept


def _check_heads(config: Config, heads: int) -> None:
    if not 0 <= config.num_dense_heads <= heads:
        raise ValueError(
            f"num_dense_heads: expected 0 to the {heads} key-value heads, got {config.num_dense_heads}"
        )


def _check_causal(mask: BlockMask) -> None:
    (bq, bk), device = mask.block_size, mask.kv_num.device
    first = torch.arange(mask.shape[2], device=device)[:, None] * bq
    begin = torch.arange(mask.shape[3], device=device) * bk
    ahead = mask.blocks & (begin > first + bq - 1) | mask.full_blocks & (begin + bk - 1 > first)
    if ahead.any():
        i, j = ahead.nonzero()[0, 2:].tolist()
        raise ValueError(
            f"mask: expected one that never looks ahead, got keys of block {j} for queries of block {i}; "
            "make it with causal, or set causal=False"
        )


def _roll(x: Tensor, places: Tensor) -> Tensor:
    """Of x [B, H, T, D] the tokens at places [B, T], which go round."""
    return x.gather(2, (places % x.shape[2])[:, None, :, None].expand(x.shape))


class ShardedAttention(AttentionLayer):
    """Attention of q [B, Hq, T, D] over k, v [B, Hkv, T, D] under the sharded mask, for training, prefill and decoding."""

    def __init__(self, config: Config, num_heads: int, num_kv_heads: int | None = None):
        super().__init__()
        self.config, self.num_heads, self.num_kv_heads = config, num_heads, num_kv_heads or num_heads
        _check_heads(config, self.num_kv_heads)
        self._masks: dict[tuple[int, str], BlockMask] = {}

    def mask(self, q: Tensor, k: Tensor, v: Tensor) -> BlockMask:
        """The mask of this length, made once."""
        return self.mask_of(q.shape[2], q.device)

    def mask_of(self, seq_len: int, device: torch.device | str = "cpu") -> BlockMask:
        """The mask of a length, made once."""
        key = (seq_len, str(device))
        if key not in self._masks:
            self._masks[key] = local_stride_mask(
                self.num_heads, seq_len, num_kv_heads=self.num_kv_heads, device=device, **vars(self.config)
            )
        return self._masks[key]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        """[B, Hq, T, D]. With a causal config, a mask made elsewhere raises ValueError if it looks ahead, and is warned of
        if it comes back to a block that it dropped, which a decoder has forgotten by then."""
        if self.config.causal and all(mask is not own for own in self._masks.values()):
            _check_causal(mask)
            if not mask.kv_efficient():
                warnings.warn(
                    "mask: expected one that never needs a dropped block again, got one that does; no decoder can follow",
                    stacklevel=2,
                )
        return block_sparse_attention(q, k, v, mask)  # type: ignore[return-value]

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        """[B, Hq, T, D] of sequences of these lengths that lie one behind the other, none of which sees another."""
        if min(lengths, default=0) < 1 or sum(lengths) != q.shape[2]:
            raise ValueError(
                f"lengths: expected at least 1 each and {q.shape[2]} in all, got {list(lengths)}; count the tokens"
            )
        ends = list(itertools.accumulate(lengths, initial=0))
        parts = []
        for first, last in itertools.pairwise(ends):
            one, mask = slice(first, last), self.mask_of(last - first, q.device)
            parts.append(self.attend(q[:, :, one], k[:, :, one], v[:, :, one], mask))
        return torch.cat(parts, 2)

    def attend_left_padded(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        """[B, Hq, T, D] of samples that begin with padding int64 [B] tokens which are not there. Blocks are counted from
        the first token that is, as without padding; the others get 0."""
        length, token = q.shape[2], torch.arange(q.shape[2], device=q.device)
        if not self.config.causal:
            raise ValueError("padding: expected a causal config, got one that looks ahead; set causal=True")
        if padding.shape != q.shape[:1] or int(padding.min()) < 0 or int(padding.max()) > length:
            raise ValueError(f"padding: expected {q.shape[0]} of 0 to {length}, got {padding.tolist()}")
        shift = padding[:, None]
        # Moved behind the tokens that are there, which never look ahead, padding is out of sight.
        gone = (token >= length - shift)[:, None, :, None]
        q, k, v = (_roll(x, token + shift).masked_fill(gone, 0) for x in (q, k, v))
        out = _roll(self.attend(q, k, v, self.mask_of(length, q.device)), token - shift)
        return out.masked_fill((token < shift)[:, None, :, None], 0)

    def decode(self, q1: Tensor, cache: KVCache) -> Tensor:
        """[B, Hq, 1, D] of the newest token, whose key and value are in the cache already; then the pages that no later
        token needs are given back. The cache's pages must be no longer than a block."""
        if not self.config.causal:
            raise ValueError("decode: expected a causal config, got one that looks ahead; set causal=True")
        if self.config.block % cache.page:
            raise ValueError(
                f"cache: expected pages that divide the block of {self.config.block}, got {cache.page}"
            )
        length = cache.shape[2]
        row = _shards(self.config, self.num_kv_heads, -(-length // self.config.block), q1.device)[:, -1]
        tokens = row.repeat_interleave(self.config.block, -1)[:, :length]
        most = int(tokens.sum(-1).max())
        order = (~tokens).to(torch.uint8).sort(dim=-1, stable=True).indices[:, :most]
        index = order.masked_fill(~tokens.gather(-1, order), -1)[None, :, None]
        out = decode_attention(q1, cache, IndexMask(index=index, kv_len=length))
        pages = ~row.repeat_interleave(self.config.block // cache.page, -1)
        cache.evict(pages[None, :, : -(-length // cache.page)])
        return out  # type: ignore[return-value]


METHOD = register(
    Method(
        name="attention/s2",
        paper="2407.17678",
        fidelity="adapted",
        config=Config,
        kind="prefill",
        make=ShardedAttention,
        layer=lambda config, heads, kv_heads, width: ShardedAttention(config, heads, kv_heads),
    )
)
