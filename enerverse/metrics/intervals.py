"""Intervals and tests for small samples: success counts, seeds, paired episodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Values = Sequence[float] | np.ndarray


class Interval(NamedTuple):
    """An estimate with the two ends of its confidence interval, in the unit of the data."""

    estimate: float
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the success rate with its score interval (Wilson 1927), good for few trials and at 0 or n.

    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes: expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At 0 or n the end is exact; rounding would leave it a hair outside.
    low = 0.0 if successes == 0 else centre - margin
    high = 1.0 if successes == n else centre + margin
    return Interval(rate, low, high)


def student_mean(values: Values, confidence: float = 0.95) -> Interval:
    """Return the mean with Student's t interval: the one to use for three to ten seeds.

    Assumes roughly normal values. Raises ValueError for fewer than two values or non-finite ones.
    """
    sample = _sample("values", values)
    mean = float(sample.mean())
    margin = student_quantile(0.5 + _checked(confidence) / 2, len(sample) - 1)
    margin *= float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return Interval(mean, mean - margin, mean + margin)


def bootstrap_mean(
    values: Values, seed: int = 0, confidence: float = 0.95, resamples: int = 10_000
) -> Interval:
    """Return the mean with its percentile bootstrap interval (Efron 1979); the same seed gives the same ends.

    Too narrow under about ten values: use `student_mean` there.
    Raises ValueError for fewer than two values or non-finite ones.
    """
    sample = _sample("values", values)
    picks = np.random.default_rng(seed).integers(0, len(sample), size=(resamples, len(sample)))
    tail = (1 - _checked(confidence)) / 2
    low, high = np.quantile(sample[picks].mean(axis=1), [tail, 1 - tail])
    return Interval(float(sample.mean()), float(low), float(high))


def bootstrap_paired_difference(
    values: Values, baseline: Values, seed: int = 0, confidence: float = 0.95, resamples: int = 10_000
) -> Interval:
    """Return the mean of `values - baseline` with its bootstrap interval; both list the same cases.

    Raises ValueError when the lengths differ, and as `bootstrap_mean` does.
    """
    first, second = _sample("values", values), _sample("baseline", baseline)
    if len(first) != len(second):
        raise ValueError(f"baseline: expected {len(first)} values, one per case, got {len(second)}")
    return bootstrap_mean(first - second, seed, confidence, resamples)


def mcnemar_exact(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> float:
    """Return the two-sided p-value that two methods succeed equally often on the same cases (McNemar 1947).

    The exact form: of the cases where just one succeeds, the count of either is binomial with chance 1/2.
    Raises ValueError when the lengths differ or there are no cases.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"second: expected one outcome per case of first, got {a.shape} and {b.shape}")
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def student_quantile(probability: float, degrees: int) -> float:
    """Return the t with P(T <= t) = `probability` >= 0.5 for a whole number of degrees of freedom >= 1."""
    if degrees < 1 or not 0.5 <= probability < 1:
        raise ValueError(
            f"probability: expected 0.5 <= p < 1 and degrees >= 1, got {probability} and {degrees}"
        )
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < probability else (low, middle)
    return high


def _student_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0, the finite sums of Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(1 + odd, degrees - 2, 2):
        term *= math.cos(angle) ** 2 * k / (k + 1)
        total += term
    central = math.sin(angle) * total
    central = 2 / math.pi * (angle + central) if odd else central
    return 0.5 + central / 2


def _sample(name: str, values: Values) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2 or not np.isfinite(sample).all():
        got = f"shape {sample.shape}" if sample.ndim != 1 or len(sample) < 2 else "nan or inf among them"
        raise ValueError(f"{name}: expected two or more finite numbers in one row, got {got}")
    return sample


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence}; 0.95 is usual")
    return confidence
