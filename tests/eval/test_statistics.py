import itertools
import math

import numpy as np
import pytest

from eval.statistics import bootstrap, paired_test


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap(values)
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.count == 400
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        found = bootstrap(generator.exponential(1.0, 60), draws=300, seed=seed)
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_values_of_a_group_are_resampled_together():
    values = np.random.default_rng(2).normal(0, 1, 200)
    twice, groups = np.repeat(values, 2), [str(i) for i in range(200) for _ in (0, 1)]
    alone, together = bootstrap(values), bootstrap(twice, groups)
    assert together.count == 200
    assert together.mean == pytest.approx(alone.mean)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert bootstrap(twice).high - bootstrap(twice).low < 0.8 * (alone.high - alone.low)


def test_the_mean_counts_every_answer_and_the_interval_every_group():
    found = bootstrap([1.0, 1.0, 4.0], ["a", "a", "b"])
    assert found.mean == 2.0
    assert (found.low, found.high, found.count) == (1.0, 4.0, 2)


def test_missing_values_are_left_out_and_equal_seeds_agree():
    assert bootstrap([1.0, math.nan, 3.0]).count == 2
    assert bootstrap([1.0, 2.0, 5.0]) == bootstrap([1.0, 2.0, 5.0])
    assert math.isnan(bootstrap([]).mean)
    assert (bootstrap([4.0]).low, bootstrap([4.0]).high) == (4.0, 4.0)


def test_few_pairs_are_enumerated():
    first, second = [1.0, 2.0, 3.0, 4.0, 9.0], [2.0, 2.5, 2.0, 7.0, 9.0]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    observed = abs(sum(differences))
    extreme = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed - 1e-12
        for signs in itertools.product((1, -1), repeat=5)
    ]
    mean, p = paired_test(first, second)
    assert mean == pytest.approx(sum(differences) / 5)
    assert p == pytest.approx(sum(extreme) / 32)


def test_many_pairs_give_the_p_of_the_normal_limit():
    generator = np.random.default_rng(3)
    first = generator.normal(0, 1, 400)
    second = first + generator.normal(0.1, 1, 400)
    difference = second - first
    z = difference.sum() / math.sqrt((difference**2).sum())
    _, p = paired_test(first, second)
    assert p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.02)


def test_no_difference_and_no_pairs():
    assert paired_test([1.0, 2.0], [1.0, 2.0]) == (0.0, 1.0)
    assert all(math.isnan(x) for x in paired_test([math.nan], [1.0]))
    with pytest.raises(ValueError, match="equal lengths"):
        paired_test([1.0], [1.0, 2.0])
