"""Intervals of means, and the paired permutation test of two systems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

MIN_VALUES = 5
"""Independent values below which an interval would say nothing."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        mean: of the values that are there.
        low: lower end of the 95 % interval; NaN where there are fewer than `MIN_VALUES` values.
        high: upper end.
        count: how many independent values, or groups of values, there are.
    """

    mean: float
    low: float
    high: float
    count: int


def estimate(
    values: Sequence[float],
    groups: Sequence[str] | None = None,
    share: bool = False,
    level: float = 0.95,
) -> Estimate:
    """Mean and confidence interval; NaN are left out.

    The interval is Student's, with the standard error of a mean over groups of different sizes. That of a
    share is Wilson's (1927), which has a width also where every answer is right, for the number of
    independent answers that would be as sure.

    Args:
        values: one for each answer.
        groups: what each belongs to: answers of one group (the turns of a question) depend on each other, so
            whole groups are compared; by default each is its own.
        share: whether values lie between 0 and 1.
        level: of the interval.
    """
    x = np.asarray(values, dtype=float)
    finite = ~np.isnan(x)
    if not finite.any():
        return Estimate(math.nan, math.nan, math.nan, 0)
    names = np.arange(len(x)).astype(str) if groups is None else np.asarray(groups)
    _, owner = np.unique(names[finite], return_inverse=True)
    sums, counts = np.bincount(owner, x[finite]), np.bincount(owner)
    mean, n = float(x[finite].mean()), len(sums)
    if n < MIN_VALUES:
        return Estimate(mean, math.nan, math.nan, n)
    variance = float(((sums - mean * counts) ** 2).sum()) / counts.sum() ** 2  # of the mean, times (n-1)/n
    if share:
        alike = bool(np.isin(sums / counts, (0, 1)).all()) and len(set(counts)) == 1  # n times yes or no
        factor = NormalDist().inv_cdf((1 + level) / 2) if alike else student(n - 1, level)
        spread = variance > 1e-20  # what is below is rounding of equal values
        size = mean * (1 - mean) / variance if spread else float(n)
        return Estimate(mean, *_wilson(mean, size, factor), n)
    half = student(n - 1, level) * math.sqrt(variance * n / (n - 1))
    return Estimate(mean, mean - half, mean + half, n)


def _wilson(share: float, n: float, factor: float) -> tuple[float, float]:
    """The shares from which `share` of n lies no more than `factor` standard errors away."""
    square = factor**2 / n
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def student(freedom: int, level: float = 0.95) -> float:
    """Half-width of the central interval of Student's t; to a thousandth from four degrees of freedom on.

    The expansion of Abramowitz and Stegun, 26.7.5.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))


def jackknife(values: Sequence[float], level: float = 0.95) -> float:
    """Half the width of the interval of a statistic of a set, from its values without one member each.

    The jackknife's variance (Efron and Stein, 1981) is in the mean no smaller than the variance over sets of
    this size, whatever the statistic; resampling with replacement changes what depends on the size. NaN for
    fewer than `MIN_VALUES` members.
    """
    x, n = np.asarray(values, dtype=float), len(values)
    if n < MIN_VALUES or np.isnan(x).any():
        return math.nan
    return student(n - 1, level) * math.sqrt((n - 1) / n * float(((x - x.mean()) ** 2).sum()))


def paired_test(
    first: Sequence[float], second: Sequence[float], draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Mean difference of two systems on the same questions (second - first), and its p-value.

    Two-sided permutation test: under the null hypothesis every difference may have either sign. All signs
    are enumerated where there are no more than `draws` of them. Pairs with a NaN are left out.

    Raises:
        ValueError: for sequences of different lengths.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(a) != len(b):
        raise ValueError(f"pairs need equal lengths, got {len(a)} and {len(b)}")
    difference = (b - a)[~np.isnan(a + b)]
    difference = difference[difference != 0]  # they stay what they are under either sign
    n, total = len(difference), int((~np.isnan(a + b)).sum())
    if total == 0:
        return float("nan"), float("nan")
    if n == 0:
        return 0.0, 1.0
    if 2**n <= draws:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], size=(draws, n))
        extra = 1  # the observed signs are one more draw, so that p is never 0
    sums = np.abs(signs @ difference)
    extreme = int((sums >= abs(difference.sum()) - 1e-12 * np.abs(difference).sum()).sum())
    return float(difference.sum() / total), (extreme + extra) / (len(signs) + extra)
