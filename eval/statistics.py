"""How sure a mean is, and whether two systems differ: the bootstrap, and the paired permutation test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval.

    Attributes:
        mean: of the values that are there.
        low: lower end of the 95 % interval.
        high: upper end.
        count: how many independent values, or groups of values, there are.
    """

    mean: float
    low: float
    high: float
    count: int


def bootstrap(
    values: Sequence[float],
    groups: Sequence[str] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Mean and percentile-bootstrap interval (Efron, 1979); NaN are left out.

    Args:
        values: one for each answer.
        groups: what each belongs to: answers of one group (the turns of a question) depend on each other, so
            whole groups are resampled; by default each is its own.
        draws: resamples.
        seed: of the resampling.
        level: of the interval.
    """
    x = np.asarray(values, dtype=float)
    known = ~np.isnan(x)
    if not known.any():
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    names = np.arange(len(x)).astype(str) if groups is None else np.asarray(groups)
    _, owner = np.unique(names[known], return_inverse=True)
    sums, counts = np.bincount(owner, x[known]), np.bincount(owner)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for i in range(draws):
        some = generator.integers(0, len(sums), len(sums))
        means[i] = sums[some].sum() / counts[some].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(x[known].mean()), float(low), float(high), len(sums))


def paired_test(
    first: Sequence[float], second: Sequence[float], draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Whether two systems differ on the same questions: mean difference (second - first), and p-value.

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
