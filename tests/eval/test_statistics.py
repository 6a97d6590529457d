import itertools
import math

import numpy as np
import pytest

from eval.statistics import estimate, jackknife, paired_test, student

SIZES = [5, 10, 50, 200]


def coverage(draw, truth, size, share=False, times=2000):
    """How often the interval holds the truth."""
    generator = np.random.default_rng(size)
    found = [estimate(draw(generator, size), share=share) for _ in range(times)]
    return sum(each.low <= truth <= each.high for each in found) / times


@pytest.mark.parametrize("size", SIZES)
def test_intervals_of_means_cover_the_truth_as_often_as_they_say(size):
    assert coverage(lambda g, n: g.normal(3, 2, n), 3.0, size) == pytest.approx(0.95, abs=0.015)
    least = {5: 0.86, 10: 0.88, 50: 0.92, 200: 0.935}[size]  # a skewed law, whose mean few values do not show
    assert least <= coverage(lambda g, n: g.exponential(1.0, n), 1.0, size) <= 0.97


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.03, 0.3, 0.5, 0.97])
def test_intervals_of_shares_cover_the_truth_as_often_as_they_say(size, share):
    """Exactly, over the binomial law; Wilson's interval lies about 95 %, whatever the share."""
    chance = [math.comb(size, k) * share**k * (1 - share) ** (size - k) for k in range(size + 1)]
    held = []
    for k in range(size + 1):
        found = estimate([1.0] * k + [0.0] * (size - k), share=True)
        held.append(found.low <= share <= found.high)
        assert 0 <= found.low <= k / size <= found.high <= 1
        assert found.high - found.low > 0
    assert sum(c for c, yes in zip(chance, held, strict=True) if yes) >= 0.85


@pytest.mark.parametrize("size", SIZES)
def test_intervals_of_measures_between_0_and_1_cover_the_truth(size):
    assert coverage(lambda g, n: g.beta(2, 6, n), 0.25, size, share=True) >= 0.92
    ties = lambda g, n: g.choice([0.0, 0.5, 1.0], n, p=[0.2, 0.2, 0.6])  # noqa: E731
    assert coverage(ties, 0.7, size, share=True) >= 0.92


def test_a_share_of_one_has_the_interval_of_wilson():
    found = estimate([1.0] * 32, share=True)
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(32 / (32 + 1.959964**2), abs=1e-5)
    third = estimate([1.0] * 10 + [0.0] * 20, share=True)
    assert (third.low, third.high) == pytest.approx((0.19230, 0.51220), abs=1e-4)  # as R's prop.test


def test_few_values_have_no_interval():
    for n in range(1, 5):
        found = estimate([4.0, 1.0, 1.0, 0.0][:n])
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert found.count == n
    assert not math.isnan(estimate([1.0, 2.0, 3.0, 4.0, 5.0]).low)


def test_the_quantiles_of_student():
    table = {4: 2.7764, 9: 2.2622, 29: 2.0452, 199: 1.9720}
    assert [student(n) for n in table] == pytest.approx(list(table.values()), abs=1e-3)


def test_values_of_a_group_count_together():
    values = np.random.default_rng(2).normal(0, 1, 200)
    twice, groups = np.repeat(values, 2), [str(i) for i in range(200) for _ in (0, 1)]
    alone, together = estimate(values), estimate(twice, groups)
    assert together.count == 200
    assert together.mean == pytest.approx(alone.mean)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=1e-6)
    assert estimate(twice).high - estimate(twice).low < 0.8 * (alone.high - alone.low)


def test_the_mean_counts_every_answer_and_the_interval_every_group():
    """Groups of different sizes: the interval covers the ratio of the sums."""
    generator, held = np.random.default_rng(4), 0
    for _ in range(1000):
        sizes = generator.integers(1, 4, 40)
        levels = generator.normal(1.0, 1.0, 40)
        values = [level for size, level in zip(sizes, levels, strict=True) for _ in range(size)]
        groups = [str(i) for i, size in enumerate(sizes) for _ in range(size)]
        found = estimate(values, groups)
        assert found.mean == pytest.approx(np.mean(values))
        assert found.count == 40
        held += found.low <= 1.0 <= found.high
    assert 0.92 <= held / 1000 <= 0.97


def test_missing_values_are_left_out():
    assert estimate([1.0, math.nan, 3.0]).count == 2
    assert math.isnan(estimate([]).mean)


def test_the_jackknife_of_a_mean_is_its_interval():
    values = np.random.default_rng(3).normal(0, 1, 12)
    without = [(values.sum() - value) / 11 for value in values]
    found = estimate(values)
    assert jackknife(without) == pytest.approx(found.high - found.mean)
    assert math.isnan(jackknife([1.0] * 4))


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


def test_equal_shares_have_one_interval_however_they_are_rounded():
    """Seven times 0.1 do not add up to 0.7 in floating point, ten times to 1."""
    for count in (7, 10):
        found = estimate([0.1] * count, share=True)
        assert found.high - found.low > 0.3
