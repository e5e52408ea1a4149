"""Slots in attentions that other libraries define. Only what is asked for by duck type or by torch itself is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sparse_core.attention.slot import AttentionSlot

Undo = Callable[[], None]
NAME = "sparse_slot"  # the slot is a part of the module while it is in, so that it moves and trains with it


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H D]."""
    return x.transpose(1, 2).flatten(2)


def open_torch(module: Any) -> tuple[AttentionSlot, Undo]:
    """A slot in `torch.nn.MultiheadAttention` whose query, key and value are one tensor; other calls, and those with a
    mask, padding or weights asked for, go the old way. Training dropout of the weights is not applied in the slot."""
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        raise ValueError(
            "module: expected a MultiheadAttention with one width and no extra key, got another; leave it out of include"
        )
    slot, dense = AttentionSlot(module.num_heads, module.head_dim), module.forward

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        masked = any(x is not None for x in (options.get("key_padding_mask"), options.get("attn_mask")))
        itself = query is key and key is value and query.ndim == 3 and not args
        if not itself or masked or options.get("need_weights", True) or options.get("is_causal", False):
            return dense(query, key, value, *args, **options)
        x = query if module.batch_first else query.transpose(0, 1)
        parts = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        mixed = module.out_proj(join_heads(slot(*(split_heads(part, module.num_heads) for part in parts))))
        return (mixed if module.batch_first else mixed.transpose(0, 1)), None

    module.forward = forward
    module.add_module(NAME, slot)
    # torch's fused encoder layer never calls `forward`, unless there is a hook.
    hook = module.register_forward_pre_hook(lambda *_: None)

    def undo() -> None:
        hook.remove()
        del module.forward
        delattr(module, NAME)

    return slot, undo


class SlotProcessor:
    """A processor for diffusers' `Attention`: self-attention goes through the slot, everything else the old way."""

    def __init__(self, slot: AttentionSlot, dense: Any):
        self.slot, self.dense = slot, dense

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            return self.dense(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **options)
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        q, k, v = (split_heads(project(tokens), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = (x if norm is None else norm(x) for x, norm in ((q, attn.norm_q), (k, attn.norm_k)))
        mixed = attn.to_out[1](attn.to_out[0](join_heads(self.slot(q, k, v))))
        if x.ndim == 4:
            mixed = mixed.transpose(1, 2).reshape(hidden_states.shape)
        return (mixed + hidden_states if attn.residual_connection else mixed) / attn.rescale_output_factor


def open_diffusers(module: Any) -> tuple[AttentionSlot, Undo]:
    """A slot in diffusers' `Attention`."""
    slot, dense = AttentionSlot(module.heads, module.inner_dim // module.heads), module.processor
    module.add_module(NAME, slot)
    module.set_processor(SlotProcessor(slot, dense))

    def undo() -> None:
        module.set_processor(dense)
        delattr(module, NAME)

    return slot, undo
