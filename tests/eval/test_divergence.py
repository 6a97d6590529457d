"""The distance of sets of texts: its closed form against the integral, and on sets of known distance."""

import numpy as np
import pytest

from eval.divergence import distance, frontier_integral, smoothed


def kl(p, q):
    return float(np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0)))


def integral(p, q, steps=20_000):
    """The definition, by the midpoint rule."""
    total = 0.0
    for share in (np.arange(steps) + 0.5) / steps:
        mixture = share * p + (1 - share) * q
        inside = mixture > 0
        total += share * kl(p[inside], mixture[inside]) + (1 - share) * kl(q[inside], mixture[inside])
    return 2 * total / steps


@pytest.mark.parametrize(
    ("p", "q"),
    [([0.5, 0.3, 0.2], [0.1, 0.3, 0.6]), ([0.9, 0.1, 0.0], [0.0, 0.1, 0.9]), ([1.0, 0.0], [0.5, 0.5])],
)
def test_the_closed_form_is_the_integral(p, q):
    p, q = np.array(p), np.array(q)
    assert frontier_integral(p, q) == pytest.approx(integral(p, q), abs=1e-4)
    assert frontier_integral(p, q) == pytest.approx(frontier_integral(q, p))


def test_equal_histograms_and_such_that_share_nothing():
    p = np.array([0.2, 0.5, 0.3, 0.0])
    assert frontier_integral(p, p) == 0
    assert frontier_integral(p, np.array([0.0, 0.0, 0.0, 1.0])) == pytest.approx(1)
    near = p + np.array([1e-7, -1e-7, 0, 0])
    assert 0 <= frontier_integral(p, near) < 1e-10


def clouds(rng, shares, count):
    """Points about far corners of a cube, so many shares of them at each."""
    corners = np.eye(4) * 20
    return corners[rng.choice(4, size=count, p=shares)] + rng.normal(0, 0.01, (count, 4))


def test_on_far_clouds_it_is_that_of_their_shares():
    """k-means finds the four clouds, so that the histograms are those of the draws, and known."""
    rng = np.random.default_rng(0)
    references, answers = clouds(rng, [0.25] * 4, 40), clouds(rng, [0.7, 0.1, 0.1, 0.1], 40)
    found = distance(references, answers[:, None])
    assert found.bins == 4
    expected = frontier_integral(*(smoothed(set_.argmax(1), 4) for set_ in (references, answers)))
    assert found.value == pytest.approx(expected)
    assert found.value > 2 * found.chance > 0


def test_two_samples_of_one_law_are_as_far_apart_as_chance_has_it():
    rng = np.random.default_rng(1)
    found = [
        distance(clouds(rng, [0.25] * 4, 40), clouds(rng, [0.25] * 4, 80).reshape(40, 2, 4), seed=i)
        for i in range(40)
    ]
    values, chance = (np.array([getattr(each, name) for each in found]) for name in ("value", "chance"))
    assert values.mean() == pytest.approx(chance.mean(), abs=3 * values.std() / np.sqrt(40))
    assert chance.std() < values.std()


def test_the_same_texts_are_at_no_distance():
    references = clouds(np.random.default_rng(2), [0.25] * 4, 30)
    found = distance(references, references[:, None])
    assert found.value == found.chance == 0
    with pytest.raises(ValueError, match="at least 10 references"):
        distance(references[:9], references[:9, None])


def test_half_a_text_is_added_to_each_bin():
    assert smoothed(np.array([[0, 0], [1, 0]]), 3) == pytest.approx(np.array([3.5, 1.5, 0.5]) / 5.5)
