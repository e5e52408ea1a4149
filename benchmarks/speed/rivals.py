"""What our kernels are measured against, each a call by name: torch's dense attention by backend, and flex_attention.

Nothing is built or compiled before the first call, so that a rival which this machine does not have says so when it is
called, among the others, and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_core.attention.masks import BlockMask

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rival = Literal["sdpa", "flash", "cudnn", "flex", "products"]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def make(name: Rival, *, device: str, lower: bool = False, mask: BlockMask | None = None) -> Attend:
    """A rival for tensors on `device`: `sdpa` as torch dispatches it, `flash` and `cudnn` by backend, `flex` over the
    blocks of `mask` (all keys without one), `products` two plain products, for few queries. lower: causal; flex learns
    that from its mask."""
    if name == "flex":
        return _flex(device, mask)
    return _products if name == "products" else _dense(BACKENDS.get(name), lower)


def chosen_backend(q: Tensor, k: Tensor, v: Tensor, lower: bool = False) -> str:
    """The backend that torch takes for `sdpa`."""
    return SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=lower)).name


def forget() -> None:
    """Drop what was compiled. Torch compiles one function for few shapes only, and then refuses."""
    torch.compiler.reset()
    _compiled.cache_clear()


def _dense(backend: SDPBackend | None, lower: bool) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=lower)

    return attend


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def _flex(device: str, mask: BlockMask | None) -> Attend:
    on_gpu = torch.device(device).type == "cuda"

    @cache
    def blocks() -> Any:
        found: Any = None if mask is None else mask.to_torch()
        if found is not None and on_gpu and mask is not None and mask.rule is not None:
            # The compiled kernel asks the rule in partial blocks only. That of `to_torch` also looks the block up, for the
            # sake of the uncompiled form, which asks it everywhere; here that would slow the rival down for nothing.
            found.mask_mod = mask.rule
        return found

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if on_gpu:
            return _compiled()(q, k, v, block_mask=blocks())
        from torch.nn.attention.flex_attention import flex_attention

        # Uncompiled: 20 s of compiling would buy a CPU forward pass only. Holds all scores, so for small sizes.
        return flex_attention(q, k, v, block_mask=blocks())  # type: ignore[return-value]

    return attend


@cache
def _compiled() -> Callable[..., Tensor]:
    """flex_attention, compiled: never one that fell back to the uncompiled form, which would hold T x T scores, and tuned,
    since the tiles it takes untuned on an H100 (128 queries; 128 keys backward) do not divide blocks of 64, and then it
    fails."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True, options={"max_autotune": True})  # type: ignore[return-value]
