"""Choosing under budgets: the optimum is that of trying everything, and what cannot be met is named."""

import itertools

import numpy as np
import pytest

from sparse_core.attention.planner import Budget, choose_options, find_options


def draw(seed, items=5, options=4, budgets=2):
    generator = np.random.default_rng(seed)
    cost = generator.normal(size=(items, options)) * 10 ** generator.uniform(-3, 3)
    uses = generator.uniform(0, 1, size=(budgets, items, options))
    return cost, {f"length {n}": Budget(use=use, most=0.35 * items) for n, use in enumerate(uses)}


def search(cost, budgets, groups=None, most=None):
    """Every choice in turn; the least cost, or None."""
    best, rows = None, np.arange(len(cost))
    for choice in itertools.product(range(cost.shape[1]), repeat=len(cost)):
        if any(np.broadcast_to(b.use, cost.shape)[rows, choice].sum() > b.most for b in budgets.values()):
            continue
        if groups and any(
            len({o for o, g in zip(choice, groups, strict=True) if g == group}) > most
            for group in set(groups)
        ):
            continue
        total = cost[rows, choice].sum()
        best = total if best is None else min(best, total)
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [None, 1, 2])
def test_the_choice_is_the_best_of_all(seed, most):
    cost, budgets = draw(seed)
    groups = None if most is None else ["a", "a", "a", "b", "b"]
    found = find_options(cost, budgets, groups=groups, max_per_group=most)
    best = search(cost, budgets, groups, most)
    if best is None:
        assert found is None
        return
    assert cost[np.arange(5), found].sum() == pytest.approx(best, rel=1e-9)
    for budget in budgets.values():
        assert budget.use[np.arange(5), found].sum() <= budget.most + 1e-6
    assert found == find_options(cost, budgets, groups=groups, max_per_group=most)


def test_a_budget_may_be_met_to_the_last_digit():
    use = np.array([[0.1, 0.2], [0.2, 0.3]])
    assert choose_options(-use, {"sum": Budget(use=use, most=0.1 + 0.3)}) in ([0, 1], [1, 0])


def test_small_differences_beside_large_costs_decide():
    cost = np.array([[1e6, 1e6 + 1e-3], [5.0, 5.0 - 1e-3]])
    assert choose_options(cost, {}) == [0, 1]


def test_a_tight_budget_changes_the_choice():
    cost, use = np.array([[0.0, 1.0], [0.0, 3.0]]), np.array([1.0, 0.0])
    assert choose_options(cost, {"use": Budget(use=use, most=2)}) == [0, 0]
    assert choose_options(cost, {"use": Budget(use=use, most=1)}) == [1, 0]


def test_many_heads_and_rules_are_solved():
    generator = np.random.default_rng(0)
    cost = -np.sort(generator.exponential(size=(64, 20)), 1).cumsum(1)
    use = np.linspace(0.05, 1, 20)
    found = choose_options(
        cost, {"2k": Budget(use=use, most=32.0), "4k": Budget(use=use**1.2, most=28.0)}, gap=1e-3
    )
    assert use[found].sum() <= 32 + 1e-6
    assert (use**1.2)[found].sum() <= 28 + 1e-6


def test_the_budget_that_cannot_be_met_is_named():
    use = np.array([[0.5, 0.9], [0.6, 0.9]])
    easy, hard = Budget(use=use, most=2), Budget(use=use, most=1)
    with pytest.raises(ValueError, match=r"length 4096: expected at most 1, got 1.1 at the least; raise it"):
        choose_options(use, {"length 2048": easy, "length 4096": hard})


def test_budgets_that_cannot_be_met_together_are_named():
    one, other = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    budgets = {"a": Budget(use=one, most=0.5), "b": Budget(use=1, most=1), "c": Budget(use=other, most=0.5)}
    with pytest.raises(ValueError, match="c: expected at most 0.5 beside a, b, got no choice that meets"):
        choose_options(np.zeros((1, 2)), budgets)


def test_groups_may_make_a_budget_impossible():
    use = np.array([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(ValueError, match="use: expected at most 0, got 1 at the least"):
        choose_options(use, {"use": Budget(use=use, most=0)}, groups=[0, 0], max_per_group=1)
    assert choose_options(use, {"use": Budget(use=use, most=0)}, groups=[0, 1], max_per_group=1) == [0, 1]


REFUSED = {
    "cost: expected finite numbers": lambda: choose_options([[np.nan]], {}),
    "cost: expected finite numbers .* got \\[0, 2\\]": lambda: choose_options(np.zeros((0, 2)), {}),
    r"use: expected finite uses \[1, 2\], got \[3\]": lambda: choose_options(
        [[1.0, 2.0]], {"use": Budget(use=[1, 2, 3], most=1)}
    ),
    "max_per_group: expected at least 1 and the groups, or neither, got 2 and None": lambda: choose_options(
        [[1.0]], {}, max_per_group=2
    ),
    "groups: expected one for each of 1 items, got 2": lambda: choose_options(
        [[1.0]], {}, groups=[0, 0], max_per_group=1
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()
