"""Routing Transformer (arXiv 2003.05997): tokens attend within clusters that online k-means finds, in O(T^1.5 D).

With routing vectors r = LayerNorm(x), neither scaled nor shifted, and centroids mu_c of every head,

    S_c = the w tokens of largest r mu_c, in order of position,   out_i = mean over c with i in S_c of
          sum over j in S_c of softmax_j(q_i k_j / sqrt(D)) v_j,
    mu_c <- decay mu_c + (1 - decay) (mean of the r whose largest product is with mu_c).

A token may be in no cluster, where it gets 0, or in many. Half of the heads look at a window instead. When queries are
their own keys, a token does not look at itself unless it sees nothing else; otherwise queries and keys are picked apart,
and each have half a say in the centroids.

The choice leaks when causal: whether token i is among the w of a cluster depends on later tokens, although its sum never
reads them, so a decoder cannot repeat it. `causal_route='argmax'` does not leak: token i looks at the w most recent
tokens, itself among them, whose nearest centroid is the same.

Fidelity: adapted. Scores are of q and k as given, where the paper's are normalised; several clusters are averaged, where
the paper's code keeps one; centroids begin by Lloyd's algorithm on the first batch; `argmax` is ours.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from sparse_core.attention.estimators import share_heads
from sparse_core.attention.kmeans import (
    KMeansRouter,
    balanced_assignment,
    recent_assignment,
    routing_vectors,
)
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.masks import BlockMask, ClusterMask, window_mask
from sparse_core.kernels.block_attention import block_sparse_attention
from sparse_core.kernels.segment_attention import segment_attention
from sparse_core.registry import Method, configure, register


@dataclass(frozen=True, kw_only=True)
class Config:
    """num_clusters: about sqrt(T) of the first batch when None; window: tokens per cluster, T / num_clusters, rounded up,
    when None (the paper's sequences of 8192 tokens have 16 clusters of 512); local_heads: half of them when None;
    local_window: tokens that a local head sees at most, the window when None, two blocks of a power of two of 16 or more;
    strict: error where num_clusters does not divide T; skip_first: so many first layers of a model have local heads alone;
    auto_update: a layer moves its centroids in every forward pass of training, which
    gradient checkpointing would do twice: there, set False and call `update_centroids` after each step."""

    num_clusters: int | None = None
    window: int | None = None
    local_heads: int | None = None
    local_window: int | None = None
    causal: bool = True
    shared_qk: bool = False
    causal_route: str = "topw"
    decay: float = 0.999
    commitment: float = 1e-4
    strict: bool = False
    skip_first: int = 0
    auto_update: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_clusters", "window", "local_window"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if self.skip_first < 0:
            raise ValueError(f"skip_first: expected 0 layers or more, got {self.skip_first}")
        if not 0 <= self.decay < 1 or self.commitment < 0:
            raise ValueError(
                f"decay, commitment: expected 0 <= decay < 1 and 0 or more, got {self.decay} and {self.commitment}"
            )
        if self.causal_route not in ("topw", "argmax"):
            raise ValueError(f"causal_route: expected 'topw' or 'argmax', got {self.causal_route!r}")
        if self.causal_route == "argmax" and not (self.causal and self.shared_qk):
            raise ValueError(
                "causal_route: expected causal and shared_qk for 'argmax', got one without; take 'topw'"
            )


class Aux(TypedDict):
    """commit_loss: what to add to the loss. load [H, C]: share of the tokens whose nearest centroid it is; coverage [H]:
    share of the queries that are in a cluster, both of the routing heads. mask: what was attended to."""

    commit_loss: Tensor
    load: Tensor
    coverage: Tensor
    mask: RoutingMask


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingMask:
    """What the heads look at: the first `local_heads` a window, None if there are no such heads; the others clusters."""

    local: BlockMask | None
    local_heads: int
    routed: ClusterMask

    def to_token_mask(self) -> Tensor:
        """bool [B, H, T, T]. For tests: a token of several clusters gets the mean of them, see `ClusterMask`."""
        routed = self.routed.to_token_mask()
        if self.local is None:
            return routed
        local = self.local.to_token_mask().expand(len(routed), self.local_heads, -1, -1)
        return torch.cat([local, routed], 1)


class RoutingAttention(nn.Module):
    """Attention of `num_heads` heads of `head_dim` channels, the first `local_heads` of them over a window; `options` are
    the other fields of `Config`. After each step of training, `update_centroids`."""

    def __init__(
        self, num_heads: int, head_dim: int, num_clusters: int | None = None, window: int | None = None,
        local_heads: int | None = None, causal: bool = True, shared_qk: bool = True, decay: float = 0.999,
        commitment: float = 1e-4, **options: object,
    ):  # fmt: skip
        super().__init__()
        given = {
            "num_clusters": num_clusters, "window": window, "local_heads": local_heads, "causal": causal,
            "shared_qk": shared_qk, "decay": decay, "commitment": commitment,
        }  # fmt: skip
        self.config = config = configure(Config, {**given, **options})
        self.num_heads, self.local_heads = num_heads, num_heads // 2 if local_heads is None else local_heads
        if not 0 <= self.local_heads < num_heads:
            raise ValueError(
                f"local_heads: expected 0 to {num_heads - 1} so that one head is left to route, got {self.local_heads}"
            )
        self.router = KMeansRouter(
            num_heads - self.local_heads, num_clusters, head_dim, decay=decay, seed=config.seed
        )
        self._warned = False
        self._windows: dict[tuple[int, int, str], BlockMask] = {}

    def forward(
        self, q: Tensor, k: Tensor | None, v: Tensor, key_padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Aux]:
        """Output [B, Hq, T, D] and what comes with it, for q [B, Hq, T, D] and k, v [B, Hkv, T, D]; with shared_qk k is
        None or q itself. key_padding_mask: bool [B, T], True for tokens that are not there; they get 0.

        Raises ValueError for what does not fit, NaN in q or k, and fewer tokens than clusters; RuntimeError in evaluation
        before there are centroids.
        """
        mask, aux = self.route(q, k, key_padding_mask)
        return self.attend(q, k, v, mask), aux

    def route(
        self, q: Tensor, k: Tensor | None, key_padding_mask: Tensor | None = None
    ) -> tuple[RoutingMask, Aux]:
        """The choice alone. In training it initialises the centroids if need be and remembers what they are to follow."""
        there = self._there(q, key_padding_mask)
        groups = [routing_vectors(x) for x in self._routed(q, k)]
        self._check_length(q.shape[2])
        if self.training and not self.router.initialised:
            self._begin(groups, there)
        size = self._size(q.shape[2])
        with torch.no_grad():
            affinity = [self.router.affinity(r) for r in groups]
            assigned = [x.argmax(-1) for x in affinity]
            routed = self._clusters(affinity, assigned, size, there)
        local = self._window(q, size, there) if self.local_heads else None
        mask = RoutingMask(local=local, local_heads=self.local_heads, routed=routed)
        pairs = list(zip(groups, assigned, strict=True))
        if self.training:
            self.router.observe(pairs, there)
        losses = [self.router.commitment_loss(r, owners, there) for r, owners in pairs]
        aux: Aux = {
            "commit_loss": self.config.commitment
            * sum(losses, torch.zeros((), device=q.device))
            / len(losses),
            "load": _load(assigned, self.router.clusters(q.shape[2]), there),
            "coverage": routed.covered().sum((0, 2)) / _present(q, there).sum().clamp_min(1),
            "mask": mask,
        }
        return mask, aux

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor, mask: RoutingMask) -> Tensor:
        """[B, Hq, T, D] under a choice that `route` made."""
        k, first = self._keys(q, k), self.local_heads
        v = v if v.shape[1] == k.shape[1] else share_heads(v, k.shape[1])
        q2, k2, v2 = (_heads(x, self.num_heads, first) for x in (q, k, v))
        routed = segment_attention(q2, k2, v2, mask.routed)
        if mask.local is None:
            return routed
        q1, k1, v1 = (_heads(x, self.num_heads, 0, first) for x in (q, k, v))
        local: Tensor = block_sparse_attention(q1, k1, v1, mask.local)  # type: ignore[assignment]
        return torch.cat([local, routed], 1)

    def window(self, q: Tensor) -> BlockMask:
        """What a local head looks at."""
        return self._window(q, self._size(q.shape[2]), None)

    def _size(self, length: int) -> int:
        """Tokens of a cluster."""
        return min(length, self.config.window or -(-length // self.router.clusters(length)))

    def init_centroids(self, x: Tensor) -> None:
        """Lloyd's algorithm over queries, or queries and keys, x [B, Hq, T, D]; without it, the first batch in training
        serves."""
        self._check_length(x.shape[2])
        self.router.init_centroids(routing_vectors(_heads(x, self.num_heads, self.local_heads)))

    def update_centroids(self) -> None:
        """Move the centroids towards the means of all tokens since the last time. RuntimeError where there were none."""
        self.router.update()

    def _keys(self, q: Tensor, k: Tensor | None) -> Tensor:
        if q.ndim != 4 or q.shape[1] != self.num_heads:
            raise ValueError(f"q: expected [B, {self.num_heads}, T, D], got {list(q.shape)}")
        if self.config.shared_qk:
            if k is not None and k is not q:
                raise ValueError(
                    "k: expected None or q itself with shared_qk, got another tensor; set shared_qk=False"
                )
            return q
        if k is None or k.shape[2] != q.shape[2]:
            raise ValueError(
                f"k: expected keys of the {q.shape[2]} tokens of q, got {None if k is None else list(k.shape)}; "
                "set shared_qk=True for queries that are their own keys"
            )
        return k

    def _routed(self, q: Tensor, k: Tensor | None) -> list[Tensor]:
        """What is routed, of the routing heads: queries and, where they differ, keys."""
        k = self._keys(q, k)
        both = [q] if k is q else [q, share_heads(k, self.num_heads)]
        return [_heads(x, self.num_heads, self.local_heads) for x in both]

    def _there(self, q: Tensor, key_padding_mask: Tensor | None) -> Tensor | None:
        if key_padding_mask is None:
            return None
        if key_padding_mask.dtype != torch.bool or tuple(key_padding_mask.shape) != (q.shape[0], q.shape[2]):
            raise ValueError(
                f"key_padding_mask: expected bool [{q.shape[0]}, {q.shape[2]}], got {key_padding_mask.dtype} "
                f"{list(key_padding_mask.shape)}"
            )
        return ~key_padding_mask

    def _check_length(self, length: int) -> None:
        """Warns once, or raises when strict, where the clusters that were asked for do not divide the tokens."""
        clusters, asked = self.router.clusters(length), self.config.num_clusters
        if asked is None or length % clusters == 0 or (self._warned and not self.config.strict):
            return
        size = self.config.window or -(-length // clusters)
        sentence = f"num_clusters: expected one that divides {length} tokens, got {clusters}"
        if self.config.strict:
            raise ValueError(f"{sentence}; pad the tokens, or leave out strict for {size} per cluster")
        warnings.warn(f"{sentence}; every cluster takes {size} of them", stacklevel=4)
        self._warned = True

    def _begin(self, groups: list[Tensor], there: Tensor | None) -> None:
        there = there if there is None else there.repeat(1, len(groups))
        self.router.init_centroids(torch.cat(groups, 2), there)

    def _clusters(
        self, affinity: list[Tensor], assigned: list[Tensor], size: int, there: Tensor | None
    ) -> ClusterMask:
        length, shared = affinity[0].shape[2], self.config.shared_qk
        options = {"q_len": length, "kv_len": length, "causal": self.config.causal, "skip_self": shared}
        if self.config.causal_route == "argmax":
            own, near, allowed = recent_assignment(assigned[0], size, there)
            return ClusterMask(q_index=own, k_index=near, allowed=allowed, **options)
        index = [balanced_assignment(x, size, there) for x in affinity]
        return ClusterMask(q_index=index[0], k_index=index[-1], **options)

    def _window(self, q: Tensor, size: int, there: Tensor | None) -> BlockMask:
        """The local heads' mask, made once per length where there is no padding."""
        size, causal, lone = self.config.local_window or size, self.config.causal, self.config.shared_qk
        if there is not None:
            return window_mask(there, size, causal=causal, skip_self=lone)
        key = (q.shape[2], size, str(q.device))
        if key not in self._windows:
            self._windows[key] = window_mask(_present(q[:1], None), size, causal=causal, skip_self=lone)
        return self._windows[key]


def _heads(x: Tensor, heads: int, first: int, last: int | None = None) -> Tensor:
    """Of x [B, Hq or Hkv, ..], the heads that serve the query heads from `first` to before `last`."""
    last = heads if last is None else last
    group = heads // x.shape[1]
    if first % group or last % group:
        x, group = share_heads(x, heads), 1
    return x[:, first // group : last // group]


def _present(q: Tensor, there: Tensor | None) -> Tensor:
    return torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if there is None else there


def _load(assigned: list[Tensor], count: int, there: Tensor | None) -> Tensor:
    owners = torch.cat(assigned, 2)
    member = nn.functional.one_hot(owners, count).float()
    if there is not None:
        member = member * there.repeat(1, len(assigned))[:, None, :, None]
    total = member.sum((0, 2))
    return total / total.sum(-1, keepdim=True).clamp_min(1)


class RoutingLayer(AttentionLayer):
    """`RoutingAttention` as a layer: the mask says who is in which cluster. layer: its place in the model, for
    `skip_first`; the layers that do not route have a window, and nothing to learn."""

    def __init__(self, config: Config, num_heads: int, head_dim: int, *, layer: int | None = None):
        super().__init__()
        self.routes = layer is None or layer >= config.skip_first
        self.config, self.routing = config, RoutingAttention(num_heads, head_dim, **vars(config))
        self._loss: Tensor | None = None

    def mask(self, q: Tensor, k: Tensor, v: Tensor) -> RoutingMask | BlockMask:
        """The clusters of these tokens. In training the centroids begin with the first batch; `auto_update` moves them.
        Of a layer that does not route, a window."""
        if not self.routes:
            return self.routing.window(q)
        mask, aux = self.routing.route(q, k)
        self._loss = aux["commit_loss"] if self.training else None
        if self.training and self.config.auto_update:
            self.routing.update_centroids()
        return mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: RoutingMask | BlockMask) -> Tensor:
        """[B, Hq, T, D]."""
        if isinstance(mask, BlockMask):
            return block_sparse_attention(q, k, v, mask)  # type: ignore[return-value]
        return self.routing.attend(q, k, v, mask)

    def loss(self) -> Tensor | None:
        """The commitment loss of the last forward pass, None in evaluation."""
        return self._loss


METHOD = register(
    Method(
        name="attention/routing",
        paper="2003.05997",
        fidelity="adapted",
        config=Config,
        kind="train",
        make=lambda config, num_heads, head_dim: RoutingAttention(num_heads, head_dim, **vars(config)),
        layer=lambda config, heads, kv_heads, width: RoutingLayer(config, heads, width),
        planned=lambda config, plan, place: RoutingLayer(config, place.heads, place.width, layer=place.index),
        needs=("training",),
    )
)
