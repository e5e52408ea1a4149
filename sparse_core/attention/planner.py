"""One option for each item, at the least total cost, within budgets: an integer program that is solved exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SLACK = 1e-9  # of a budget that is met to the last digit, as a share of the largest use
RANGE = 1e3  # costs are scaled to it: HiGHS stops within an absolute gap of 1e-6


@dataclass(frozen=True, kw_only=True)
class Budget:
    """use [N, R] (or what broadcasts to it) of item n under option r, of which the chosen ones may sum up to `most`."""

    use: ArrayLike
    most: float


def choose_options(
    cost: ArrayLike, budgets: Mapping[str, Budget], *, groups: Sequence[int] | None = None,
    max_per_group: int | None = None, gap: float = 0.0,
) -> list[int]:  # fmt: skip
    """The option of each of N items, of cost [N, R], whose total is least; the same input always gives the same choice.

    groups: the group of each item, in which at most `max_per_group` different options may occur. gap: accept a choice
    within this share of the least cost, for problems too large to solve exactly. Raises ValueError for shapes that do not
    fit and, naming the first budget that cannot be met, where there is no such choice.
    """
    found = find_options(cost, budgets, groups=groups, max_per_group=max_per_group, gap=gap)
    if found is None:
        raise ValueError(_explain(np.asarray(cost, np.float64), budgets, groups, max_per_group))
    return found


def find_options(
    cost: ArrayLike, budgets: Mapping[str, Budget], *, groups: Sequence[int] | None = None,
    max_per_group: int | None = None, gap: float = 0.0,
) -> list[int] | None:  # fmt: skip
    """As `choose_options`, but None where there is no such choice."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    cost = np.asarray(cost, np.float64)
    _check(cost, budgets, groups, max_per_group)
    rows, low, high = _constraints(cost.shape, budgets, groups, max_per_group)
    # What all options of an item cost alike decides nothing, and hides small differences from the solver.
    above = cost - cost.min(1, keepdims=True)
    objective = np.zeros(rows.shape[1])
    objective[: cost.size] = above.ravel() / (above.max() or 1) * RANGE
    result = milp(
        objective, integrality=np.ones_like(objective), bounds=Bounds(0, 1), options={"mip_rel_gap": gap},
        constraints=LinearConstraint(rows, low, high),
    )  # fmt: skip
    if result.status == 2:
        return None
    if result.status != 0:
        raise RuntimeError(f"planner: expected an optimal choice, got: {result.message}")
    return [int(option) for option in result.x[: cost.size].reshape(cost.shape).argmax(1)]


def _check(
    cost: NDArray[Any], budgets: Mapping[str, Budget], groups: Sequence[int] | None, most: int | None
) -> None:
    if cost.ndim != 2 or not cost.size or not np.isfinite(cost).all():
        raise ValueError(
            f"cost: expected finite numbers [N, R] of at least one item and option, got {list(cost.shape)}"
        )
    for name, budget in budgets.items():
        use = np.asarray(budget.use, np.float64)
        fits = use.ndim <= 2 and all(
            a in (1, b) for a, b in zip(use.shape[::-1], cost.shape[::-1], strict=False)
        )
        if not fits or not np.isfinite(use).all():
            raise ValueError(
                f"{name}: expected finite uses {list(cost.shape)}, got {list(use.shape)}; give one per item and option"
            )
    if (groups is None) != (most is None) or (most is not None and most < 1):
        raise ValueError(
            f"max_per_group: expected at least 1 and the groups, or neither, got {most} and {groups}"
        )
    if groups is not None and len(groups) != len(cost):
        raise ValueError(f"groups: expected one for each of {len(cost)} items, got {len(groups)}")


def _constraints(
    shape: tuple[int, int], budgets: Mapping[str, Budget], groups: Sequence[int] | None, most: int | None
) -> tuple[Any, Any, Any]:
    """Rows, lower and upper ends over x [N R] and, with groups, y [G R]: whether group g has an item of option r."""
    from scipy import sparse

    items, options = shape
    names = [] if groups is None else sorted(set(groups))
    blocks = [[sparse.kron(sparse.eye_array(items), np.ones((1, options))), None]]
    low, high = [np.ones(items)], [np.ones(items)]
    for budget in budgets.values():
        use = np.broadcast_to(np.asarray(budget.use, np.float64), shape).reshape(1, -1)
        scale = np.abs(use).max() or 1
        blocks.append([sparse.csr_array(use / scale), None])
        low.append(np.full(1, -np.inf))
        high.append(np.full(1, budget.most / scale + SLACK))
    if groups is None:
        return sparse.vstack([block[0] for block in blocks], "csr"), np.concatenate(low), np.concatenate(high)
    owner = sparse.csr_array(np.array([[group == name for name in names] for group in groups], np.float64))
    blocks.append([sparse.eye_array(items * options), -sparse.kron(owner, sparse.eye_array(options))])
    blocks.append([None, sparse.kron(sparse.eye_array(len(names)), np.ones((1, options)))])
    low += [np.full(items * options + len(names), -np.inf)]
    high += [np.zeros(items * options), np.full(len(names), most)]
    return sparse.block_array(blocks, format="csr"), np.concatenate(low), np.concatenate(high)


def _explain(
    cost: NDArray[Any], budgets: Mapping[str, Budget], groups: Sequence[int] | None, most: int | None
) -> str:
    """Which budget cannot be met: alone, or else the first that those before it leave too little for."""
    limits: dict[str, Any] = {"groups": groups, "max_per_group": most}
    for name, budget in budgets.items():
        use = np.broadcast_to(np.asarray(budget.use, np.float64), cost.shape)
        least = find_options(use, {}, **limits)
        needed = use[np.arange(len(cost)), least].sum()  # without budgets there always is a choice
        if find_options(use, {name: budget}, **limits) is None:
            return f"{name}: expected at most {budget.most:g}, got {needed:g} at the least; raise it or offer less"
    names = list(budgets)
    for count in range(2, len(names)):
        if (
            find_options(np.zeros_like(cost), {name: budgets[name] for name in names[:count]}, **limits)
            is None
        ):
            break
    else:
        count = len(names)
    return (
        f"{names[count - 1]}: expected at most {budgets[names[count - 1]].most:g} beside {', '.join(names[: count - 1])}, "
        "got no choice that meets them all; raise one of them"
    )
