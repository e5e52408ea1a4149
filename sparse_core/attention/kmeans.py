"""Online k-means over tokens: centroids that follow the data without gradients, and clusters of equal size around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention.masks import IndexMask

ITERATIONS = 10  # of Lloyd's algorithm on the first batch


def routing_vectors(x: Tensor) -> Tensor:
    """Layer norm without scale or bias, in float32: all rows of x [.., D] get the length sqrt(D), so that of centroids of
    one length the nearest is that of the greatest product. ValueError for NaN."""
    if x.isnan().any():
        raise ValueError("x: expected numbers to route by, got NaN; check the layer before")
    return F.layer_norm(x.float(), x.shape[-1:])


def balanced_assignment(affinity: Tensor, size: int, there: Tensor | None = None) -> Tensor:
    """Every centroid picks the `size` tokens of highest affinity [B, H, T, C]: [B, H, C, size] in order of position.

    A token may be picked by no centroid or by many. Tokens that are not `there`, bool [B, T], are never picked; empty
    places are -1 and come last. Of equal affinities the lower position wins.
    """
    scores = affinity.mT
    if there is not None:
        scores = scores.masked_fill(~there[:, None, None], -torch.inf)
    index, length = IndexMask.from_topk(scores, size).index, scores.shape[-1]
    ordered = index.masked_fill(index < 0, length).sort(dim=-1).values
    return ordered.masked_fill(ordered == length, -1)


def recent_assignment(
    assigned: Tensor, size: int, there: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Every token with the `size` most recent ones, itself among them, of its bucket, `assigned` [B, H, T].

    Sorted by bucket and then by position, the tokens are cut into n runs of `size`: what a token is with lies in its own
    run or in the one before. Returns the tokens of each run [B, H, n, size] and of both [B, H, n, 2 size], -1 where there
    is none, and which of these pairs are meant, bool [B, H, n, size, 2 size]. Tokens not `there`, bool [B, T], are left
    out.
    """
    bucket, order = assigned.sort(dim=-1, stable=True)
    if there is not None:
        order = order.masked_fill(~there[:, None].expand_as(order).gather(-1, order), -1)
        # Absent tokens go to the end, or they would stand among the most recent ones.
        last = (order < 0).to(torch.uint8).sort(dim=-1, stable=True).indices
        bucket, order = bucket.gather(-1, last), order.gather(-1, last)
    spare = -assigned.shape[2] % size
    order, bucket = (F.pad(x, (size, spare), value=-1).unflatten(-1, (-1, size)) for x in (order, bucket))
    own, near, buckets = (
        order[:, :, 1:],
        *(torch.cat([x[:, :, :-1], x[:, :, 1:]], -1) for x in (order, bucket)),
    )
    back = size + torch.arange(size, device=own.device)[:, None] - torch.arange(2 * size, device=own.device)
    same = bucket[:, :, 1:, :, None] == buckets[..., None, :]
    return own, near, same & (back >= 0) & (back < size)


