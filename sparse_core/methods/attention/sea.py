"""SEA (arXiv 2310.01777): linear attention guesses the map of a quadratic teacher; attention is exact where it is high.

    x_i    = enc(Performer(q, k, [e, v])_i, v_i),  e_j the identity [D, D] stretched over T tokens: where weight lies
    S      = dec(x) in [H, T, K],                  a CNN over queries and columns, all heads together
    M_i    = the H round(k K / L_i) highest of softmax(S_i), heads competing; L_i = T keys, or i + 1 if causal
    cell c of row i covers the keys floor(c L_i / K) to floor((c + 1) L_i / K),
    out_i  = b_i a_i softmax(q_i k_j / sqrt(D) : j in M_i) v + (1 - b_i) mean(v),  a_i, b_i = sigmoid(Linear(x_i)).

Training distils: 0.1 KL(A || softmax(up S)) + MSE(softmax(up S), A) + MSE of the outputs against those of the teacher's
map A [T, T], so a training step is quadratic. Inference holds nothing larger than [T, H K] and costs O(T (m D + K + k))
up to T = k K tokens; a head keeps a cell at least on average, so further on rows keep T / K keys: raise K with T.

Fidelity: adapted. The stretched identity is scaled by D, causal rows read it along the keys that they see, a row shorter
than K uses as many cells as it has keys, the budget follows L_i row by row, the gates begin nearly open, and widths of
the CNN that the paper leaves open are ours. LoRA and logits of the whole model are left to whoever trains the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_core import counters
from sparse_core.attention import select
from sparse_core.attention.estimators import share_heads
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.map_decoder import MapDecoder
from sparse_core.attention.masks import TokenCSR
from sparse_core.attention.performer import draw_projection, exp_features, linear_attention, relu_features
from sparse_core.distill import fit, full_attention
from sparse_core.kernels.csr_attention import csr_attention
from sparse_core.registry import Method, configure, register

OPEN = 3.0  # bias of the gates: a layer begins as little more than its sparse attention


@dataclass(frozen=True, kw_only=True)
class Config:
    """pred_len: columns K of the estimated map; k keys per query and head; nb_factor divides the D ln D random features,
    which are drawn anew every `redraw` training steps; scaler: with gates and the mean of v; kl_weight of the loss;
    positions: stretch e over so many tokens instead of T, so that a causal prefix gives what the whole gives."""

    pred_len: int = 128
    k: int = 64
    nb_factor: float = 1.0
    causal: bool = False
    redraw: int = 1000
    scaler: bool = True
    kl_weight: float = 0.1
    positions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pred_len < 4 or self.pred_len % 4:
            raise ValueError(f"pred_len: expected a multiple of 4, got {self.pred_len}")
        if min(self.k, self.redraw) < 1 or (self.positions is not None and self.positions < 1):
            raise ValueError(
                f"k, redraw, positions: expected at least 1, got {self.k}, {self.redraw}, {self.positions}"
            )
        if not self.nb_factor > 0 or not self.kl_weight >= 0:
            raise ValueError(
                f"nb_factor: expected more than 0, kl_weight 0 or more, got {self.nb_factor}, {self.kl_weight}"
            )


class SEAAttention(nn.Module):
    """One attention layer of `heads` query heads of `head_dim` channels; further keywords are those of `Config`."""

    def __init__(
        self, heads: int, head_dim: int, pred_len: int = 128, k: int = 64, nb_factor: float = 1.0,
        causal: bool = False, **options: Any,
    ):  # fmt: skip
        super().__init__()
        given = {"pred_len": pred_len, "k": k, "nb_factor": nb_factor, "causal": causal}
        self.config = configure(Config, {**given, **options})
        self.heads, self.head_dim = heads, head_dim
        self.encoder = nn.Sequential(
            nn.Linear(3 * head_dim, 2 * head_dim), nn.LayerNorm(2 * head_dim), nn.GELU()
        )
        self.decoder = MapDecoder(heads, 2 * head_dim, pred_len, causal)
        self.gates = nn.Linear(2 * head_dim, 2)
        nn.init.zeros_(self.gates.weight)
        nn.init.constant_(self.gates.bias, OPEN)
        self.steps: Tensor
        self.projection: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # of training
        self.register_buffer("projection", self._draw(0))
        self._mask: TokenCSR | None = None
        self._losses: dict[str, Tensor] = {}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, teacher_attn: Tensor | None = None, *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """Output [B, Hq, T, D] of q [B, Hq, T, D] over k, v [B, Hkv, T, D], and what it rests on: `mask`, and where there
        is a teacher's map [B, Hq, T, T] also the losses `kl`, `mse` and `context`.

        lengths int64 [B]: tokens of each sample, the rest is padding and gives 0. In training a teacher is needed, and a
        step is quadratic. Raises ValueError for what does not fit.
        """
        if self.training and teacher_attn is None:
            raise ValueError(
                "teacher_attn: expected the teacher's attention [B, H, T, T] in training, got None; pass it or call eval()"
            )
        seen = self.seen(q, k, v, lengths)
        self.redraw()
        x = self.encode(q, k, v, seen)
        scores = self.estimate(x, seen)
        mask = self._mask = self.choose(scores, seen)
        out, self._losses = self.attend(q, k, v, mask, x=x, lengths=lengths), {}
        if teacher_attn is not None:
            self._losses = self.distance(scores, seen, teacher_attn, v, out)
        return out, {"mask": mask, **self._losses}

    def sparse_mask(self) -> TokenCSR:
        """The mask of the last forward pass."""
        if self._mask is None:
            raise RuntimeError("sparse_mask: expected a forward pass before, got none; call the layer first")
        return self._mask

    def loss(self) -> Tensor | None:
        """The distillation loss of the last forward pass, None if it had no teacher."""
        if not self._losses:
            return None
        return self.weigh(self._losses)

    def weigh(self, losses: Mapping[str, Tensor]) -> Tensor:
        """One loss of those of `distance`."""
        return self.config.kl_weight * losses["kl"] + losses["mse"] + losses["context"]

    def settings(self) -> dict[str, Any]:
        """What its weights only mean something with."""
        return {"heads": self.heads, "head_dim": self.head_dim, **vars(self.config)}

    @torch.no_grad()
    def make_mask(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> TokenCSR:
        """The mask alone."""
        seen = self.seen(q, k, v, lengths)
        return self.choose(self.estimate(self.encode(q, k, v, seen), seen), seen)

    def encode(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Rows x [B, H, T, 2D] for the map and the gates; seen [B or 1, T]: keys that each row may see."""
        causal, projection = self.config.causal, self.projection
        there = (seen > 0)[:, None, :, None]
        q, k, v = (share_heads(x, self.heads).to(self.gates.weight.dtype) * there for x in (q, k, v))
        if causal:
            # The largest exponent of all keys, which the other features need, would tell of later ones.
            near = [relu_features(x, projection) for x in (q, k)]
        else:
            near = [exp_features(q, projection, (-1,)), exp_features(k, projection, (-2, -1), there)]
        place = self._places(seen).to(v.dtype)[:, None].expand(*v.shape)
        total = linear_attention(near[0], near[1] * there, torch.cat([place, v], -1), causal=causal)
        if causal:
            part = relative(total[..., : self.head_dim], seen, self._horizon(seen))
            total = torch.cat([part, total[..., self.head_dim :]], -1)
        counters.add(multiply_adds=(2 * near[0].numel() + 6 * v.numel()) * self.head_dim)
        return self.encoder(torch.cat([total, v], -1))

    def estimate(self, x: Tensor, seen: Tensor) -> Tensor:
        """Scores [B, H, T, K]; -inf for cells that cover no key of their row."""
        scores, cell = self.decoder(x, seen > 0), torch.arange(self.config.pred_len, device=x.device)
        counters.add(multiply_adds=x.numel() * len(self.decoder.row.weight))
        ends = (cell + 1) * seen[..., None] // len(cell)
        return scores.masked_fill((ends == cell * seen[..., None] // len(cell))[:, None], -torch.inf)

    @torch.no_grad()
    def choose(self, scores: Tensor, seen: Tensor) -> TokenCSR:
        """The mask of scores [B, H, T, K]; no gradient flows through the choice."""
        cells = seen.clamp_max(scores.shape[-1])
        keep = (2 * self.config.k * cells + seen) // (2 * seen).clamp_min(1)
        keep = self.heads * torch.minimum(keep.clamp_min(1), cells)
        # Heads compete with their softmax weights; log weights keep the order and do not underflow to ties.
        weights = scores.log_softmax(-1).masked_fill(scores == -torch.inf, -torch.inf)
        return TokenCSR.from_cells(select.grouped_topk(weights, keep, 1), seen, scores.shape[2])

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: TokenCSR, *, x: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[B, Hq, T, D] under a mask; x: the rows of `encode`, which the gates read, made anew where not given."""
        out: Tensor = csr_attention(q, k, v, mask)  # type: ignore[assignment]
        if not self.config.scaler:
            return out
        seen = self.seen(q, k, v, lengths)
        x = self.encode(q, k, v, seen) if x is None else x
        scale, mix = self.gates(x).sigmoid().unbind(-1)
        there = (seen > 0)[:, None, :, None]
        summed = (share_heads(v, self.heads) * there).to(x.dtype)
        summed = summed.cumsum(2) if self.config.causal else summed.sum(2, keepdim=True)
        mean = summed / seen.clamp_min(1)[:, None, :, None]
        return (((mix * scale)[..., None] * out + (1 - mix)[..., None] * mean) * there).to(q.dtype)

    def distance(
        self, scores: Tensor, seen: Tensor, teacher: Tensor, v: Tensor, out: Tensor
    ) -> dict[str, Tensor]:
        """How far scores [B, H, T, K] and the output are from a teacher's map [B, H, T, T] and its
        output: `kl` and `context` are means over the rows that are tokens, `mse` over all pairs. Quadratic. Raises
        ValueError for a map of another shape."""
        if teacher.shape != (*scores.shape[:3], scores.shape[2]):
            expected = [*scores.shape[:3], scores.shape[2]]
            raise ValueError(
                f"teacher_attn: expected {expected}, got {list(teacher.shape)}; give one map per head"
            )
        teacher, there = teacher.to(scores.dtype), (seen > 0)[:, None]
        log = stretch(scores, seen)
        rows = (seen > 0).expand(len(scores), -1).sum() * self.heads
        kl = (torch.xlogy(teacher, teacher) - teacher * log.clamp_min(-1e4)).sum(-1) * there
        target = teacher @ share_heads(v, self.heads).to(scores.dtype)
        wrong = (out.to(scores.dtype) - target).square().mean(-1) * there
        mse = F.mse_loss(log.exp() * there[..., None], teacher * there[..., None])
        return {"kl": kl.sum() / rows, "mse": mse, "context": wrong.sum() / rows}

    def _places(self, seen: Tensor) -> Tensor:
        """[B or 1, T, D]: the identity [D, D], stretched linearly over the tokens, and D times as high, so that even
        weight gives ones beside the values of v: unscaled it is too faint to learn from."""
        d, token = self.head_dim, torch.arange(seen.shape[-1], device=seen.device)
        place = ((token + 0.5) * d / self._horizon(seen) - 0.5).clamp(0, d - 1)
        return d * (1 - (place[..., None] - torch.arange(d, device=seen.device)).abs()).clamp_min(0)

    def _horizon(self, seen: Tensor) -> Tensor:
        """Tokens [B or 1, 1] that the identity is stretched over."""
        last = seen.amax(-1, keepdim=True)
        return last if self.config.positions is None else torch.full_like(last, self.config.positions)

    def seen(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Keys that each row may see [B or 1, T], 0 for rows of padding."""
        b, h, t, d = q.shape
        if (h, d) != (self.heads, self.head_dim) or k.shape != v.shape or k.shape[2] != t:
            raise ValueError(
                f"q, k, v: expected q [B, {self.heads}, T, {self.head_dim}] and k, v of as many tokens, got "
                f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            )
        if self.config.positions is not None and t > self.config.positions:
            raise ValueError(
                f"positions: expected at least the {t} tokens, got {self.config.positions}; raise it"
            )
        token = torch.arange(t, device=q.device)
        ends = torch.full((1, 1), t, device=q.device) if lengths is None else lengths.view(-1, 1)
        if len(ends) not in (1, b) or int(ends.min()) < 1 or int(ends.max()) > t:
            raise ValueError(
                f"lengths: expected {b} from 1 to {t}, got {ends.flatten().tolist()}; count the tokens"
            )
        seen = (token + 1).expand_as(ends + token) if self.config.causal else ends.expand(-1, t)
        return seen.masked_fill(token >= ends, 0)

    def _draw(self, count: int) -> Tensor:
        features = max(1, round(self.head_dim * math.log(self.head_dim) / self.config.nb_factor))
        generator = torch.Generator().manual_seed(self.config.seed + count)
        return draw_projection(features, self.head_dim, generator)

    def redraw(self) -> None:
        """Draw the features anew after every `redraw` steps of training."""
        if self.training:
            if int(self.steps) and int(self.steps) % self.config.redraw == 0:
                self.projection.copy_(self._draw(int(self.steps) // self.config.redraw))
            self.steps += 1


def stretch(scores: Tensor, seen: Tensor) -> Tensor:
    """log softmax over keys [B, H, T, T] of scores [B, H, T, K], where each key has the score of its cell; -inf for keys
    past those seen [B or 1, T] by the row. Quadratic: for training and tests."""
    key, count = torch.arange(scores.shape[2], device=scores.device), scores.shape[3]
    cell = ((key + 1) * count - 1) // seen[..., None].clamp_min(1)
    near = scores.gather(-1, cell.clamp_max(count - 1)[:, None].expand(*scores.shape[:3], -1))
    allowed = (key < seen[..., None])[:, None]
    return near.masked_fill(~allowed, -torch.inf).log_softmax(-1).masked_fill(~allowed, -torch.inf)


def relative(place: Tensor, seen: Tensor, horizon: Tensor) -> Tensor:
    """Weight at places along `horizon` tokens, place [B, H, T, D], as weight along the keys that each row may see.

    Causal rows estimate cells of the keys they see; told of places along the whole text, they would have to learn for
    each row anew how the one lies in the other. seen [B or 1, T], horizon [B or 1, 1], in tokens.
    """
    d, share = place.shape[-1], (seen / horizon)[..., None]
    at = ((torch.arange(d, device=place.device) + 0.5) * share - 0.5).clamp(0, d - 1)
    low, share = at.long(), share[:, None].to(place.dtype)
    low, high, part = (x[:, None].expand(place.shape) for x in (low, (low + 1).clamp_max(d - 1), at - low))
    return share * torch.lerp(place.gather(-1, low), place.gather(-1, high), part.to(place.dtype))


class SEALayer(AttentionLayer):
    """SEA in the place of dense attention; in training its teacher is the dense map of its own queries and keys."""

    def __init__(self, config: Config, heads: int, width: int):
        super().__init__()
        self.sea = SEAAttention(heads, width, **vars(config))
        self._last: tuple[Tensor, ...] | None = None

    def mask(self, q: Tensor, k: Tensor, v: Tensor) -> TokenCSR:
        """The mask of these tokens."""
        self.sea.redraw()
        return self.sea.make_mask(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: TokenCSR) -> Tensor:
        """[B, Hq, T, D]; the gates are those of these tokens, whichever tokens the mask came from."""
        seen = self.sea.seen(q, k, v)
        x = self.sea.encode(q, k, v, seen)
        out = self.sea.attend(q, k, v, mask, x=x)
        self._last = (q, k, v, seen, x, out) if self.training else None
        return out

    def loss(self) -> Tensor | None:
        """The distillation loss of the last forward pass in training. Quadratic: ValueError for more than 2048 tokens."""
        if self._last is None:
            return None
        q, k, v, seen, x, out = self._last
        teacher = full_attention(q, k, causal=self.sea.config.causal)
        return self.sea.weigh(self.sea.distance(self.sea.estimate(x, seen), seen, teacher, v, out))


def distill(
    model: nn.Module, loader: Iterable[tuple[Any, ...]], *, steps: int | None = None, lr: float = 1e-3, warm_up: int = 20,
    objective: Callable[[Any, tuple[Any, ...]], Tensor] | None = None,
) -> list[float]:  # fmt: skip
    """Train the SEA layers of a model, and nothing else of it, one step per batch of the model's arguments, as
    `sparse_core.distill.fit` does; returns the losses.

    A `SEAAttention` alone takes batches (q, k, v, teacher_attn). objective(output, batch): what is added to the sum of the
    layers' losses, such as the divergence from a teacher's logits. steps: once through the loader unless given, which it
    must be where that has no length. Raises ValueError for a model without such layers.
    """
    if steps is None:
        if not isinstance(loader, Sized):
            raise ValueError("steps: expected how many, or a loader with a length, got neither; pass steps")
        steps = len(loader)
    layers: dict[SEAAttention, nn.Module] = {x: x for x in model.modules() if isinstance(x, SEAAttention)}
    layers |= {x.sea: x for x in model.modules() if isinstance(x, SEALayer)}
    if not layers:
        raise ValueError(
            "model: expected SEA layers, got none; put SEAAttention or SEALayer where attention is"
        )
    modes = {module: module.training for module in model.modules()}
    try:
        for layer in layers.values():
            layer.train()
        weights = [p for layer in layers for p in layer.parameters()]
        losses = (_loss(model, list(layers.values()), batch, objective) for batch in loader)
        return fit(weights, losses, steps=steps, lr=lr, warm_up=warm_up)
    finally:
        for module, training in modes.items():
            module.training = training


def _loss(
    model: nn.Module, layers: list[Any], batch: tuple[Any, ...], objective: Callable[..., Tensor] | None
) -> Tensor:
    out = model(*batch)
    total = torch.stack([loss for layer in layers if (loss := layer.loss()) is not None]).sum()
    return total if objective is None else total + objective(out, batch)


METHOD = register(
    Method(
        name="attention/sea",
        paper="2310.01777",
        fidelity="adapted",
        config=Config,
        kind="train",
        make=SEALayer,
        layer=lambda config, heads, kv_heads, width: SEALayer(config, heads, width),
        needs=("training",),
    )
)
