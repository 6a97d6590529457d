"""DDRO's loss: its optimum on models of a few outcomes, its slopes, and what happens past the pole."""

import math

import pytest
import torch
from scipy.optimize import brentq

from finetune.density_ratio import bad_loss, gain_limit, good_loss, log_ratio, ratio_loss

TWO = (0.7, 0.3), (0.2, 0.8)
THREE = (0.5, 0.3, 0.2), (0.1, 0.3, 0.6)
APART = (0.6, 0.4, 0.0), (0.0, 0.3, 0.7)
"""p_w and p_l over the outcomes; each of the last has an outcome that the other never gives."""


def expected_loss(logp, good, bad, reference, theta, alpha, **options):
    """L over all outcomes."""
    gain = logp - reference.log()
    terms = good * good_loss(gain, theta, alpha, **options) + bad * bad_loss(gain, theta, alpha, **options)
    return terms.sum()


def optimum(good, bad, reference, theta, alpha=0.0, start=None, **options):
    """The softmax model with the least loss, by L-BFGS in float64."""
    logits = (reference.log() if start is None else torch.tensor(start).double()).clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = expected_loss(logits.log_softmax(0), good, bad, reference, theta, alpha, **options)
        loss.backward()
        return loss

    solver.step(closure)
    return logits.detach().softmax(0)


def mixture(outcomes, theta):
    good, bad = (torch.tensor(p, dtype=torch.float64) for p in outcomes)
    return good, bad, theta * good + (1 - theta) * bad


@pytest.mark.parametrize("outcomes", [TWO, THREE])
@pytest.mark.parametrize("theta", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9])
def test_the_optimum_is_the_distribution_of_good_answers(outcomes, theta, alpha):
    good, bad, reference = mixture(outcomes, theta)
    torch.testing.assert_close(optimum(good, bad, reference, theta, alpha), good, rtol=0, atol=1e-6)


@pytest.mark.parametrize("theta", [0.2, 0.5, 0.8])
def test_the_loss_is_that_of_the_paper_where_the_ratio_is_positive(theta):
    gain = torch.linspace(-5, -math.log(theta) - 0.1, 40, dtype=torch.float64)
    r = (torch.exp(-gain) - theta) / (1 - theta)
    inside = r > 0.05
    torch.testing.assert_close(good_loss(gain, theta)[inside], torch.log(1 + r)[inside])
    torch.testing.assert_close(bad_loss(gain, theta)[inside], torch.log(1 + 1 / r)[inside])


@pytest.mark.parametrize(("theta", "alpha"), [(0.3, 0.0), (0.5, 0.1), (0.4, 0.4), (0.3, 0.7)])
def test_the_relative_ratio_is_that_of_the_mixtures(theta, alpha):
    """ρ = p_w / (α p_w + (1-α) p_l) where the model is p_w; α = θ gives p/p_ref itself."""
    good, bad, reference = mixture(THREE, theta)
    ratio = log_ratio(good.log() - reference.log(), theta, alpha).exp()
    torch.testing.assert_close(ratio, good / (alpha * good + (1 - alpha) * bad))
    if theta == alpha:
        torch.testing.assert_close(ratio, good / reference)


def test_outcomes_that_are_only_good_or_only_bad():
    """The relative loss has its optimum at p_w exactly; the plain one cannot be lower anywhere than there."""
    theta = 0.4
    good, bad, reference = mixture(APART, theta)
    got = optimum(good, bad, reference, theta, 0.2)
    torch.testing.assert_close(got, good, rtol=0, atol=1e-4)
    least = optimum(good, bad, reference, theta)
    there = expected_loss((good + 1e-12).log(), good, bad, reference, theta, 0.0)
    assert float(there) == pytest.approx(
        float(expected_loss(least.log(), good, bad, reference, theta, 0.0)), abs=1e-6
    )


def stationary(good, bad, reference, theta, alpha):
    """The constrained optimum by its Lagrange condition, one outcome and one multiplier at a time.

    With u = p(y), d/du [p_w l_w + p_l l_l] + λ = 0 and Σ u = 1. By 1/ρ = q = ((1-α) p_ref/u + α - θ) / (1-θ),
    l_w = log(1+q) + α log(1+1/q), l_l = (1-α) log(1+1/q), dq/du = -(1-α) p_ref / ((1-θ) u²).
    """

    def slope(u, w, l, ref):
        q = ((1 - alpha) * ref / u + alpha - theta) / (1 - theta)
        outer = w * (1 / (1 + q) - alpha / (q * (1 + q))) - l * (1 - alpha) / (q * (1 + q))
        return -outer * (1 - alpha) * ref / ((1 - theta) * u**2)

    def outcome(multiplier, w, l, ref):
        top = ref * (1 - alpha) / (theta - alpha) if theta > alpha else 1e3
        return brentq(lambda u: slope(u, w, l, ref) + multiplier, 1e-9, top * (1 - 1e-9), xtol=1e-14)

    cells = list(zip(good.tolist(), bad.tolist(), reference.tolist(), strict=True))

    def excess(multiplier):
        return sum(outcome(multiplier, *cell) for cell in cells) - 1

    multiplier = brentq(excess, -0.5, 0.5, xtol=1e-14)
    return torch.tensor([outcome(multiplier, *cell) for cell in cells], dtype=torch.float64), multiplier


