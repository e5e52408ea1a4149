"""What every attention method gives besides its own functions, so that a model can take any of them by name."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_core import counters


class AttentionLayer(nn.Module):
    """Attention of q [B, Hq, T, D] over k, v [B, Hkv, T, D] in two steps: what to attend to, then the attention itself.

    A mask may outlive the call it was made in, so that several layers or denoising steps share one choice. What a layer
    keeps of its last pass in training is called `_last` or `_loss`, the masks that it keeps `_masks`: copies and files
    begin without them, and evaluation without the former, which hold the graph of that pass.
    """

    def mask(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """What these tokens attend to: a mask of `sparse_core.attention.masks`, or None for a method that has none."""
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """[B, Hq, T, D] under a mask that `mask` made."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
        """[B, Hq, T, D] under a mask that `mask` made, for these tokens where none is given."""
        return self.attend(q, k, v, self.mask(q, k, v) if mask is None else mask)

    def loss(self) -> Tensor | None:
        """What the method adds to the training loss for the last forward pass, or None."""
        return None

    def train(self, mode: bool = True) -> Self:
        """As in torch; evaluation forgets the last pass in training."""
        if not mode:
            vars(self).update(self._without("_last", "_loss"))
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        masks = {"_masks": {}} if "_masks" in vars(self) else {}
        return vars(self) | self._without("_last", "_loss") | masks

    def _without(self, *names: str) -> dict[str, None]:
        """None for each of the attributes that there is."""
        return {name: None for name in names if name in vars(self)}


class DenseAttention(AttentionLayer):
    """Every token attends to every token."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: None = None) -> Tensor:
        """[B, Hq, T, D]."""
        return dense_attention(q, k, v)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q [B, Hq, Tq, D] over all of k, v [B, Hkv, Tk, D]; keys and values take the dtype of q.

    On a CPU plain matrix products are used while training: the backward pass of the fused kernel costs six times its
    forward pass there.
    """
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    counters.add(
        products=pairs, multiply_adds=2 * pairs * q.shape[3], kv_bytes=2 * k.numel() * k.element_size()
    )
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad and not grouped:
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), enable_gqa=grouped)
