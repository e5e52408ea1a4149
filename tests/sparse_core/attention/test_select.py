"""Selectors: what they keep, ties, rows without any choice, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_core.attention import select

INF = float("inf")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_topk_keeps_the_k_highest(seed, k):
    scores = draw(seed, 3, 7)
    kept = select.topk(scores, k)
    assert (kept.sum(-1) == min(k, 7)).all()
    for row, chosen in zip(scores, kept, strict=True):
        assert chosen.all() or not chosen.any() or row[chosen].min() > row[~chosen].max()


def test_of_equal_scores_the_lower_index_wins():
    assert select.topk(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [
        True,
        True,
        False,
        True,
        False,
    ]


def test_k_may_differ_between_rows():
    kept = select.topk(draw(0, 2, 5), torch.tensor([1, 4]))
    assert kept.sum(-1).tolist() == [1, 4]


def test_the_impossible_is_never_kept():
    scores = torch.tensor([[-INF, 0.0, -INF], [-INF, -INF, -INF]])
    assert select.topk(scores, 3).tolist() == [[False, True, False], [False] * 3]
    assert select.ratio(scores, 1.0).tolist() == [[False, True, False], [False] * 3]
    assert select.mass(scores, 1.0).tolist() == [[False, True, False], [False] * 3]
    assert not select.threshold(scores, -1e30)[1].any()


def test_threshold_keeps_what_scores_more():
    assert select.threshold(torch.tensor([0.1, 0.2, 0.3]), 0.2).tolist() == [False, False, True]


def test_ratio_is_of_the_possible_ones_and_rounds_up():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0, -INF], [1.0, -INF, -INF, -INF, -INF]])
    assert select.ratio(scores, 0.5).sum(-1).tolist() == [2, 1]
    assert select.ratio(scores, 0.6).sum(-1).tolist() == [3, 1]


@given(st.integers(0, 1000), st.floats(0.05, 1.0))
@settings(max_examples=30, deadline=None)
def test_mass_keeps_the_fewest_that_hold_enough(seed, share):
    scores = 3 * draw(seed, 4, 9)
    weights, kept = scores.softmax(-1), select.mass(scores, share)
    held = (weights * kept).sum(-1)
    assert (held >= share - 1e-5).all()
    lightest = torch.where(kept, weights, INF).amin(-1)
    assert (held - lightest < share + 1e-5).all()


def test_grouped_topk_shares_the_budget():
    scores = torch.zeros(1, 2, 3, 4)
    scores[0, 1] = 1
    kept = select.grouped_topk(scores, 5, dim=1)
    assert kept.shape == scores.shape
    assert kept[0, :, 0].sum(-1).tolist() == [1, 4]
    assert (kept.sum((1, 3)) == 5).all()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: select.topk(s, -1), "k: expected 0 or more, got -1"),
        (lambda s: select.ratio(s, 0.0), "share: expected more than 0 and at most 1, got 0.0"),
        (lambda s: select.mass(s, 1.5), "share: expected more than 0 and at most 1, got 1.5"),
        (lambda s: select.threshold(s, INF), "least: expected a finite number, got inf"),
        (lambda s: select.topk(s * torch.nan, 1), "scores: expected numbers, got NaN"),
    ],
)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(2, 3))