class KMeansRouter(nn.Module):
    """Centroids [H, C, D] of each head, a buffer: data moves them, gradients do not.

    num_clusters None: about sqrt(T) of the first batch. decay: what an update leaves of a centroid; seed: which rows of
    the first batch Lloyd's algorithm begins with.
    """

    centroids: Tensor
    initialised: Tensor

    def __init__(
        self, num_heads: int, num_clusters: int | None, dim: int, *, decay: float = 0.999, seed: int = 0
    ):
        super().__init__()
        if num_clusters is not None and num_clusters < 1:
            raise ValueError(f"num_clusters: expected at least 1, got {num_clusters}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected 0 or more and less than 1, got {decay}")
        self.num_clusters, self.decay, self.seed = num_clusters, decay, seed
        self.register_buffer("centroids", torch.zeros(num_heads, num_clusters or 0, dim))
        self.register_buffer("initialised", torch.tensor(False))
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def clusters(self, length: int) -> int:
        """How many there are, or would be after a first batch of `length` tokens. ValueError where that is more."""
        count = self.centroids.shape[1] or max(1, round(length**0.5))
        if count > length:
            raise ValueError(
                f"num_clusters: expected at most the {length} tokens, got {count}; take fewer or a longer sequence"
            )
        return count

    @torch.no_grad()
    def init_centroids(self, r: Tensor, there: Tensor | None = None, iterations: int = ITERATIONS) -> None:
        """Lloyd's algorithm over the routing vectors r [B, H, T, D], of tokens that are `there`, bool [B, T]."""
        rows = r.float().transpose(0, 1).flatten(1, 2)
        if there is not None:
            rows = rows[:, there.flatten()]
        if not rows.shape[1]:
            raise ValueError("x: expected at least one token to begin with, got padding alone")
        count = self.clusters(r.shape[2])
        order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(self.seed))
        first = order[torch.arange(count) % len(order)].to(rows.device)
        centroids = rows[:, first]
        for _ in range(iterations):
            sums, counts = _totals(rows, (rows @ centroids.mT).argmax(-1), count)
            centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
        if self.centroids.shape != centroids.shape:
            self.centroids = centroids.to(self.centroids)
        self.centroids.copy_(centroids)
        self.initialised.fill_(True)

    def affinity(self, r: Tensor) -> Tensor:
        """Products [B, H, T, C] of routing vectors r [B, H, T, D] and centroids. RuntimeError before there are any."""
        if not self.initialised:
            raise RuntimeError(
                "centroids not initialised: expected a forward pass in training mode before, got none; train, load a "
                "checkpoint, or call init_centroids(x)"
            )
        out = r @ self.centroids.to(r).mT
        counters.add(products=out.numel(), multiply_adds=out.numel() * r.shape[-1])
        return out

    def commitment_loss(self, r: Tensor, assigned: Tensor, there: Tensor | None = None) -> Tensor:
        """Mean square of r - mu over channels and tokens, mu being the centroids of `assigned` [B, H, T], held fixed."""
        heads = torch.arange(r.shape[1], device=r.device)[:, None]
        errors = (r - self.centroids.to(r)[heads, assigned]).square().mean(-1)
        if there is None:
            return errors.mean()
        return (errors * there[:, None]).sum() / (there.sum() * r.shape[1]).clamp_min(1)

    @torch.no_grad()
    def observe(self, groups: Sequence[tuple[Tensor, Tensor]], there: Tensor | None = None) -> None:
        """Remember, until the next `update`, groups of routing vectors [B, H, T, D] with their centroids [B, H, T]; each
        group, such as queries and keys, has the same say."""
        count = self.centroids.shape[1]
        sums, counts = [], []
        for r, assigned in groups:
            if there is not None:
                assigned = assigned.masked_fill(~there[:, None], count)
            rows, owners = (x.detach().transpose(0, 1).flatten(1, 2) for x in (r, assigned))
            totals = _totals(rows, owners, count + 1)
            sums.append(totals[0][:, :count])
            counts.append(totals[1][:, :count])
        new = torch.stack(sums), torch.stack(counts)
        self._sums = new[0] if self._sums is None else self._sums + new[0]
        self._counts = new[1] if self._counts is None else self._counts + new[1]

    @torch.no_grad()
    def update(self) -> None:
        """mu <- decay mu + (1 - decay) mean of what was observed; a centroid of no token stays. RuntimeError where nothing
        was observed since the last time."""
        if self._sums is None or self._counts is None:
            raise RuntimeError(
                "update: expected a forward pass in training mode since the last update, got none; run one first"
            )
        some = (self._counts > 0).float()
        weight = some / some.sum(0).clamp_min(1)
        mean = (weight * self._sums / self._counts.clamp_min(1)).sum(0)
        moved = self.decay * self.centroids + (1 - self.decay) * mean
        self.centroids.copy_(torch.where(some.any(0), moved, self.centroids))
        self._sums = self._counts = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        found = state_dict.get(f"{prefix}centroids")
        if found is not None and self.num_clusters is None:
            self.centroids = self.centroids.new_zeros(len(self.centroids), found.shape[1], found.shape[2])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _totals(rows: Tensor, owners: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums [H, C, D] and counts [H, C, 1] of rows [H, N, D] by the `count` owners [H, N] that they have."""
    member = F.one_hot(owners, count).to(rows)
    return member.mT @ rows, member.sum(1)[..., None]
