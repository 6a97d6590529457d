"""A fixed number of tokens a step, the most certain first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from decoding.reveal.base import Decision, Evidence, RevealRule, StepView, needed_for, ranked
from decoding.tokens import Choice, TokenRule
from dlm.errors import check_whole, unknown_name

Order = Literal["confidence", "margin", "entropy", "cut-entropy"]
"""The measure by which positions are ordered: the probability of the token drawn, the lead of the likeliest
token over the second, the entropy of the model's distribution, or that of the distribution which the token is
drawn from, after temperature and cuts."""

Spread = Literal["even", "remaining"]
"""Ways to spread tokens over steps: evenly; or floor(|M| (1 - s/t)) of the masks left, at last all."""

_EPS = 1e-3
"""The time at which the spread "remaining" ends."""


def order_score(logits: torch.Tensor, choice: Choice, tokens: TokenRule, order: Order) -> torch.Tensor:
    """[N, V] -> [N], certainty of each position in [0, 1]."""
    if order == "confidence":
        return choice.probability
    return tokens.cut_certainty(logits) if order == "cut-entropy" else tokens.certainty(logits, order)


class OwnPaced(RevealRule):
    """A rule that says itself how many tokens a step writes, and draws nothing.

    At a pace that is given `Quota` takes its place, by its `order`.
    """

    paced: ClassVar[bool] = False
    random: ClassVar[bool] = False
    order: ClassVar[Order] = "confidence"

    def with_given_pace(self) -> Quota:
        """See `RevealRule`."""
        return Quota(order=self.order)


@dataclass(frozen=True)
class Quota(RevealRule):
    """A fixed number of tokens a step, the most confident first (low-confidence remasking of LLaDA).

    Attributes:
        per_step: tokens per step; None to spread the stage evenly over its steps.
        order: what makes a position certain: "confidence" (LLaDA), "margin" of the two likeliest tokens,
            "entropy", or "cut-entropy" (Dream).
        spread: how tokens are spread over the steps: "even" (LLaDA) or "remaining" (Dream).
    """

    per_step: int | None = None
    order: Order = "confidence"
    spread: Spread = "even"
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the number and the name."""
        for name, kinds in (("order", Order), ("spread", Spread)):
            if getattr(self, name) not in get_args(kinds):
                raise unknown_name(name, str(getattr(self, name)), get_args(kinds))
        if self.per_step is not None:
            check_whole("per_step", self.per_step)

    @property
    def sees_token(self) -> bool:
        """See `RevealRule`."""
        return self.order == "confidence"

    @property
    def paced(self) -> bool:
        """See `RevealRule`."""
        return self.per_step is None

    @property
    def by_time(self) -> bool:  # type: ignore[override]
        """See `RevealRule`."""
        return self.paced and self.spread == "remaining"

    def with_given_pace(self) -> Quota:
        """See `RevealRule`."""
        return Quota(order=self.order, spread=self.spread)

    def _number(self, view: StepView) -> torch.Tensor:
        """[b] int64, tokens of this step."""
        if self.per_step is not None:
            return torch.full_like(view.quota, self.per_step)
        if self.spread == "even" or not view.pace.bounded:
            return view.quota
        t, s = (_EPS + (1 - _EPS) * x.float() for x in (view.t, view.s))
        left = view.masked.sum(1)
        return torch.where(view.s > 0, (left * (1 - s / t)).long(), left)

    def score(
        self, logits: torch.Tensor, choice: Choice, state: Mapping[str, torch.Tensor], tokens: TokenRule
    ) -> torch.Tensor:
        """[N] certainty by the rule's order; see `RevealRule`."""
        del state
        return order_score(logits, choice, tokens, self.order)

    def evidence(self, view: StepView) -> Evidence:
        """Ask for the open positions; for all masks of a row whose open ones do not fill the quota."""
        return Evidence(needed_for(view, self._number(view)))

    def decide(self, view: StepView) -> Decision:
        """Take the best `quota` positions by certainty · weight."""
        rank = ranked(view.score, view.weight, view.masked)
        return Decision(view.masked & (rank < self._number(view)[:, None]))
