"""A rule per head for how far it looks, and the choice of rules by an integer program."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_core.attention.calibrate import check_model, model_hash, read_plan, write_plan
from sparse_core.attention.masks import SpanPlan
from sparse_core.attention.planner import Budget, choose_options, find_options

Measure = Literal["pairs", "keys"]


def check_density(density: float) -> None:
    """ValueError for what is no share."""
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a share above 0 and at most 1, got {density}")


def check_blocks(block: int, sink: int) -> None:
    """ValueError for sizes that no mask has."""
    if block < 4 or block & (block - 1):
        raise ValueError(f"block: expected a power of two of at least 4, got {block}")
    if sink < 0 or sink % block:
        raise ValueError(f"sink: expected whole blocks of {block} tokens, got {sink}")


@dataclass(frozen=True, order=True)
class SpanRule:
    """A span of alpha + beta N of N tokens. ValueError where it is none at any length, or more than all of a long one."""

    alpha: float
    beta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1 or not math.isfinite(self.alpha) or (self.beta == 0 and self.alpha <= 0):
            raise ValueError(
                f"rule: expected beta of 0 to 1, and alpha above 0 where beta is 0, got {self.alpha} and {self.beta}"
            )

    def fits(self, length: int) -> bool:
        """Whether the span is one of 1 to `length` tokens."""
        return 0 < self.alpha + self.beta * length <= length

    def window(self, length: int, block: int) -> int:
        """The span in tokens, rounded down to whole blocks, of which at least one; all of them for the whole length."""
        span = self.alpha + self.beta * length + 1e-9 * length  # 0.3 * 640 must not lose a block
        return max(1, int(span // block) if span < length else -(-length // block)) * block


def rule_grid(lengths: Iterable[int], step: int = 1024, slopes: int = 9) -> list[SpanRule]:
    """All rules of alpha from minus the least to the greatest length by `step`, and `slopes` beta from 0 to 1, whose span
    is above 0 and within the length at each of `lengths`."""
    lengths = sorted(lengths)
    grid = product(range(-lengths[0], lengths[-1] + 1, step), torch.linspace(0, 1, slopes).tolist())
    rules = [SpanRule(a, b) for a, b in grid if b > 0 or a > 0]
    return [rule for rule in rules if all(rule.fits(length) for length in lengths)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """rules[l][h] of every layer and head; block, sink in tokens; losses: what it costs at each profiled length, as the
    influence has it; model: its hash, or ""."""

    rules: tuple[tuple[SpanRule, ...], ...]
    block: int = 64
    sink: int = 64
    causal: bool = True
    losses: Mapping[int, float] = field(default_factory=dict)
    model: str = ""

    def __post_init__(self) -> None:
        check_blocks(self.block, self.sink)
        if not self.rules or not self.rules[0] or len({len(layer) for layer in self.rules}) > 1:
            raise ValueError(
                f"rules: expected one per layer and head, got {[len(layer) for layer in self.rules]} heads"
            )

    def at(self, layer: int, length: int) -> SpanPlan:
        """The spans of a layer at a length."""
        if not 0 <= layer < len(self.rules):
            raise ValueError(f"layer: expected 0 to {len(self.rules) - 1}, got {layer}; plan for this model")
        return _spans(self.rules[layer], length, self.block, self.sink, self.causal)

    def density(self, length: int, measure: Measure = "pairs") -> float:
        """Mean over layers and heads of what they keep at a length."""
        layers = [_densities(self.at(layer, length), length, measure) for layer in range(len(self.rules))]
        return float(torch.stack(layers).mean())

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all."""
        return write_plan(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. Raises ValueError naming the file where it is none."""

        def make(data: dict[str, Any]) -> Plan:
            data["rules"] = tuple(tuple(SpanRule(**rule) for rule in layer) for layer in data["rules"])
            data["losses"] = {int(length): loss for length, loss in data["losses"].items()}
            return cls(**data)

        return read_plan(path, "plan of spans", make)

    def validate(self, model: nn.Module) -> None:
        """ValueError where the plan was made for another model."""
        check_model(self.model, model)


def _spans(rules: Sequence[SpanRule], length: int, block: int, sink: int, causal: bool) -> SpanPlan:
    windows = tuple(rule.window(length, block) for rule in rules)
    return SpanPlan(sink=(sink,) * len(rules), window=windows, unit=block, causal=causal)


def _densities(spans: SpanPlan, length: int, measure: Measure) -> Tensor:
    return spans.densities(length) if measure == "pairs" else spans.kv_densities(length)


def optimise_plan(
    influence_by_len: Mapping[int, Tensor], density: float | Mapping[int, float], rules: Iterable[SpanRule],
    max_rules_per_layer: int | None = None, *, block: int = 64, sink: int = 64, causal: bool = True,
    points: int = 5, measure: Measure = "pairs", model: nn.Module | None = None,
) -> list[Plan]:  # fmt: skip
    """Plans of which none is better than another at every profiled length, the best at the longest first.

    influence_by_len: by length N, [L, H, K, K] of blocks of `block` tokens; sum it over a group of query heads for one
    span per key-value head. density: the bound at each length, which may include others; one number holds at those
    profiled and at twice the longest. rules whose span is not within 1 to N tokens at each of these are left out.
    max_rules_per_layer: different rules within a layer. points: per further objective, how finely its range is cut.
    model signs the plans. Raises ValueError for what does not fit and, naming the length, for a density that no plan has.
    """
    profiled, rules = sorted(influence_by_len), list(rules)
    bounds = _bounds(profiled, density)
    lengths = sorted({*profiled, *bounds})
    usable = sorted({rule for rule in rules if all(rule.fits(n) for n in lengths)})
    if not usable:
        raise ValueError(
            f"rules: expected one whose span is within each length of {lengths}, got none of {len(rules)}"
        )
    spans = {n: _spans(usable, n, block, sink, causal) for n in lengths}
    shape = influence_by_len[profiled[0]].shape[:2]
    costs = {n: _costs(influence_by_len[n], spans[n], n, shape) for n in profiled}
    items = shape[0] * shape[1]
    budgets = {
        f"density at length {n}": Budget(use=_densities(spans[n], n, measure).numpy() / items, most=bound)
        for n, bound in sorted(bounds.items())
    }
    groups = None if max_rules_per_layer is None else [item // shape[1] for item in range(items)]
    found = _trade_offs(costs, budgets, points, {"groups": groups, "max_per_group": max_rules_per_layer})
    plans, signed = [], "" if model is None else model_hash(model)
    for chosen in found:
        layers = torch.tensor(chosen).view(shape).tolist()
        plans.append(
            Plan(
                rules=tuple(tuple(usable[r] for r in layer) for layer in layers), block=block, sink=sink, causal=causal,
                losses={n: float(costs[n][range(items), chosen].sum()) for n in profiled}, model=signed,
            )
        )  # fmt: skip
    return _front(plans)


def _bounds(profiled: Sequence[int], density: float | Mapping[int, float]) -> Mapping[int, float]:
    """The bound on the density at each length that has one."""
    if not profiled:
        raise ValueError("influence_by_len: expected at least one length, got none")
    everywhere = [*profiled, 2 * profiled[-1]]
    bounds = dict(density) if isinstance(density, Mapping) else dict.fromkeys(everywhere, density)
    for bound in bounds.values():
        check_density(bound)
    return bounds


def _costs(effect: Tensor, spans: SpanPlan, length: int, shape: torch.Size) -> Tensor:
    """What each rule, which `spans` has as heads, leaves out of the blocks of each layer's heads, [L H, R]."""
    kept = spans.to_block_mask(length, length, spans.unit).blocks[0]
    if effect.shape != (*shape, *kept.shape[1:]):
        raise ValueError(
            f"influence at length {length}: expected {[*shape, *kept.shape[1:]]} for blocks of {spans.unit}, got "
            f"{list(effect.shape)}; measure it with this block"
        )
    return effect.cpu().double().flatten(2).flatten(0, 1) @ (~kept).double().flatten(1).T


def _trade_offs(
    costs: Mapping[int, Tensor], budgets: Mapping[str, Budget], points: int, limits: Mapping[str, Any]
) -> Iterable[list[int]]:
    """The choice that is best at each length, and those that are best at one with bounds on the cost at the others."""
    best = {n: choose_options(cost, budgets, **limits) for n, cost in costs.items()}
    yield from best.values()
    reached = {
        n: [float(cost[range(len(cost)), c].sum()) for c in best.values()] for n, cost in costs.items()
    }
    cuts = {n: torch.linspace(min(x), max(x), points).tolist()[1:] for n, x in reached.items()}
    for primary, cost in costs.items():
        others = [n for n in costs if n != primary]
        for ends in product(*(cuts[n] for n in others)) if others else ():
            bounded = {
                f"cost at length {n}": Budget(use=costs[n], most=end)
                for n, end in zip(others, ends, strict=True)
            }
            found = find_options(cost, {**budgets, **bounded}, **limits)
            if found is not None:
                yield found


def _front(plans: Iterable[Plan]) -> list[Plan]:
    """The plans that no other one beats, each once, the best at the longest length first."""
    unique = list({plan.rules: plan for plan in plans}.values())
    losses = torch.tensor(
        [[plan.losses[n] for n in sorted(plan.losses)] for plan in unique], dtype=torch.float64
    )
    no_worse = (losses[:, None] <= losses).all(2)
    beaten = (no_worse & (losses[:, None] < losses).any(2)).any(0)
    kept = [plan for plan, lost in zip(unique, beaten.tolist(), strict=True) if not lost]
    return sorted(kept, key=lambda plan: plan.losses[max(plan.losses)])


def select_plan(plans: Sequence[Plan], val: Callable[[Plan], float], length: int | None = None) -> Plan:
    """The plan with the least val(plan), a validation loss at a length that no plan was made for; of equal ones the first.

    length: that length, to have it checked. Raises ValueError for no plans and for a length that was profiled.
    """
    if not plans:
        raise ValueError("plans: expected at least one, got none")
    if any(length in plan.losses for plan in plans):
        raise ValueError(f"length: expected one that no plan was made at, got {length}; validate at another")
    return min(plans, key=val)
