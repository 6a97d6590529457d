"""Tokens of one call kept apart: any rule's choice, thinned to positions that depend little on each other."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from decoding.reveal.base import Decision, Evidence, RevealRule, StepView, WrappedRule, ranks, state_with
from decoding.reveal.dependence import Dependence
from dlm.errors import ConfigError, check_whole


@dataclass(frozen=True)
class Separated(WrappedRule):
    """Another rule whose tokens of one call are at least `gap` positions apart, and in no conflict.

    Tokens of one call are drawn independently given the text; neighbours depend on each other most, and so do
    positions that attend to each other. Positions are taken in the rule's own order; one that lies closer
    than `gap` to one already taken in this call, or is in conflict with it, is left for later, and the next
    in order takes its place. At a pace that is given, what falls short is owed to the next call: the mean
    pace holds, as far as the window has room. A rule with a pace of its own writes less instead. The last
    step of a stage takes all that is left.

    Attributes:
        inner: the other rule.
        gap: least distance of two tokens of one call, in positions; 1 changes nothing.
        dependence: says which positions are in conflict; None for none.
    """

    gap: int = 1
    dependence: Dependence | None = None

    def __post_init__(self) -> None:
        """Check the gap, and that the other rule does not count the tokens of a call by itself."""
        check_whole("gap", self.gap)
        if "shadows" in self.inner.requires:
            raise ConfigError(
                "tokens are kept apart before they are verified: Verified(Separated(rule, gap), …)"
            )

    @classmethod
    def around(
        cls,
        rule: RevealRule,
        changed: Collection[str],
        *,
        gap: int = 1,
        conflict: float = 0.0,
        conflict_layers: int = Dependence.layers,
    ) -> RevealRule:
        """The rule, with tokens of one call kept apart where that is asked for; see `presets.WRAPPERS`."""
        if not conflict and "conflict_layers" in changed:
            raise ConfigError(
                "conflict_layers says which layers show a conflict; give conflict, such as 0.07"
            )
        dependence = Dependence(conflict, conflict_layers) if conflict else None
        return rule if gap == 1 and dependence is None else cls(rule, gap, dependence)

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        """See `RevealRule`; and attention, where there is a `dependence`."""
        return self.inner.requires | ({"attention"} if self.dependence is not None else set())

    def evidence(self, view: StepView) -> Evidence:
        """See `RevealRule`. Of whatever may be taken, where conflicts must be seen."""
        evidence = self.inner.evidence(view)
        if self.dependence is None:
            return evidence
        return replace(evidence, scored=evidence.scored | view.open, dependence=self.dependence)

    def initial_state(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """State of the other rule, and the tokens that are owed."""
        return super().initial_state(rows, length) | {"owed": torch.zeros(rows, dtype=torch.int64)}

    def decide(self, view: StepView) -> Decision:
        """Take what the other rule takes, but apart."""
        decision = self.inner.decide(view)
        reveal = decision.reveal
        number, eligible = reveal.sum(1), reveal
        if self.paced:
            eligible = reveal | view.open
            if not decision.catches_up:
                number = number + view.state["owed"]
        rank = ranks(self.inner.precedence(view))
        order = torch.where(reveal, rank, rank + rank.shape[1])  # what the rule takes, then its next ones
        if decision.replace is not None:
            return self._with_replaced(view, decision, order)
        picked = choose_apart(order, eligible, number, lambda first: self._near(view, first))
        if self.paced and view.pace.bounded:
            left = view.s if view.s.dim() == 1 else torch.where(view.scope, view.s, 0.0).amax(1)
            last = left <= 0
            picked = torch.where(last[:, None], choose_apart(order, eligible, number), picked)
        if not self.paced:
            return replace(decision, reveal=picked)
        return replace(decision, reveal=picked, state={**decision.state, "owed": number - picked.sum(1)})

    def _with_replaced(self, view: StepView, decision: Decision, order: torch.Tensor) -> Decision:
        """The decision of a rule that replaces written tokens; these come behind the masks, in their order.

        The state of what is held back stays as it was.
        """
        replaced = decision.replace
        assert replaced is not None
        order = torch.where(replaced, 2 * order.shape[1] + 1 - view.score.double(), order.double())
        eligible = decision.reveal | replaced
        picked = choose_apart(order, eligible, eligible.sum(1), lambda first: self._near(view, first))
        held = replaced & ~picked
        state = state_with(held, view.state, decision.state)
        return replace(decision, reveal=decision.reveal & picked, replace=replaced & picked, state=state)

    def _near(self, view: StepView, first: torch.Tensor) -> torch.Tensor:
        """[b, W] bool, positions that must wait when the one at `first` [b, 1] is taken."""
        near = (torch.arange(view.masked.shape[1]) - first).abs() < self.gap
        return near if view.conflicts is None else near | view.conflicts(first)


def choose_apart(
    order: torch.Tensor,
    eligible: torch.Tensor,
    number: torch.Tensor,
    near: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Choose positions in order, none near one that is chosen.

    Args:
        order: [b, W], the smallest first; of equal ones the left one.
        eligible: [b, W] bool.
        number: [b] int64, most positions of each row.
        near: positions [b, 1] -> [b, W] bool, those near them; by default none.

    Returns:
        [b, W] bool.
    """
    free, picked = eligible.clone(), torch.zeros_like(eligible)
    position = torch.arange(order.shape[1])
    for count in range(int(number.max()) if len(number) else 0):
        first = torch.where(free, order.double(), torch.inf).argmin(1, keepdim=True)
        pick = (position == first) & free & (count < number)[:, None]
        if not bool(pick.any()):
            break
        picked |= pick
        free &= ~pick
        if near is not None:
            free &= ~near(first)
    return picked
