"""Sparse attention in a model that was built without it, and out again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from sparse_core.attention.attend import FixedMask, Mask
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.slot import AttentionSlot
from sparse_core.registry import Method, get_method


@dataclass
class Sparsified:
    """What `sparsify` put into a model: `slots` by the name of the place, and how to put each place back."""

    method: str
    slots: dict[str, AttentionSlot]
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def report(self) -> list[dict[str, Any]]:
        """One row per place: name, method, calls so far, and of the last one the tokens and the density of its mask
        (None before the first call, and for a method without a mask)."""
        return [self._row(name, slot) for name, slot in self.slots.items()]

    def _row(self, name: str, slot: AttentionSlot) -> dict[str, Any]:
        shape, mask = slot.last or ((0, 0, 0, 0), None)
        measure = getattr(mask, "density", None)
        density = None if measure is None else float(measure())
        return {
            "name": name,
            "method": self.method,
            "calls": slot.calls,
            "tokens": shape[2],
            "density": density,
        }

    def loss(self) -> Tensor | None:
        """Sum of what the layers add to the training loss for the last forward pass, or None."""
        return sum_losses(slot.layer for slot in self.slots.values())

    def detach(self) -> None:
        """Make the model what it was, to the bit; a second call does nothing."""
        while self._undo:
            self._undo.pop()()


def sum_losses(layers: Iterator[AttentionLayer] | list[AttentionLayer]) -> Tensor | None:
    """Sum of the layers' own losses, or None where none has any."""
    losses = [loss for loss in (layer.loss() for layer in layers) if loss is not None]
    return sum(losses[1:], losses[0]) if losses else None


def sparsify(module: nn.Module, method: str | Mask, include: str = "", **config: Any) -> Sparsified:
    """Put `method`, a name such as `attention/minference` or one mask, into every self-attention of `module`.

    Found are `AttentionSlot`s, `torch.nn.MultiheadAttention` and diffusers' `Attention`; of these, the ones in whose
    name the regular expression `include` is found. config: keyword arguments of the method's config. Cross-attention,
    and calls with a mask or padding of their own, stay dense. Raises ValueError for an unknown method, an option it does
    not have, a method that only decodes, and where nothing is found.
    """
    chosen = get_method(method) if isinstance(method, str) else method
    places = {name: place for name, place in _find(module) if re.search(include, name)}
    if not places:
        raise ValueError(
            f"include: expected a pattern found in the name of an attention, got {include!r} among "
            f"{', '.join(name for name, _ in _find(module)) or 'none'}"
        )
    done = Sparsified(method if isinstance(method, str) else type(method).__name__, {})
    try:
        for name, place in places.items():
            slot, undo = _open(place)
            done._undo.append(undo)
            done.slots[name] = slot
            if isinstance(chosen, Method):
                slot.fill(make_layer(chosen, slot.heads, slot.kv_heads, slot.width, **config))
            else:
                slot.fill(FixedMask(chosen))
    except Exception:
        done.detach()
        raise
    return done


def make_layer(method: Method | str, heads: int, kv_heads: int, width: int, **config: Any) -> AttentionLayer:
    """The method as a layer for heads of `width` channels, looking both ways unless `causal` says otherwise."""
    method = get_method(method) if isinstance(method, str) else method
    if method.layer is None:
        raise ValueError(
            f"{method.name}: expected a method for whole sequences, got one that serves one new token after another; "
            "use its own functions when decoding"
        )
    options = {"causal": False, **config}
    names = {f.name for f in fields(method.config)}
    if unknown := sorted(set(options) - names):
        raise ValueError(
            f"{method.name}: expected options among {', '.join(sorted(names))}, got {', '.join(unknown)}"
        )
    return method.layer(method.config(**options), heads, kv_heads, width)


def _find(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        if isinstance(part, (AttentionSlot, nn.MultiheadAttention)) or _is_diffusers(part):
            yield name, part


def _is_diffusers(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("set_processor", "to_q", "to_k", "to_v", "to_out", "heads"))


def _open(place: nn.Module) -> tuple[AttentionSlot, Callable[[], None]]:
    """A slot in this place, and what empties it again."""
    if isinstance(place, AttentionSlot):
        if place.filled:
            raise ValueError(
                "module: expected dense attention, got one that is sparse already; detach that first"
            )
        return place, place.empty
    from sparse_core.adapters import open_diffusers, open_torch

    return open_torch(place) if isinstance(place, nn.MultiheadAttention) else open_diffusers(place)
