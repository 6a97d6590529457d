"""Axis 2 of a decoder, the reveal rule: which masked positions get their token in this step.

A rule sees a `StepView` and returns a `Decision`. Rules of the kind "mass" decide before any token is
drawn, from how much probability the token rule keeps at a position. The others look at how sure the model is
there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, Self

import torch

from dlm.errors import ConfigError, unknown_name

Kind = Literal["mass", "confidence", "margin", "entropy"]
"""What a rule decides by: the mass that the token rule keeps, or a certainty (`decoding.tokens`)."""


@dataclass(frozen=True)
class StepView:
    """What a rule may look at, for the rows of one step."""

    masked: torch.Tensor
    """[B, L] bool, positions of the current stage that hold no token."""
    weight: torch.Tensor
    """[B, L] window weight."""
    score: torch.Tensor
    """[B, L] mass or confidence, whichever the rule asked for; 0 where it was not computed."""
    t: torch.Tensor
    """[B] time before the step; [B, L] under a window whose positions have their own (`Sliding`)."""
    s: torch.Tensor
    """[B] or [B, L], time after the step."""
    quota: torch.Tensor
    """[B] int64, even share of the stage's positions that falls to this step."""
    written: torch.Tensor
    """[B, L] bool, positions that hold a revealed token (never pinned ones)."""
    noise: torch.Tensor
    """[B, L] uniform numbers for revealing."""
    noise_remask: torch.Tensor | None = None
    """[B, L] uniform numbers for remasking; for rules that remask."""
    beyond: torch.Tensor | None = None
    """[B] masks of the process that are not on the canvas yet and count in |M| all the same; None for 0."""
    rate: float | None = None
    """Tokens to write in this step on average, where the pace is a rate; `t` and `s` mean nothing then."""


@dataclass(frozen=True)
class Decision:
    """What a rule decided."""

    reveal: torch.Tensor
    """[B, L] bool, a subset of `masked`."""
    remask: torch.Tensor | None = None
    """[B, L] bool, written positions that lose their token again."""


