"""A fixed number of tokens a step, the most certain first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from decoding.reveal.base import Decision, RevealRule, StepView, ranked
from decoding.tokens import Choice, TokenRule
from dlm.errors import ConfigError, unknown_name

Order = Literal["confidence", "margin", "entropy"]
"""The measure by which positions are ordered."""


def certainty(logits: torch.Tensor, choice: Choice, tokens: TokenRule, order: Order) -> torch.Tensor:
    """[N, V] -> [N], certainty of each position in [0, 1]."""
    return choice.probability if order == "confidence" else tokens.certainty(logits, order)


@dataclass(frozen=True)
class Quota(RevealRule):
    """A fixed number of tokens a step, the most confident first (low-confidence remasking of LLaDA).

    Attributes:
        per_step: tokens per step; None to spread the stage evenly over its steps.
        order: what makes a position certain: "confidence" (LLaDA), "margin" of the two likeliest tokens, or
            "entropy".
    """

    per_step: int | None = None
    order: Order = "confidence"

    def __post_init__(self) -> None:
        """Check the number and the name."""
        if self.order not in ("confidence", "margin", "entropy"):
            raise unknown_name("order", self.order, ("confidence", "margin", "entropy"))
        if self.per_step is not None and (not isinstance(self.per_step, int) or self.per_step < 1):
            raise ConfigError(f"per_step must be a whole number of at least 1, got {self.per_step!r}")

    @property
    def sees_token(self) -> bool:
        """See `RevealRule`."""
        return self.order == "confidence"

    @property
    def paced(self) -> bool:
        """See `RevealRule`."""
        return self.per_step is None

    def at_pace(self) -> Quota:
        """See `RevealRule`."""
        return Quota(order=self.order)

    def _number(self, quota: torch.Tensor) -> torch.Tensor:
        return quota if self.per_step is None else torch.full_like(quota, self.per_step)

    def score(
        self, logits: torch.Tensor, choice: Choice, state: Mapping[str, torch.Tensor], tokens: TokenRule
    ) -> torch.Tensor:
        """[N] certainty by the rule's order; see `RevealRule`."""
        del state
        return certainty(logits, choice, tokens, self.order)

    def needs(self, view: StepView) -> torch.Tensor:
        """[b, W] bool, the open positions; all masks of a row whose open ones do not fill the quota."""
        number = self._number(view.quota)
        short = view.open.sum(1) < number
        return torch.where(short[:, None], view.masked, view.open) & (number > 0)[:, None]

    def decide(self, view: StepView) -> Decision:
        """Take the best `quota` positions by certainty · weight."""
        rank = ranked(view.score, view.weight, view.masked)
        return Decision(view.masked & (rank < self._number(view.quota)[:, None]))
