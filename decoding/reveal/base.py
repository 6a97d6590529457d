"""The interface of reveal rules: the question, the view of a step, the decision.

A rule owns its score: `score` reduces the logits of a position to one number or several, which `decide` sees
for all positions together. State that a rule needs between steps belongs to the row: it begins as
`initial_state`, and what `decide` returns replaces it when the row changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from decoding.pace import Pace, Steps
from decoding.reveal.dependence import Dependence
from decoding.tokens import Choice, TokenRule

REVEAL_NOISE, TOKEN_NOISE, REMASK_NOISE = 0, 1, 2
"""Independent streams of noise within a step."""

PREDICTION_NOISE = 1 << 40
"""First of the streams from which whole rows are predicted (`Batch.predict`), one for each prediction; beyond
all streams that a rule draws from."""


@dataclass(frozen=True)
class Course:
    """Progress of the rows [b], and relative places of their positions, as shares in [0, 1]."""

    elapsed: torch.Tensor
    """[b] float64, share of the process that has passed: steps taken, where their number is fixed, else
    positions written, of those to be written. A canvas that grows at a rate has no length, and
    `decoding.course.OPEN_COURSE` stands for it."""
    place: torch.Tensor
    """[b, W] float64, relative position among those to be written, from the first of them on."""


@dataclass(frozen=True)
class StepView:
    """The rows [b] of one step, as a rule sees them."""

    masked: torch.Tensor
    """[b, W] bool, positions of the current stage that hold no token."""
    weight: torch.Tensor
    """[b, W] window weight."""
    t: torch.Tensor
    """[b] share of masks before the step; [b, W] under a window whose positions have times of their own."""
    s: torch.Tensor
    """[b] or [b, W], share of masks after the step."""
    quota: torch.Tensor
    """[b] int64, tokens that fall to this step at an even pace."""
    written: torch.Tensor
    """[b, W] bool, positions of the stage that hold a written token (never a given one)."""
    noise: Callable[[int], torch.Tensor]
    """Number of a stream -> [b, W] uniform numbers, new in every step."""
    score: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[b, W], what the rule's `score` found; 0 where it was not computed."""
    observed: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What the rule's `observe` found, by names of its state: [b, W, …]; 0 where it was not computed."""
    token: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[b, W] int64, the token that a position would receive; where the score was computed."""
    confidence: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[b, W] the model's probability of that token."""
    ids: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[b, W] int64, the rows as they are."""
    scope: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[b, W] bool, all positions of the current stage, given ones included."""
    step: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[b] int64, steps that the row has taken."""
    tokens: TokenRule = field(default_factory=TokenRule)
    """The rule by which tokens are drawn."""
    course: Callable[[], Course] = lambda: Course(torch.empty(0), torch.empty(0))
    """Gives how far the rows are."""
    beyond: torch.Tensor | None = None
    """[b] masks of the process that are not on the canvas yet and count in |M| all the same; None for 0."""
    pace: Pace = field(default_factory=lambda: Steps(1))
    """Pace of the rows; `t` and `s` are times where it is `Steps`; otherwise they mean nothing."""
    leave_one_out: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """[b, W] the model's probability of the token that is written, had it not seen it (see `Shadows`); inf
    where the rule did not ask."""
    conflicts: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Positions [b, 1] -> [b, W] bool, those in conflict with them; for rules that require "attention"."""
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The rule's state of these rows: [b, W, …] or [b]."""

    @property
    def open(self) -> torch.Tensor:
        """[b, W] bool, masked positions whose weight is above 0."""
        return self.masked & (self.weight > 0)


NEEDS = {
    "attention": "the option conflict needs a model that gives its attention weights",
    "shadows": "verification (the option verify, the decoder wino) needs a model that computes a mask beside "
    "a written token: `full` does; one with a causal context, as `default`, does not",
}
"""Capabilities that a rule may require of a model, with the error where it lacks them."""