class RevealRule(Protocol):
    """What the loop asks of a reveal rule."""

    @property
    def kind(self) -> Kind:
        """What the rule decides by."""
        ...

    remasks: ClassVar[bool]
    """Whether written tokens can become masks again."""

    @property
    def paced(self) -> bool:
        """Whether it follows a given pace; others say themselves how many tokens a step writes."""
        ...

    def at_pace(self) -> RevealRule:
        """The rule with the same order that follows a given pace; itself if it does."""
        ...

    def needs(self, masked: torch.Tensor, weight: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        """[B, L] bool, the positions whose score can change the decision; no others are computed."""
        ...

    def decide(self, view: StepView) -> Decision:
        """The positions to write in this step."""
        ...


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
    """The positions that are written in a step in which `rate` of them are expected: a race of clocks.

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
    others = torch.where(time == first, 0.0, speed)
    further = torch.zeros_like(first)
    for _ in range(8):
        left = torch.exp(-others * further)
        missing = rate - 1 - (1 - left).sum(1, keepdim=True)
        further = further + missing / (others * left).sum(1, keepdim=True).clamp(min=1e-12)
    everything = (speed > 0).sum(1, keepdim=True) <= rate
    return (speed > 0) & ((time <= first + further) | everything)


def _open(masked: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return masked & (weight > 0)


class _OpenOnly:
    """A rule that only open positions can change."""

    def needs(self, masked: torch.Tensor, weight: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        """The open positions."""
        del quota
        return _open(masked, weight)


class _Paced:
    """A rule that follows a given pace."""

    paced: ClassVar[bool] = True

    def at_pace(self) -> Self:
        """See `RevealRule`."""
        return self


@dataclass(frozen=True)
class Ancestral(_OpenOnly, _Paced):
    """The reverse process of MDLM: every position decides for itself, with `reveal_probability`."""

    kind: ClassVar[Kind] = "mass"
    remasks: ClassVar[bool] = False

    def decide(self, view: StepView) -> Decision:
        """Independent coin flips; where the pace is a rate, the next arrivals."""
        if view.rate is not None:
            return Decision(first_arrivals(view.score, view.weight, view.masked, view.noise, view.rate))
        chance = reveal_probability(view.score, view.weight, view.masked, view.t, view.s, view.beyond)
        return Decision(view.masked & (view.noise < chance))


def _ranked(score: torch.Tensor, weight: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """[B, L] rank of each position (0 = first to go): open ones by score · weight, then the rest by score."""
    score, weight = score.double(), weight.double()
    order = torch.where(weight > 0, 2 + score * weight, score)
    order = torch.where(masked, order, -1.0)
    return order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


@dataclass(frozen=True)
class Quota:
    """A fixed number of tokens a step, the most confident first (low-confidence remasking of LLaDA).

    Attributes:
        per_step: tokens per step; None to spread the stage evenly over its steps.
        order: what makes a position sure: "confidence" (LLaDA), "margin" of the two likeliest tokens, or
            "entropy".
    """

    per_step: int | None = None
    order: Literal["confidence", "margin", "entropy"] = "confidence"
    remasks: ClassVar[bool] = False

    @property
    def kind(self) -> Kind:
        """See `RevealRule`."""
        return self.order

    @property
    def paced(self) -> bool:
        """See `RevealRule`."""
        return self.per_step is None

    def at_pace(self) -> Quota:
        """See `RevealRule`."""
        return Quota(order=self.order)

    def __post_init__(self) -> None:
        """Check the number and the name."""
        if self.order not in ("confidence", "margin", "entropy"):
            raise unknown_name("order", self.order, ("confidence", "margin", "entropy"))
        if self.per_step is not None and (not isinstance(self.per_step, int) or self.per_step < 1):
            raise ConfigError(f"per_step must be a whole number of at least 1, got {self.per_step!r}")

    def _number(self, quota: torch.Tensor) -> torch.Tensor:
        return quota if self.per_step is None else torch.full_like(quota, self.per_step)

    def needs(self, masked: torch.Tensor, weight: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
        """The open positions; all masked ones of a row whose open ones do not fill the quota."""
        reachable = _open(masked, weight)
        number = self._number(quota)
        short = reachable.sum(1) < number
        return torch.where(short[:, None], masked, reachable) & (number > 0)[:, None]

    def decide(self, view: StepView) -> Decision:
        """The best `quota` positions by confidence · weight."""
        rank = _ranked(view.score, view.weight, view.masked)
        return Decision(view.masked & (rank < self._number(view.quota)[:, None]))


@dataclass(frozen=True)
class Threshold(_OpenOnly):
    """Everything whose confidence reaches τ, and at least the most confident one (Fast-dLLM, 2505.22618).

    Attributes:
        tau: confidence to reach, in (0, 1].
    """

    tau: float = 0.9
    kind: ClassVar[Kind] = "confidence"
    remasks: ClassVar[bool] = False
    paced: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the range of tau."""
        if not 0 < self.tau <= 1:
            raise ConfigError(f"tau must lie in (0, 1], got {self.tau}")

    def at_pace(self) -> Quota:
        """See `RevealRule`: the most confident first."""
        return Quota(order="confidence")

    def decide(self, view: StepView) -> Decision:
        """Confident positions among the open ones, and the best one in any case."""
        reachable = _open(view.masked, view.weight)
        best = _ranked(view.score, view.weight, view.masked) == 0
        return Decision(reachable & ((view.score >= self.tau) | best))


@dataclass(frozen=True)
class EntropyBound(_OpenOnly):
    """As many positions as their entropies allow (EB-sampler, arXiv 2505.24857).

    Open positions are taken in order of certainty · weight (without a convolution: from the least entropy
    up), the first always, while the sum of the entropies of those before stays within γ: a bound on what is
    lost by drawing them independently.

    Attributes:
        gamma: γ, in nats.
    """

    gamma: float = 0.1
    kind: ClassVar[Kind] = "entropy"
    remasks: ClassVar[bool] = False
    paced: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the range of gamma."""
        if not 0 <= self.gamma < math.inf:
            raise ConfigError(f"gamma must not be negative, got {self.gamma}")

    def at_pace(self) -> Quota:
        """See `RevealRule`: the least entropy first."""
        return Quota(order="entropy")

    def decide(self, view: StepView) -> Decision:
        """The longest admissible prefix of the positions, ordered by certainty · weight."""
        reachable = _open(view.masked, view.weight)
        rank = _ranked(view.score, view.weight, reachable)
        entropy = torch.where(reachable, -view.score.double().clamp(min=1e-300).log(), math.inf)
        ordered = torch.zeros_like(entropy).scatter(1, rank, entropy)  # [B, L] by rank
        before = ordered.cumsum(1) - ordered  # inf - inf is NaN behind the open ones, and not within γ
        return Decision(reachable & (before <= self.gamma).gather(1, rank))


@dataclass(frozen=True)
class Remask(_OpenOnly, _Paced):
    """ReMDM-loop (arXiv 2503.00307): reveal, then for a while trade tokens for masks, then finish.

    Time runs through three phases. Above `t_on` the row fills up to a share α_on of tokens; between `t_on`
    and `t_off` each written token is masked again with probability η and masked ones come back at the rate
    that keeps the balance; below `t_off`, and in a last step that comes to 0 from above it, the rest is
    filled. Pinned positions are never touched.

    Attributes:
        alpha_on: share of tokens present during the loop.
        t_on: time at which the loop begins.
        t_off: time at which it ends.
        eta: probability that a written token is masked again, per step.
    """

    alpha_on: float = 0.9
    t_on: float = 0.55
    t_off: float = 0.05
    eta: float = 0.04
    kind: ClassVar[Kind] = "mass"
    remasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the order of the times and the ranges."""
        if not 0 < self.t_off < self.t_on < 1:
            raise ConfigError(f"need 0 < t_off < t_on < 1, got {self.t_off} and {self.t_on}")
        if not 0 < self.alpha_on < 1 or not 0 <= self.eta < 1:
            raise ConfigError(
                f"alpha_on must lie in (0, 1) and eta in [0, 1), got {self.alpha_on} and {self.eta}"
            )

    def mask_probability(self, t: torch.Tensor) -> torch.Tensor:
        """Share of masks at time t, same shape as t."""
        fill = 1 - (1 - t) * self.alpha_on / (1 - self.t_on)
        finish = t * (1 - self.alpha_on) / self.t_off
        return torch.where(t > self.t_on, fill, torch.where(t > self.t_off, 1 - self.alpha_on, finish))

    def decide(self, view: StepView) -> Decision:
        """Ancestral outside the loop, a balanced exchange inside it."""
        assert view.noise_remask is not None
        before, after = self.mask_probability(view.t), self.mask_probability(view.s)
        chance = reveal_probability(view.score, view.weight, view.masked, before, after, view.beyond)
        looping = ((view.t <= self.t_on) & (view.t > self.t_off) & (view.s > 0))[:, None]
        back = self.alpha_on * self.eta / (1 - self.alpha_on) * view.score * view.weight
        chance = torch.where(looping, back.clamp(max=1.0), chance)
        return Decision(
            reveal=view.masked & (view.noise < chance),
            remask=view.written & looping & (view.noise_remask < self.eta),
        )
