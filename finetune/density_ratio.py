"""DDRO, direct density-ratio optimisation (Higuchi and Suzuki, ICML 2025, arXiv 2505.07558).

The reference model is taken for a mixture of good and bad answers, p_ref = θ p_w + (1-θ) p_l. A model p that
equals p_w then tells the ratio of the two apart from the reference alone. For a mixing rate α,

    ρ(y) = p / (α p + (1-α) (p_ref - θ p) / (1-θ)) = (1-θ) / ((1-α) p_ref/p + α - θ)

is p_w / (α p_w + (1-α) p_l), the relative density ratio (see arXiv 2604.04410), where p = p_w, and nowhere
else, since it grows with p. A density ratio is fitted by a Bregman divergence; the logistic one of numerator
p_w and denominator α p_w + (1-α) p_l, whose minimum over all functions is that ratio, is

    L = E_w[log(1 + 1/ρ) + α log(1 + ρ)] + (1-α) E_l[log(1 + ρ)]

So p_w is the minimum of L over all models, whatever preferences are like. With α = 0, and r = 1/ρ =
(p_ref/p - θ) / (1-θ), it is DDRO's E_w log(1 + r) + E_l log(1 + 1/r). With α = θ, ρ is p/p_ref itself.

ρ is positive for every p only where α ≥ θ. Below that it has a pole at p/p_ref = (1-α)/(θ-α), which no model
that fits the mixture reaches (its p is at most p_ref/θ), but an estimate of p may. `log_ratio` goes on as a
straight line from a little before the pole: the gradient that takes probability from a bad answer stays, and
is bounded, where a clamp would end it.

Everything here is a function of s = log p(y) - log p_ref(y), in nats.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def gain_limit(theta: float, alpha: float, floor: float) -> float:
    """The s at which 1/ρ is `floor`, from which on `log_ratio` is a line; infinite where α ≥ θ."""
    if alpha >= theta:
        return math.inf
    return math.log((1 - alpha) / (floor * (1 - theta) + theta - alpha))


def log_ratio(gain: torch.Tensor, theta: float, alpha: float = 0.0, floor: float = 0.05) -> torch.Tensor:
    """Log ρ, the log relative density ratio of good answers that a model stands for; see the module.

    Args:
        gain: any shape, s = log p - log p_ref.
        theta: share of good answers in the reference, in (0, 1).
        alpha: share of good answers in the denominator, in [0, 1).
        floor: 1/ρ, for α < θ, from which on the function is continued by its tangent.

    Returns:
        In the shape of `gain`, at least float32; increasing, continuous and with a continuous slope.
    """
    gain = widened(gain)
    offset = math.log1p(-theta) - math.log1p(-alpha)
    if alpha == theta:
        return gain
    if alpha > theta:
        share = math.log(alpha - theta) - math.log1p(-alpha)
        return offset - torch.logaddexp(-gain, gain.new_tensor(share))
    limit = gain_limit(theta, alpha, floor)
    inside = gain.clamp(max=limit)
    share = math.log(theta - alpha) - math.log1p(-alpha)
    exact = offset + inside - torch.log1p(-torch.exp(inside + share))
    slope = 1 + (theta - alpha) / ((1 - theta) * floor)
    return exact + slope * (gain - inside)


def good_loss(gain: torch.Tensor, theta: float, alpha: float = 0.0, floor: float = 0.05) -> torch.Tensor:
    """log(1 + 1/ρ) + α log(1 + ρ), of a good answer; arguments as for `log_ratio`.

    Where α < θ, 1/ρ is at least `floor` in the first term: an answer that is 1/θ times as likely as under the
    reference is as likely as the mixture allows, and is left alone.
    """
    ratio = log_ratio(gain, theta, alpha, floor)
    ceiling = math.inf if alpha >= theta else -math.log(floor)
    return F.softplus(-ratio.clamp(max=ceiling)) + alpha * F.softplus(ratio)


def bad_loss(gain: torch.Tensor, theta: float, alpha: float = 0.0, floor: float = 0.05) -> torch.Tensor:
    """(1-α) log(1 + ρ), of a bad answer; arguments as for `log_ratio`."""
    return (1 - alpha) * F.softplus(log_ratio(gain, theta, alpha, floor))


def ratio_loss(gain: torch.Tensor, theta: float) -> torch.Tensor:
    """e^s s - e^s + 1, whose mean over answers of the reference is KL(p ‖ p_ref).

    The mean over the reference is θ times that over good answers and 1-θ times that over bad ones, so no
    answer has to be sampled from p. Beyond s = log 1/θ, where no p lies that fits the mixture, the function
    goes on by its tangent.

    Args:
        gain: any shape, s = log p - log p_ref.
        theta: share of good answers in the reference.

    Returns:
        In the shape of `gain`, never negative.
    """
    gain = widened(gain)
    limit = -math.log(theta)
    inside = gain.clamp(max=limit)
    growth = inside.exp()
    return growth * inside - growth + 1 + math.exp(limit) * limit * (gain - inside)


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
