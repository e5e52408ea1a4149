"""Groups of tokens that attend to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterMask:
    """Clusters of tokens: the queries of a cluster look at its keys, and a query of several clusters gets their mean.

    q_index [B, H, C, w] and k_index [B, H, C, u] int64 name tokens, each at most once per cluster, below 0 where a place
    is empty; q_len queries and kv_len keys in all. causal: no key after the query. skip_self: no query looks at its own
    position unless it sees nothing else, as queries that are their own keys must (a token is always most like itself).
    allowed: bool that broadcasts to [B, H, C, w, u], further pairs that are left out. A query that sees no key in a
    cluster is not counted as one of it, and one without any gives 0.
    """

    q_index: Tensor
    k_index: Tensor
    q_len: int
    kv_len: int
    causal: bool = False
    skip_self: bool = False
    allowed: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = [list(index.shape) for index in (self.q_index, self.k_index)]
        if len(shapes[0]) != 4 or len(shapes[1]) != 4 or shapes[0][:3] != shapes[1][:3]:
            raise ValueError(
                f"q_index, k_index: expected [B, H, C, w] and [B, H, C, u], got {shapes[0]} and {shapes[1]}"
            )
        named = (("q_index", self.q_index, self.q_len), ("k_index", self.k_index, self.kv_len))
        for name, index, length in named:
            if index.numel() and int(index.max()) >= length:
                raise ValueError(f"{name}: expected tokens 0 to {length - 1}, got {int(index.max())}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, H, C]."""
        b, h, c, _ = self.q_index.shape
        return b, h, c

    def kept(self, first: int = 0, last: int | None = None) -> Tensor:
        """bool [B, H, n, w, u]: which pairs of the clusters from `first` to before `last` are looked at."""
        part = slice(first, last)
        i, j = self.q_index[:, :, part, :, None], self.k_index[:, :, part, None, :]
        kept = (i >= 0) & (j >= 0)
        if self.causal:
            kept = kept & (i >= j)
        if self.allowed is not None:
            kept = kept & self.allowed[:, :, part]
        if self.skip_self:
            others = kept & (i != j)
            kept = torch.where(others.any(-1, keepdim=True), others, kept)
        return kept

    def density(self) -> float:
        """Kept pairs as a share of all that a dense mask keeps: those of the past when causal. A pair of several clusters
        counts as often."""
        b, h, c = self.shape
        kept = sum(int(self.kept(n, n + 1).sum()) for n in range(c))
        pairs = self.q_len * (self.q_len + 1) // 2 if self.causal else self.q_len * self.kv_len
        return kept / (b * h * pairs)

    def covered(self) -> Tensor:
        """bool [B, H, q_len]: queries that are in at least one cluster."""
        index, none = self.q_index.flatten(2), self.q_len
        found = torch.zeros(*index.shape[:2], none + 1, dtype=torch.bool, device=index.device)
        return found.scatter_(-1, index.masked_fill(index < 0, none), True)[..., :none]

    def to_token_masks(self) -> Tensor:
        """bool [B, H, C, q_len, kv_len], one mask per cluster: attention is the mean, over those in which a query sees a
        key, of dense attention under each. For tests and the reference: C times as large as dense attention."""
        kept = self.kept()
        q, k = (
            index.masked_fill(index < 0, length)
            for index, length in ((self.q_index, self.q_len), (self.k_index, self.kv_len))
        )
        rows = kept.new_zeros(*kept.shape[:-1], self.kv_len + 1)
        rows.scatter_(-1, k[..., None, :].expand(kept.shape), kept)
        masks = kept.new_zeros(*kept.shape[:3], self.q_len + 1, self.kv_len + 1)
        masks.scatter_(-2, q[..., None].expand(rows.shape), rows)
        return masks[..., : self.q_len, : self.kv_len]

    def to_token_mask(self) -> Tensor:
        """bool [B, H, q_len, kv_len]: pairs of any cluster. For tests: it is as large as dense attention."""
        return self.to_token_masks().any(2)