@pytest.mark.parametrize("stated", [0.3, 0.45, 0.5, 0.6])
@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_a_misstated_share_leads_to_the_point_that_is_derived(stated, alpha):
    """θ is 0.5. Stated lower, good answers are favoured beyond p_w; stated higher, too little."""
    good, bad, reference = mixture(THREE, 0.5)
    expected, multiplier = stationary(good, bad, reference, stated, alpha)
    got = optimum(good, bad, reference, stated, alpha)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert (abs(multiplier) < 1e-9) == (stated == 0.5)
    best, worst = float(got[0] - good[0]), float(got[2] - good[2])
    if stated < 0.5:
        assert best > 1e-3 > -1e-3 > worst
    if stated > 0.5:
        assert best < -1e-3 < 1e-3 < worst


@pytest.mark.parametrize(("theta", "alpha"), [(0.5, 0.0), (0.8, 0.3), (0.4, 0.4), (0.3, 0.6)])
def test_slopes_agree_with_finite_differences_and_are_bounded(theta, alpha):
    for function in (good_loss, bad_loss, log_ratio):
        gain = torch.linspace(-8, 8, 161, dtype=torch.float64) + 1e-3
        gain.requires_grad_()
        function(gain, theta, alpha).sum().backward()
        step = 1e-6
        with torch.no_grad():
            up, down = (function(gain + sign * step, theta, alpha) for sign in (1, -1))
        slope = (up - down) / (2 * step)
        kink = (gain - gain_limit(theta, alpha, 0.05)).abs() < 2 * step
        torch.testing.assert_close(gain.grad[~kink], slope[~kink], rtol=1e-5, atol=1e-6)
        assert float(gain.grad.abs().max()) <= 1 + max(0.0, theta - alpha) / ((1 - theta) * 0.05) + 1e-9


def test_past_the_pole_a_bad_answer_is_still_pushed_and_a_good_one_left_alone():
    gain = torch.tensor([0.6, 2.0, 50.0], requires_grad=True)
    assert bool((gain[1:] > gain_limit(0.5, 0.0, 0.05)).all())
    bad_loss(gain, 0.5).sum().backward()
    slope = 1 + 0.5 / (0.5 * 0.05)
    assert gain.grad[1:].tolist() == pytest.approx([slope, slope], rel=1e-3)
    gain.grad = None
    good_loss(gain, 0.5).sum().backward()
    assert gain.grad[0] < 0
    assert gain.grad[1:].tolist() == [0, 0]
    for alpha in (0.5, 0.7):  # no pole: bounded by 1 everywhere
        gain.grad = None
        bad_loss(gain, 0.5, alpha).sum().backward()
        assert 0 <= float(gain.grad.min()) <= float(gain.grad.max()) <= 1


@pytest.mark.parametrize("gain", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_extreme_gains_give_finite_losses_and_slopes_in_float32(gain, alpha):
    for function in (good_loss, bad_loss):
        x = torch.tensor([gain], dtype=torch.bfloat16).float().requires_grad_()
        loss = function(x, 0.5, alpha)
        loss.backward()
        assert loss.dtype == torch.float32
        assert math.isfinite(float(loss.detach()))
        assert math.isfinite(float(x.grad))


def test_the_divergence_is_that_of_the_model_from_the_reference():
    for theta in (0.2, 0.5, 0.7):
        good, bad, reference = mixture(THREE, theta)
        for model in (good, reference, 0.3 * bad + 0.7 * reference):
            gain = model.log() - reference.log()
            assert bool((gain < -math.log(theta)).all())
            got = (theta * good + (1 - theta) * bad) @ ratio_loss(gain, theta)
            assert float(got) == pytest.approx(float(model @ gain), abs=1e-12)
    assert float(ratio_loss(torch.tensor(0.0), 0.5)) == 0
    far = torch.tensor([1.0, 80.0], dtype=torch.float64, requires_grad=True)
    ratio_loss(far, 0.5).sum().backward()
    assert far.grad.tolist() == pytest.approx([2 * math.log(2)] * 2)