@dataclass(frozen=True)
class Evidence:
    """The questions of a rule to the model in a step; `StepView` holds the answers."""

    scored: torch.Tensor
    """[b, W] bool, positions whose score can change the decision: for `score`, `token`, `confidence`."""
    verified: torch.Tensor | None = None
    """[b, W] bool, written positions: for `leave_one_out`, which requires "shadows"."""
    dependence: Dependence | None = None
    """The rule by which two positions conflict: for `conflicts`, which requires "attention"."""
    constant: float | None = None
    """The score of every position where it is the same whatever the logits, so that none need be `scored`."""


@dataclass(frozen=True)
class Decision:
    """The decision of a rule."""

    reveal: torch.Tensor
    """[b, W] bool, masked positions that get their token."""
    remask: torch.Tensor | None = None
    """[b, W] bool, written positions that lose their token again."""
    replace: torch.Tensor | None = None
    """[b, W] bool, written positions that get another token."""
    settled: torch.Tensor | None = None
    """[b] bool, rows in which no written token will change any more; None for all."""
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """New state; it is kept if the row changes in this step."""
    catches_up: bool = False
    """True when the rule itself writes later what of this a rule around it leaves out."""

    def filled(self, rows: torch.Tensor, masked: torch.Tensor) -> Decision:
        """This decision, but in `rows` [b, 1] all that is `masked` [b, W] is revealed, and nothing else."""
        return replace(
            self,
            reveal=torch.where(rows, masked, self.reveal),
            remask=None if self.remask is None else self.remask & ~rows,
            replace=None if self.replace is None else self.replace & ~rows,
        )


