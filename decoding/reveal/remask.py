"""Written tokens that become masks again for a while."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from decoding.reveal.ancestral import MassRule, reveal_probability
from decoding.reveal.base import REMASK_NOISE, REVEAL_NOISE, Decision, StepView
from dlm.errors import ConfigError


@dataclass(frozen=True)
class Remask(MassRule):
    """ReMDM-loop (arXiv 2503.00307): reveal, then for a while trade tokens for masks, then finish.

    Time runs through three phases. Above `t_on` the row fills up to a share α_on of tokens; between `t_on`
    and `t_off` each written token is masked again with probability η and masked ones come back at the rate
    that keeps the balance; below `t_off`, and in a last step that comes to 0 from above it, the rest is
    filled. Pinned positions are never touched.

    The balance is that of the whole distribution: a mask comes back with probability η·α_on/(1-α_on)·q_i,
    so that where the token rule keeps only a mass q < 1 the share of masks settles at
    (1-α_on) / ((1-α_on) + α_on·q), above 1-α_on. The cut slows the return as it slows every reveal.

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
    revises: ClassVar[bool] = True

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
        """Reveal as the ancestral rule outside the loop; exchange tokens for masks inside it."""
        share_t, share_s = self.mask_probability(view.t), self.mask_probability(view.s)
        chance = reveal_probability(view.score, view.weight, view.masked, share_t, share_s, view.beyond)
        looping = ((view.t <= self.t_on) & (view.t > self.t_off) & (view.s > 0))[:, None]
        back = self.alpha_on * self.eta / (1 - self.alpha_on) * view.score * view.weight
        chance = torch.where(looping, back.clamp(max=1.0), chance)
        return Decision(
            reveal=view.masked & (view.noise(REVEAL_NOISE) < chance),
            remask=view.written & looping & (view.noise(REMASK_NOISE) < self.eta),
            settled=torch.zeros(len(view.masked), dtype=torch.bool),
            catches_up=True,  # the more masks are left, the likelier each is revealed
        )
