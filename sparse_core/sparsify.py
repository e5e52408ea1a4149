"""Sparse attention in a model that was built without it, and out again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_core.attention.attend import FixedMask, Mask
from sparse_core.attention.layer import AttentionLayer
from sparse_core.attention.slot import AttentionSlot
from sparse_core.errors import unknown
from sparse_core.registry import Method, Place, get_method, list_methods


@dataclass
class Sparsified:
    """What `sparsify` put into a model: `slots` by the name of the place, and how to put each place back."""

    method: str
    slots: dict[str, AttentionSlot]
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def report(self) -> list[dict[str, Any]]:
        """One row per place: name, method, calls through the method so far, and of the last one the tokens and the density
        of its mask (None before the first call, and for a method without a mask); dense: how many calls stayed dense, and
        why, or ""."""
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
            "dense": "; ".join(f"{count} for {reason}" for reason, count in slot.dense.items()),
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


def sparsify(
    module: nn.Module, method: str | Mask, include: str = "", *, plan: Any = None, **config: Any
) -> Sparsified:
    """Put `method`, a name such as `attention/minference` or `minference`, or one mask, into every self-attention of
    `module`.

    Found are `AttentionSlot`s, `torch.nn.MultiheadAttention` and attentions of diffusers; of these, the ones in whose
    name the regular expression `include` is found. config: keyword arguments of the method's config, `causal=False` where
    it is not given. plan: for methods that have plans, one for all places or the path of one; by place names, a mapping or
    a function of the name gives each place its own. A plan knows its model, but only `plan.validate(model)` asks it.

    Dense as before stay, with the reason in the report: keys of other tokens, calls with a mask or padding, and in torch's
    `MultiheadAttention` calls that ask for the weights, which is its default (`need_weights=False` does not), that have no
    batch, and that are causal by `is_causal=True`, unless the method has `causal=True`. In the others its dropout of
    weights is not applied. Of diffusers' processors those of `sparse_core.adapters` are taken, which keep all they do
    (norms, rotary embeddings, scales) but the attention itself. A mask of one's own is read in the order of the tokens.

    Raises ValueError for an unknown method, an option it does not have, a method that only decodes, a plan that does not
    fit, an attention that is not known, and where nothing is found; nothing is changed then.
    """
    chosen = _choose(method, plan, config)
    places = _included(module, include)
    done = Sparsified(chosen.name if isinstance(chosen, Method) else type(chosen).__name__, {})
    try:
        for name, place in places.items():
            done.slots[name], undo = _open(name, place)
            done._undo.append(undo)
        plans = _plans(chosen, plan, places)
        for index, (name, slot) in enumerate(done.slots.items()):
            if isinstance(chosen, Method):
                layer = _make(chosen, _place(slot, index, len(places)), plans[name], config, slot.condition)
                slot.fill(layer, causal=bool(config.get("causal", False)))
            else:
                slot.fill(FixedMask(chosen))
    except Exception:
        done.detach()
        raise
    return done


def make_layer(
    method: Method | str, heads: int, kv_heads: int, width: int, *, plan: Any = None, **config: Any
) -> AttentionLayer:
    """The method as a layer for heads of `width` channels, looking both ways unless `causal` says otherwise. plan: where
    the method has plans, one or the path of one."""
    name = method if isinstance(method, str) else method.name
    chosen = check_options(name, plan=plan, **config)
    return _make(chosen, Place(heads=heads, kv_heads=kv_heads, width=width), _load(chosen, plan), config)


def check_options(method: str, *, plan: Any = None, **config: Any) -> Method:
    """The method called `method`. Raises ValueError where there is none, where it only decodes, and for options or a plan
    that it does not take; whether the plan fits is for `sparsify` to see."""
    chosen = get_method(method)
    _config(chosen, config)
    if plan is not None and chosen.plan is None:
        planned = [name for name in list_methods() if get_method(name).plan is not None]
        raise ValueError(f"{chosen.name}: expected no plan, got one; plans are for {' and '.join(planned)}")
    return chosen


def _config(method: Method, config: dict[str, Any]) -> Any:
    """The config of a method for whole sequences."""
    if method.layer is None:
        raise ValueError(
            f"{method.name}: expected a method for whole sequences, got one that serves one new token after another; "
            "use its own functions when decoding"
        )
    options = {"causal": False, **config}
    names = {f.name for f in fields(method.config)}
    if strange := sorted(set(options) - names):
        raise ValueError(
            f"{method.name}: expected options among {', '.join(sorted(names))}, got {', '.join(strange)}"
        )
    return method.config(**options)


def _make(
    method: Method, place: Place, plan: Any, config: dict[str, Any], told: int | None = None
) -> AttentionLayer:
    """told: channels of the condition that the place gives, None where that is not known."""
    settings = _config(method, config)
    asked = getattr(settings, "condition", 0)
    if told is not None and asked not in (0, told):
        expected = (
            f"0 or {told} channels, as this attention is told"
            if told
            else "0, as this attention is told none"
        )
        raise ValueError(f"condition: expected {expected}, got {asked}")
    if method.planned is not None:
        return method.planned(settings, plan, place)
    assert method.layer is not None
    return method.layer(settings, place.heads, place.kv_heads, place.width)


def _choose(method: str | Mask, plan: Any, config: dict[str, Any]) -> Method | Mask:
    """The method or the mask; ValueError for what is neither, and for options that do not go with it."""
    if isinstance(method, str):
        return check_options(method, plan=plan, **config)
    if not isinstance(method, Mask):
        raise ValueError(
            f"method: expected a name or a mask of sparse_core.attention.masks, got {type(method).__name__}"
        )
    if config or plan is not None:
        given = ", ".join([*config, *(["plan"] if plan is not None else [])])
        raise ValueError(f"method: expected no options beside a mask, got {given}; make the mask with them")
    return method


def _plans(method: Method | Mask, plan: Any, places: Iterable[str]) -> dict[str, Any]:
    """The plan of each place."""
    if not isinstance(method, Method) or plan is None:
        return dict.fromkeys(places)
    if isinstance(plan, Mapping):
        names = list(places)
        if missing := [name for name in names if name not in plan]:
            raise ValueError(f"plan: expected one for each of {', '.join(names)}, got none for {missing[0]}")
        if extra := [name for name in plan if name not in names]:
            raise unknown("place in plan", extra[0], names)
        return {name: _load(method, plan[name]) for name in names}
    if callable(plan):
        return {name: _load(method, plan(name)) for name in places}
    return dict.fromkeys(places, _load(method, plan))


def _load(method: Method, plan: Any) -> Any:
    """A plan of this method, read where it is a path."""
    if plan is None or method.plan is None:
        return None
    if isinstance(plan, (str, Path)):
        if not Path(plan).is_file():
            raise FileNotFoundError(f"plan: expected a file, found none at {plan}; save one there")
        return method.plan.load(plan)  # type: ignore[attr-defined]
    if not isinstance(plan, method.plan):
        raise ValueError(
            f"plan: expected a {method.plan.__name__} of {method.name}, or the path of one, got {type(plan).__name__}"
        )
    return plan


def _place(slot: AttentionSlot, index: int, count: int) -> Place:
    return Place(heads=slot.heads, kv_heads=slot.kv_heads, width=slot.width, index=index, count=count)


def _included(module: nn.Module, include: str) -> dict[str, nn.Module]:
    """The attentions in whose name `include` is found."""
    try:
        pattern = re.compile(include)
    except re.error as error:
        raise ValueError(f"include: expected a regular expression, got {include!r} ({error})") from None
    found = dict(_find(module))
    if places := {name: place for name, place in found.items() if pattern.search(name)}:
        return places
    names = ", ".join(found) or "none"
    raise ValueError(
        f"include: expected a pattern found in the name of an attention, got {include!r} among {names}"
    )


def _find(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from sparse_core.adapters import NAME

    for name, part in module.named_modules():
        inner = name.split(".")[-1] == NAME  # of an attention that is sparse already
        if not inner and (isinstance(part, (AttentionSlot, nn.MultiheadAttention)) or _is_diffusers(part)):
            yield name, part


def _is_diffusers(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("set_processor", "processor", "to_q", "heads"))


def _open(name: str, place: nn.Module) -> tuple[AttentionSlot, Callable[[], None]]:
    """A slot in this place, and what empties it again."""
    from sparse_core.adapters import open_diffusers, open_torch

    try:
        if isinstance(place, AttentionSlot):
            return _open_slot(place)
        return open_torch(place) if isinstance(place, nn.MultiheadAttention) else open_diffusers(place)
    except ValueError as error:
        raise ValueError(f"{name or 'module'}: {error}") from None


def _open_slot(place: AttentionSlot) -> tuple[AttentionSlot, Callable[[], None]]:
    if place.filled:
        raise ValueError("expected dense attention, got one that is sparse already; detach that first")
    return place, place.empty