class RevealRule:
    """A reveal rule; a new one overrides `decide` and whatever else differs from these defaults."""

    random: ClassVar[bool] = True
    """False for a rule that draws nothing; then, without a temperature, texts do not depend on a seed."""
    revises: ClassVar[bool] = False
    """True for rules under which a written token can become a mask or another token."""
    requires: frozenset[str] = frozenset()
    """Capabilities that the model must have beyond `Denoiser` (see `Capable`): the names of `NEEDS`."""
    by_time: ClassVar[bool] = False
    """True for rules that read `t` and `s` as a row's times, which a window with times of its own has not."""

    @property
    def sees_token(self) -> bool:
        """True when the choice of positions depends on which tokens have been drawn there."""
        return True

    @property
    def paced(self) -> bool:
        """True for rules that follow a given pace; others decide how many tokens a step writes."""
        return True

    @property
    def timed(self) -> bool:
        """True for rules with phases: the pace must be a number of steps."""
        return self.revises and self.paced

    def with_given_pace(self) -> RevealRule:
        """Return the rule with the same order that follows a given pace; itself if it does."""
        return self

    def evidence(self, view: StepView) -> Evidence:
        """Say what `decide` needs of the model; by default the scores of the open positions.

        Nothing else is computed. `view` has no scores yet.
        """
        return Evidence(view.open)

    def score(
        self, logits: torch.Tensor, choice: Choice, state: Mapping[str, torch.Tensor], tokens: TokenRule
    ) -> torch.Tensor:
        """Reduce logits to what `decide` needs; by default the probability of the token.

        Args:
            logits: [N, V] on the model's device.
            choice: the tokens drawn there.
            state: the rule's state at these positions, [N, …].
            tokens: the token rule; its `allowed` shuts forbidden tokens.

        Returns:
            [N].
        """
        del logits, state, tokens
        return choice.probability

    def observe(
        self, logits: torch.Tensor, state: Mapping[str, torch.Tensor], tokens: TokenRule
    ) -> dict[str, torch.Tensor]:
        """Reduce logits to what the state is made of, which `decide` sees as `observed`; by default nothing.

        Asked of rules that have state for each position.

        Args:
            logits: [N, V] on the model's device.
            state: the rule's state at these positions, [N, …].
            tokens: the token rule.

        Returns:
            By names of the state, tensors of its shape [N, …].
        """
        del logits, state, tokens
        return {}

    def initial_state(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """State of new rows, by name: tensors [rows, length, …] or [rows]; by default none."""
        del rows, length
        return {}

    def precedence(self, view: StepView) -> torch.Tensor:
        """[b, W] numbers by which `gap` takes positions, the smallest first; by default -score · weight."""
        return -ordering(view.score, view.weight, view.masked)

    def decide(self, view: StepView) -> Decision:
        """Choose the positions to write in this step."""
        raise NotImplementedError


@dataclass(frozen=True)
class WrappedRule(RevealRule):
    """A rule around another one, which answers everything that this one does not.

    Attributes:
        inner: the other rule.
    """

    inner: RevealRule

    @property
    def random(self) -> bool:  # type: ignore[override]
        """See `RevealRule`."""
        return self.inner.random

    @property
    def revises(self) -> bool:  # type: ignore[override]
        """See `RevealRule`."""
        return self.inner.revises

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        """See `RevealRule`."""
        return self.inner.requires

    @property
    def by_time(self) -> bool:  # type: ignore[override]
        """See `RevealRule`."""
        return self.inner.by_time

    @property
    def sees_token(self) -> bool:
        """See `RevealRule`."""
        return self.inner.sees_token

    @property
    def paced(self) -> bool:
        """See `RevealRule`."""
        return self.inner.paced

    @property
    def timed(self) -> bool:
        """See `RevealRule`."""
        return self.inner.timed

    def with_given_pace(self) -> Self:
        """See `RevealRule`."""
        return replace(self, inner=self.inner.with_given_pace())

    def evidence(self, view: StepView) -> Evidence:
        """See `RevealRule`."""
        return self.inner.evidence(view)

    def score(
        self, logits: torch.Tensor, choice: Choice, state: Mapping[str, torch.Tensor], tokens: TokenRule
    ) -> torch.Tensor:
        """[N]; see `RevealRule`."""
        return self.inner.score(logits, choice, state, tokens)

    def observe(
        self, logits: torch.Tensor, state: Mapping[str, torch.Tensor], tokens: TokenRule
    ) -> dict[str, torch.Tensor]:
        """See `RevealRule`."""
        return self.inner.observe(logits, state, tokens)

    def initial_state(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """See `RevealRule`."""
        return self.inner.initial_state(rows, length)

    def precedence(self, view: StepView) -> torch.Tensor:
        """[b, W]; see `RevealRule`."""
        return self.inner.precedence(view)


def needed_for(view: StepView, number: torch.Tensor) -> torch.Tensor:
    """[b, W] bool, the positions that a rule must see to write `number` [b] tokens.

    They are the open ones, or all masks of a row whose open ones are too few.
    """
    short = view.open.sum(1) < number
    return torch.where(short[:, None], view.masked, view.open) & (number > 0)[:, None]


def ordering(score: torch.Tensor, weight: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """[b, W] float64, the higher the sooner: open positions by score · weight, then the rest by score."""
    score, weight = score.double(), weight.double()
    order = torch.where(weight > 0, 2 + score * weight, score)
    return torch.where(masked, order, -1.0)


def ranked(score: torch.Tensor, weight: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """[b, W] rank of each position (0 = first to go): open ones by score · weight, then the rest by score."""
    return ranks(ordering(score, weight, masked), descending=True)


def ranks(values: torch.Tensor, *, descending: bool = False) -> torch.Tensor:
    """[b, W] int64, place of each value in its row's order (0 = first); of equal ones left before right."""
    first_to_last = values.argsort(dim=1, descending=descending, stable=True)
    place = torch.arange(first_to_last.shape[1]).expand_as(first_to_last)
    return torch.empty_like(first_to_last).scatter_(1, first_to_last, place)


def state_with(
    where: torch.Tensor, one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state `other`, but at the positions `where` [b, W] that of `one`; what is of whole rows stays."""
    return {
        name: torch.where(where.view(*where.shape, *[1] * (value.dim() - 2)), one[name], value)
        if value.dim() > 1
        else value
        for name, value in other.items()
    }
