"""What every attention method gives besides its own functions, so that a model can take any of them by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class AttentionLayer(nn.Module):
    """Attention of q [B, Hq, T, D] over k, v [B, Hkv, T, D] in two steps: what to attend to, then the attention itself.

    A mask may outlive the call it was made in, so that several layers or denoising steps share one choice.
    """

    def mask(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """What these tokens attend to: a mask of `sparse_core.attention.masks`, or None for a method that has none."""
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """[B, Hq, T, D] under a mask that `mask` made."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, Hq, T, D]."""
        return self.attend(q, k, v, self.mask(q, k, v))

    def loss(self) -> Tensor | None:
        """What the method adds to the training loss for the last forward pass, or None."""
        return None
