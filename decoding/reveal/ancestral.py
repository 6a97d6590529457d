"""The reverse process of MDLM: every position decides for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from decoding.pace import Rate
from decoding.reveal.base import REVEAL_NOISE, Decision, Evidence, RevealRule, StepView
from decoding.tokens import Choice, TokenRule


def reveal_probability(
    mass: torch.Tensor,
    weight: torch.Tensor,
    masked: torch.Tensor,
    t: torch.Tensor,
    s: torch.Tensor,
    beyond: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probability that each position is revealed between times t and s.

    a_i = (t - s) · w_i · q_i · Z and P(reveal) = a_i / (a_i + s), with the normaliser of the row
    Z = |M| / Σ_{i∈M} w_i q_i (arXiv 2509.15188). Where the sum is 0, w = 1 is used.

    Args:
        mass: [B, L] q_i, the probability that the token rule keeps.
        weight: [B, L] w_i in [0, 1].
        masked: [B, L] bool, M.
        t: [B] time before the step; or [B, L], one for each position.
        s: [B] or [B, L] time after the step, 0 ≤ s ≤ t.
        beyond: [B] elements of M that have no column here, weight 0; None for none.

    Returns:
        [B, L] float32; 0 outside M.
    """
    open_mass = torch.where(masked, weight.double() * mass.double(), 0.0)
    total = open_mass.sum(1, keepdim=True)
    plain = torch.where(masked, mass.double(), 0.0)
    open_mass = torch.where(total > 0, open_mass, plain)
    total = torch.where(total > 0, total, plain.sum(1, keepdim=True))
    count = masked.sum(1, keepdim=True) + (0 if beyond is None else beyond[:, None])
    normaliser = count / total.clamp(min=torch.finfo(torch.float64).tiny)
    t, s = (x.double() if x.dim() == 2 else x.double()[:, None] for x in (t, s))
    a = (t - s) * open_mass * normaliser
    return torch.where(a > 0, a / (a + s), 0.0).float()


def first_arrivals(
    mass: torch.Tensor, weight: torch.Tensor, masked: torch.Tensor, noise: torch.Tensor, rate: float
) -> torch.Tensor:
    """Choose the positions of a step in which `rate` of them are expected: a race of exponential clocks.

    Position i rings after an exponential time of rate v_i ∝ w_i q_i. The first to ring is written: the law of
    the next event of the ancestral process when its steps become infinitely fine (first-hitting sampler,
    arXiv 2409.02908). So is every other that rings within the time τ after it in which rate - 1 more are
    expected: Σ_{j≠first} (1 - exp(-v_j τ)) = rate - 1, solved by Newton's method, which rises to the root.

    Args:
        mass: [B, L] q_i, the probability that the token rule keeps.
        weight: [B, L] w_i in [0, 1].
        masked: [B, L] bool, M.
        noise: [B, L] uniform numbers of (0, 1).
        rate: expected number of positions, at least 1.

    Returns:
        [B, L] bool; at least one in each row that has a mask, all open ones where `rate` is not below their
        number.
    """
    speed = torch.where(masked, weight.double() * mass.double(), 0.0)
    plain = torch.where(masked, mass.double(), 0.0)
    speed = torch.where(speed.sum(1, keepdim=True) > 0, speed, plain)
    speed = speed / speed.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    time = torch.where(speed > 0, -noise.double().log() / speed, math.inf)
    first = time.amin(1, keepdim=True)
    further = _further(torch.where(time == first, 0.0, speed), rate - 1)
    everything = (speed > 0).sum(1, keepdim=True) <= rate
    return (speed > 0) & ((time <= first + further) | everything)


def _further(speed: torch.Tensor, number: float) -> torch.Tensor:
    """[B, 1] times τ in which `number` more of the clocks [B, L] are expected to ring; see `first_arrivals`.

    In NumPy, whose operations cost a fraction on the few numbers of a step.
    """
    minus = -speed.numpy()
    time, previous = np.zeros((len(minus), 1)), np.ones((len(minus), 1))
    for _ in range(8):
        if number == 0 or np.array_equal(time, previous):
            break
        left = np.exp(minus * time)
        missing = number - (1 - left).sum(1, keepdims=True)
        previous, time = time, time + missing / np.maximum(-(minus * left).sum(1, keepdims=True), 1e-12)
    return torch.from_numpy(time)


class MassRule(RevealRule):
    """A rule that decides before any token is drawn, by the probability that the token rule keeps."""

    sees_token: ClassVar[bool] = False

    def evidence(self, view: StepView) -> Evidence:
        """No scores where no token is cut: all keep a probability of 1; see `RevealRule`."""
        if view.tokens.keeps_all:
            return Evidence(torch.zeros_like(view.open), constant=1.0)
        return super().evidence(view)

    def score(
        self, logits: torch.Tensor, choice: Choice, state: Mapping[str, torch.Tensor], tokens: TokenRule
    ) -> torch.Tensor:
        """[N] probability of all tokens that are kept; see `RevealRule`."""
        del logits, state, tokens
        return choice.mass

    def precedence(self, view: StepView) -> torch.Tensor:
        """[b, W] exponential times of rate w · q, the race of `first_arrivals`; see `RevealRule`.

        Over steps small noise is early, as where a coin is flipped for each position.
        """
        speed = torch.where(view.masked, view.weight.double() * view.score.double(), 0.0)
        noise = view.noise(REVEAL_NOISE).double()
        return -(torch.log1p(-noise) if view.pace.bounded else noise.log()) / speed


@dataclass(frozen=True)
class Ancestral(MassRule):
    """Ancestral sampling with window weights: `reveal_probability` over a number of steps.

    At a rate it writes the next arrivals of the same process (`first_arrivals`).
    """

    def decide(self, view: StepView) -> Decision:
        """Flip independent coins, or at a rate take the next arrivals."""
        if isinstance(view.pace, Rate):
            noise = view.noise(REVEAL_NOISE)
            return Decision(first_arrivals(view.score, view.weight, view.masked, noise, view.pace.rate))
        chance = reveal_probability(view.score, view.weight, view.masked, view.t, view.s, view.beyond)
        # Over steps more masks make every reveal likelier.
        return Decision(view.masked & (view.noise(REVEAL_NOISE) < chance), catches_up=view.pace.bounded)
