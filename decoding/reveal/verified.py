"""Written tokens that the model looks at once more without seeing them; the unlikely become masks again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from decoding.reveal.base import (
    Decision,
    Evidence,
    RevealRule,
    StepView,
    WrappedRule,
    ranked,
    ranks,
    state_with,
)
from decoding.reveal.threshold import Threshold
from dlm.errors import ConfigError


@dataclass(frozen=True)
class WideIn(Threshold):
    """`Threshold` with a limit on the tokens of one call: max(5, ⌊0.7 |M|⌋), but no more than 20 (WINO).

    M are the masks of the stage.
    """

    tau: float = 0.6

    def decide(self, view: StepView) -> Decision:
        """Take the most confident of what the threshold lets through."""
        rank = ranked(view.score, view.weight, view.masked)
        limit = (view.masked.sum(1) * 7 // 10).clamp(5, 20)
        return Decision(super().decide(view).reveal & (rank < limit[:, None]))


@dataclass(frozen=True)
class Verified(WrappedRule):
    """Another rule whose tokens are verified in the next call (WINO, arXiv 2507.18578).

    A shadow of each verified position (`dlm.shadows.Shadows`) gives the probability of the written token as
    if it were not there, in the call that is made anyway. Below `threshold` the token becomes a mask again,
    the least likely first, always fewer than the last call wrote: of two calls in a row at least one token
    more is written than taken back, so that it ends. A call that wrote one token is not verified. Given
    positions and end tokens that have filled what is behind them stay. What the other rule remembers of a
    position begins anew with its mask.

    Attributes:
        inner: the other rule.
        threshold: τ₂ in (0, 1].
        every: verify all tokens of the stage in each call, and only in one that writes several, as published;
            by default those of the last call.
    """

    threshold: float
    every: bool = False
    revises: ClassVar[bool] = True

    @classmethod
    def around(
        cls, rule: RevealRule, changed: Collection[str], *, verify: float = 0.0, verify_all: bool = False
    ) -> RevealRule:
        """The rule, with its tokens verified where that is asked for; see `presets.WRAPPERS`."""
        if not verify and "verify_all" in changed:
            raise ConfigError("verify_all says which tokens are verified; give verify, such as 0.5")
        return cls(rule, verify, verify_all) if verify else rule

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        """See `RevealRule`; and shadows."""
        return self.inner.requires | {"shadows"}

    def __post_init__(self) -> None:
        """Check the range, and that the other rule does not revise itself."""
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"verify must lie in (0, 1], got {self.threshold}; leave it out for none")
        if self.inner.revises:
            raise ConfigError("verify goes with rules whose tokens stay; this one revises them by itself")

    def initial_state(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """State of the other rule, the positions of the last call, and how many it wrote."""
        return super().initial_state(rows, length) | {
            "fresh": torch.zeros(rows, length, dtype=torch.bool),
            "accepted": torch.zeros(rows, dtype=torch.int64),
        }

    def evidence(self, view: StepView) -> Evidence:
        """See `RevealRule`; with the tokens that are verified, which takes a call whatever the scores are."""
        evidence = self.inner.evidence(view)
        scored = evidence.scored if evidence.constant is None else view.open
        return replace(evidence, scored=scored, verified=self._verified(view))

    def _verified(self, view: StepView) -> torch.Tensor:
        """[b, W] bool, written positions; none where the last call wrote one token."""
        candidates = view.written if self.every else view.written & view.state["fresh"]
        return candidates & (view.state["accepted"] > 1)[:, None]

    def decide(self, view: StepView) -> Decision:
        """Write what the other rule writes, and take back what is unlikely."""
        decision, checked = self.inner.decide(view), self._verified(view)
        accepted = decision.reveal.sum(1)
        likelihood = torch.where(checked, view.leave_one_out.double(), torch.inf)
        rank = ranks(likelihood)
        remask = (likelihood < self.threshold) & (rank < view.state["accepted"][:, None] - 1)
        if self.every:
            remask &= (accepted > 1)[:, None]
        anew = self.inner.initial_state(*view.masked.shape) if decision.state else {}
        restored = state_with(remask, anew, decision.state)
        state = {**restored, "fresh": decision.reveal, "accepted": accepted}
        return replace(decision, remask=remask, state=state)
