"""The settings of losses that set good answers against bad ones; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dlm.errors import ConfigError, refuse_ignored, unknown_name


@dataclass(frozen=True)
class NegativeConfig:
    """Settings of negatives; a rule with weight 0 is off, weights need not add up to 1.

    Args:
        left: weight of the rule that repeats the tokens before the masked cells.
        right: weight of the rule that repeats the tokens behind them (in text without a prompt).
        prior: weight of the rule that repeats a unit of high-prior tokens.
        mixed: weight of the rule that repeats the tokens before, about half of them high-prior ones instead.
        run: weight of the rule that repeats one single high-prior token; also the rule of rows that have
            nothing to repeat.
        unit_max: longest unit, in tokens.
        span_min: shortest stretch of cells that the negative covers.
        span_max: longest stretch.
        eos_p: probability that an early EOS is put into the negative (a repeated unit may bring one too).
        frequent: how many tokens count as high-prior: the most frequent ones of the training answers.
        in_span: for text without a prompt, the share of rows masked inside a span; the rest outside it.
    """

    left: float = 0.5
    right: float = 0.25
    prior: float = 0.15
    mixed: float = 0.2
    run: float = 0.15
    unit_max: int = 15
    span_min: int = 30
    span_max: int = 50
    eos_p: float = 0.1
    frequent: int = 100
    in_span: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges."""
        weights = (self.left, self.right, self.prior, self.mixed, self.run)
        if min(weights) < 0 or self.left + self.prior + self.mixed + self.run == 0:
            raise ConfigError(
                f"weights of rules must not be negative, nor left, prior, mixed and run all 0; got {weights}"
            )
        if self.unit_max < 1 or self.frequent < 1:
            raise ConfigError(
                f"unit_max and frequent must be at least 1, got {self.unit_max} and {self.frequent}"
            )
        if not 1 <= self.span_min <= self.span_max:
            raise ConfigError(f"need 1 <= span_min <= span_max, got {self.span_min} and {self.span_max}")
        for name in ("eos_p", "in_span"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)}")


_OWN = {
    "r2ft": ("beta_w", "beta_l", "gamma", "beta_a", "reference", "weighting"),
    "ddro": ("theta", "alpha", "kl", "floor", "draws"),
    "dpo": ("beta", "draws"),
}
"""Settings of each objective."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss of good and bad answers.

    r2ft: -logsigmoid(beta_w l_w/n_w - beta_l l_l/n_l - gamma) - beta_a l_w/n_w, both on one masked row.
    ddro: log(1 + 1/rho) + alpha log(1 + rho) of good answers, (1 - alpha) log(1 + rho) of bad ones, with
    rho = (1 - theta) / ((1 - alpha) p_ref/p + alpha - theta).
    dpo: -logsigmoid(beta (s_w - s_l)), with s = log p/p_ref.

    Args:
        name: "r2ft", "ddro" or "dpo". The last two measure by NELBO against the frozen model that the run
            starts from; without an adapter that is a second copy of the weights.
        beta_w: r2ft: factor of the true answer's mean log-probability.
        beta_l: r2ft: factor of the negative's.
        gamma: r2ft: margin that the difference has to exceed.
        beta_a: r2ft: weight of the anchor, which keeps the true answer likely.
        reference: r2ft: measure both against the frozen model that the run starts from (as DPO does). Costs
            one more forward pass and, without an adapter, a second copy of the weights.
        weighting: r2ft: "none" counts all cells of a negative alike; "confidence" weights them by the
            probability that the model gives them.
        theta: ddro: share of good answers among those of the model that the run starts from.
        alpha: ddro: share of good answers in the denominator of the density ratio; 0 for DDRO as published,
            from theta on the ratio is bounded.
        kl: ddro: weight of the divergence from the reference.
        floor: ddro: ratio of bad to good, with alpha below theta, under which the loss is continued by its
            tangent; bounds the gradient.
        beta: dpo: pull towards the reference; the larger, the closer.
        draws: ddro, dpo: draws of masks for each row of a step; each costs as much again.
    """

    name: Literal["r2ft", "ddro", "dpo"] = "r2ft"
    beta_w: float = 1.0
    beta_l: float = 1.0
    gamma: float = 0.0
    beta_a: float = 0.1
    reference: bool = False
    weighting: Literal["none", "confidence"] = "none"
    theta: float = 0.5
    alpha: float = 0.0
    kl: float = 0.0
    floor: float = 0.05
    beta: float = 0.1
    draws: int = 1

    def __post_init__(self) -> None:
        """Check the name, the ranges, and that no setting belongs to another objective."""
        if self.name not in _OWN:
            raise unknown_name("objective", self.name, _OWN)
        for name in ("beta_w", "beta_l", "beta_a", "kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.weighting not in ("none", "confidence"):
            raise unknown_name("weighting", self.weighting, ("none", "confidence"))
        if self.beta <= 0 or self.draws < 1:
            raise ConfigError(f"beta must be above 0 and draws at least 1, got {self.beta} and {self.draws}")
        self._check_ratio()
        for owner, names in _OWN.items():
            foreign = [name for name in names if name not in _OWN[self.name]]
            refuse_ignored(self, foreign, "objective.", f"objective.name {owner}, not {self.name}")

    def _check_ratio(self) -> None:
        if not 0 < self.theta < 1 or not 0 <= self.alpha < 1:
            raise ConfigError(
                f"theta must lie in (0, 1) and alpha in [0, 1), got {self.theta} and {self.alpha}"
            )
        if not 0 < self.floor < 1:
            raise ConfigError(f"floor must lie in (0, 1), got {self.floor}")
        if self.alpha >= self.theta:
            refuse_ignored(self, ("floor",), "objective.", "objective.alpha below objective.theta")
        if 0 < self.alpha < min(self.theta, self.floor):
            raise ConfigError(
                f"alpha must be 0, or at least floor ({self.floor}) or theta ({self.theta}), for the loss to "
                f"reach the ratio that it is to find; got {self.alpha}"
            )
