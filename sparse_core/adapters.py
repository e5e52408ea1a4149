"""Slots in attentions that other libraries define: torch's own, and those of diffusers whose processor is known here.

What cannot have one raises ValueError, in a sentence for whoever knows the name of the place to begin.

A module keeps its class and its weights. Its forward becomes one of this file bound to it by `partial`, which copies and
files take along: a copy of a model then attends with the weights of the copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparse_core.attention.slot import AttentionSlot

Undo = Callable[[], None]
NAME = "sparse_slot"  # the slot is a part of the module while it is in, so that it moves and trains with it
PLAIN = "AttnProcessor"  # multiplies matrices itself, by the scale of its module
SELF = (  # keys are those of the tokens themselves unless other states are given
    PLAIN, "AttnProcessor2_0", "FusedAttnProcessor2_0", "HunyuanAttnProcessor2_0", "AllegroAttnProcessor2_0",
    "StableAudioAttnProcessor2_0", "WanAttnProcessor",
)  # fmt: skip
JOINT = ("CogVideoXAttnProcessor2_0", "FluxAttnProcessor")  # the other states join the tokens


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H D]."""
    return x.transpose(1, 2).flatten(2)


def open_torch(module: nn.MultiheadAttention) -> tuple[AttentionSlot, Undo]:
    """A slot in `torch.nn.MultiheadAttention`. Raises ValueError for one that does more than its class says."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        raise ValueError(
            f"expected torch's own MultiheadAttention, got {type(module).__name__} with its own forward; leave it out of "
            "include"
        )
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        raise ValueError(
            "expected a MultiheadAttention with one width and no extra key, got another; leave it out of include"
        )
    slot, close = _open(module, AttentionSlot(module.num_heads, module.head_dim), attend_torch)
    # torch's fused encoder layer never calls `forward`, unless there is a hook.
    hook = module.register_forward_pre_hook(_no_change)

    def undo() -> None:
        hook.remove()
        close()

    return slot, undo


def _no_change(*_: Any) -> None:
    """A hook that does nothing."""


def _open(module: nn.Module, slot: AttentionSlot, forward: Callable[..., Any]) -> tuple[AttentionSlot, Undo]:
    """Make `forward` that of `module`, which gets the slot."""
    if NAME in dict(module.named_children()):
        raise ValueError("expected dense attention, got one that is sparse already; detach that first")
    if "forward" in vars(module):
        raise ValueError(
            f"expected the forward of {type(module).__name__}, got one that a hook put there; take the hook out first"
        )
    module.add_module(NAME, slot)
    module.forward = partial(forward, module)

    def undo() -> None:
        del module.forward
        delattr(module, NAME)

    return slot, undo


def attend_torch(
    module: Any, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The forward of a `MultiheadAttention` with a slot: self-attention through it, everything else the old way."""
    slot: AttentionSlot = getattr(module, NAME)
    reasons = {
        "keys of other tokens": query is not key or key is not value,
        "one sequence without a batch": query.ndim != 3,
        "padding": key_padding_mask is not None,
        "a mask of its own": attn_mask is not None and not is_causal,
        "is_causal, which takes a method with causal=True": is_causal and not slot.causal,
        "need_weights=True, which is torch's default": need_weights,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        slot.stay_dense(reason)
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return type(module).forward(module, query, key, value, *options)
    x = query if module.batch_first else query.transpose(0, 1)
    parts = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    mixed = module.out_proj(join_heads(slot(*(split_heads(part, module.num_heads) for part in parts))))
    return (mixed if module.batch_first else mixed.transpose(0, 1)), None


def processor_name(module: Any) -> str:
    """The class of a module's processor, with a word on whose it is where that is not diffusers'."""
    kind = type(module.processor)
    return kind.__name__ if kind.__module__.startswith("diffusers.") else f"{kind.__module__}.{kind.__name__}"


def open_diffusers(module: Any) -> tuple[AttentionSlot, Undo]:
    """A slot in an attention of diffusers. Raises ValueError for a processor that is not known to be softmax attention of
    tokens over themselves."""
    name = processor_name(module)
    if name not in SELF + JOINT:
        raise ValueError(
            f"expected a processor among {', '.join(SELF + JOINT)}, got {name}; leave it out of include"
        )
    if name == PLAIN and (module.norm_q is not None or module.norm_k is not None):
        raise ValueError(
            f"expected another processor where queries and keys have norms, got {PLAIN}, which leaves them out; set "
            "AttnProcessor2_0"
        )
    return _open(module, AttentionSlot(module.heads, module.inner_dim // module.heads), attend_diffusers)


def attend_diffusers(
    module: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None, *args: Any, **options: Any,
) -> Any:  # fmt: skip
    """The forward of an attention of diffusers with a slot: its own processor does everything but the attention."""
    slot, name = getattr(module, NAME), processor_name(module)
    run = partial(
        type(module).forward, module, hidden_states, encoder_hidden_states, attention_mask, *args, **options
    )
    reasons = {
        f"{name}, set later, which is not known": name not in SELF + JOINT,
        "keys of other tokens": encoder_hidden_states is not None and name not in JOINT,
        "a mask of its own": attention_mask is not None,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        slot.stay_dense(reason)
        return run()
    if name == PLAIN:  # the same attention, with torch's function and without the scale
        fused = import_module(type(module.processor).__module__).AttnProcessor2_0()
        run = partial(fused, module, hidden_states, temb=options.get("temb"))
    through = Through(slot, module.scale if name == PLAIN else None)
    with through:
        out = run()
    if not through.used:
        slot.stay_dense(f"{name} did not call scaled_dot_product_attention on the tokens alone")
    return out


class Through(TorchFunctionMode):
    """While it is on, torch's `scaled_dot_product_attention` of tokens over themselves, all of them, goes through `slot`.

    scale: of the products, instead of what the call says.
    """

    def __init__(self, slot: AttentionSlot, scale: float | None = None):
        super().__init__()
        self.slot, self.scale, self.used = slot, scale, False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        scale = scale if self.scale is None else self.scale
        if attn_mask is not None or dropout_p or is_causal or query.shape[2] != key.shape[2]:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self.used = True
        # Methods divide by the root of the width.
        factor = 1.0 if scale is None else scale * math.sqrt(query.shape[-1])
        query = query if math.isclose(factor, 1.0) else query * factor
        return self.slot(query, key.to(query.dtype), value.to(query.dtype))
