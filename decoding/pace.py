"""The course of a row: how its time passes, how many tokens fall to a step, and how it ends."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import ClassVar, Protocol, Self

import torch

from decoding.window import Window
from dlm.errors import ConfigError
from dlm.schedule import LogLinear, NoiseSchedule

logger = logging.getLogger(__name__)

STEPS_PER_POSITION = 16
"""Most denoising steps for each position that is to be written; see `Steps.within`."""


@dataclass(frozen=True)
class Clock:
    """Stage and time of the rows [b] in one step."""

    scope: torch.Tensor
    """[b, L] bool, the positions of the stage."""
    stage: torch.Tensor
    """[b] int64, number of the stage (the block, for windows that have blocks)."""
    t: torch.Tensor
    """[b] float64, share of masks before the step, by the noise schedule at the time within the stage."""
    s: torch.Tensor
    """[b] float64, share of masks after it."""
    quota: torch.Tensor
    """[b] int64, tokens that fall to this step."""


class Pace(Protocol):
    """The interface of paces."""

    bounded: ClassVar[bool]
    """True where the number of steps is fixed: every row ends, whatever its rule decides."""

    def check_stages(self, stages: int) -> None:
        """Refuse a row of so many stages, where they are more than there are steps.

        Raises:
            ConfigError: naming both numbers.
        """
        ...

    def total(self, step: int) -> int:
        """All steps of a row that has taken so many, as far as they are known."""
        ...

    def within(self, positions: int) -> Pace:
        """This pace, without what rows of so many masked positions cannot use."""
        ...

    def late(self, step: torch.Tensor) -> torch.Tensor:
        """Bool in the shape of `step`, True where so many steps have been taken that none is left."""
        ...

    def elapsed(self, step: torch.Tensor, written: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Share in [0, 1] of a row's process that has passed, float64.

        Args:
            step: steps that have been taken.
            written: tokens that have been written.
            count: tokens that the row will have.
        """
        ...

    def clock(
        self,
        step: torch.Tensor,
        stages: torch.Tensor,
        masked: torch.Tensor,
        initial: torch.Tensor,
        start: torch.Tensor,
        window: Window,
    ) -> Clock:
        """Clock of rows.

        Args:
            step: [b] int64, steps that each row has taken.
            stages: [b] int64, stages that it goes through.
            masked: [b, W] bool, its masks.
            initial: [b, L] bool, the positions to be written.
            start: [b] int64, the first of them.
            window: says which stage a row is in, and what belongs to it.
        """
        ...


def stage_of(
    step: torch.Tensor, steps: int, stages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stage, number of the step within it, and steps of it, [b] each, at step number `step` [b] of `steps`.

    Stage j of b runs from step ⌊jS/b⌋ to ⌊(j+1)S/b⌋ and its own time from 1 to 0.
    """
    stage = ((step + 1) * stages - 1) // steps
    first, last = stage * steps // stages, (stage + 1) * steps // stages
    return stage, step - first, last - first


@dataclass(frozen=True)
class Steps:
    """A fixed number of denoising steps, as in the papers; a last pass fills what is left.

    Attributes:
        steps: S.
        schedule: noise schedule whose curve is walked backwards, S equal pieces of time from 1 to 0.
    """

    steps: int
    schedule: NoiseSchedule = field(default_factory=LogLinear)
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the number."""
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")

    def check_stages(self, stages: int) -> None:
        """See `Pace`."""
        if self.steps < stages:
            raise ConfigError(
                f"{self.steps} steps are too few for {stages} blocks; each block needs at least one: "
                f"give {stages} or more, or a shorter answer"
            )

    def total(self, step: int) -> int:
        """All steps, also of a row that needed fewer; see `Pace`."""
        del step
        return self.steps

    def clock(
        self,
        step: torch.Tensor,
        stages: torch.Tensor,
        masked: torch.Tensor,
        initial: torch.Tensor,
        start: torch.Tensor,
        window: Window,
    ) -> Clock:
        """See `Pace`: time runs from 1 to 0 within each stage of the window.

        The quota is what falls between the mask shares before and after the step; the log-linear schedule
        spreads the stage evenly, larger steps first (as LLaDA's loop).
        """
        del masked
        stage, index, count = stage_of(step.clamp(max=self.steps - 1), self.steps, stages)
        times = torch.stack([1 - index.double() / count, 1 - (index + 1).double() / count])
        t, s = self.schedule.mask_share(times)
        scope = window.scope(start, stage, initial.shape[1])
        total = (initial & scope).sum(1)
        if isinstance(self.schedule, LogLinear):
            quota = total // count + (index < total % count)
        else:
            quota = (total * t).round().long() - (total * s).round().long()
        return Clock(scope, stage, t, s, quota)

    def late(self, step: torch.Tensor) -> torch.Tensor:
        """See `Pace`."""
        return step >= self.steps

    def elapsed(self, step: torch.Tensor, written: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Share of the steps; see `Pace`."""
        del written, count
        return (step.double() / self.steps).clamp(max=1)

    def within(self, positions: int) -> Steps:
        """This pace, with no more steps than so many masked positions can use, and a note if it had more.

        A position is written once, so that most steps beyond their number are empty. What
        finer steps still change is that two tokens fall into one step: of n positions, (n - 1)/32 pairs on
        average with `STEPS_PER_POSITION` each (log-linear); none at a rate of 1, which is the limit.
        """
        limit = STEPS_PER_POSITION * positions
        if self.steps <= limit:
            return self
        _note_unused(self.steps, limit, positions)
        return replace(self, steps=limit)


@cache
def _note_unused(steps: int, limit: int, positions: int) -> None:
    """Say once that steps are left out."""
    logger.warning(
        "steps %d are more than %d positions can use: %d are taken, %d for each (rate 1 is their limit)",
        steps, positions, limit, STEPS_PER_POSITION,
    )  # fmt: skip


class _Untimed:
    """A pace without times: a stage lasts until nothing of it is masked."""

    bounded: ClassVar[bool] = False

    def check_stages(self, stages: int) -> None:
        """Any number will do; see `Pace`."""

    def total(self, step: int) -> int:
        """Those that were taken; see `Pace`."""
        return step

    def within(self, positions: int) -> Self:
        """This pace: it has no steps to leave out."""
        del positions
        return self

    def late(self, step: torch.Tensor) -> torch.Tensor:
        """Never; see `Pace`."""
        return torch.zeros_like(step, dtype=torch.bool)

    def elapsed(self, step: torch.Tensor, written: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Share of the tokens; see `Pace`."""
        del step
        return (written.double() / count).clamp(max=1)

    def quota(self, step: torch.Tensor) -> torch.Tensor:
        """[b] int64, tokens that fall to the steps [b]."""
        raise NotImplementedError

    def clock(
        self,
        step: torch.Tensor,
        stages: torch.Tensor,
        masked: torch.Tensor,
        initial: torch.Tensor,
        start: torch.Tensor,
        window: Window,
    ) -> Clock:
        """See `Pace`; `t` and `s` mean nothing. A row without a mask stays in its last stage."""
        del stages
        position = torch.arange(initial.shape[1])
        last = torch.where(initial, position, -1).amax(1, keepdim=True)
        first = torch.where(masked.any(1, keepdim=True), masked, position[: masked.shape[1]] == last)
        stage, one = window.current(first, start), torch.ones(len(step), dtype=torch.float64)
        scope = window.scope(start, stage, initial.shape[1])
        return Clock(scope, stage, one, torch.zeros_like(one), self.quota(step))


@dataclass(frozen=True)
class Rate(_Untimed):
    """A number of tokens per model call on average, with as many calls as that takes.

    At rate 1 an ancestral rule writes one token a call, by the law of infinitely fine steps (first-hitting
    sampler, arXiv 2409.02908).

    Attributes:
        rate: tokens per call, at least 1.
    """

    rate: float

    def __post_init__(self) -> None:
        """Check the range."""
        if not 1 <= self.rate < math.inf:
            raise ConfigError(f"rate must be at least 1 token per model call, got {self.rate}")

    def quota(self, step: torch.Tensor) -> torch.Tensor:
        """Whole tokens whose mean is the rate; see `_Untimed`."""
        done = step.double()
        return (((done + 1) * self.rate).floor() - (done * self.rate).floor()).long()


@dataclass(frozen=True)
class OwnPace(_Untimed):
    """The pace of a reveal rule that says itself how many tokens a step writes (threshold, entropy bound)."""

    def quota(self, step: torch.Tensor) -> torch.Tensor:
        """One; such a rule does not look at it."""
        return torch.ones_like(step)


@dataclass(frozen=True)
class Ended:
    """Rows [b, W] after end tokens have had their effect."""

    ids: torch.Tensor
    """[b, W] int64."""
    masked: torch.Tensor
    """[b, W] bool, positions still to be written."""
    complete: torch.Tensor
    """[b] bool, rows in which nothing is left to write."""


@dataclass(frozen=True)
class EndTokens:
    """The effect of end tokens.

    Attributes:
        eos_id: the end token that is written.
        end_ids: all tokens that end an answer, sorted.
        fill: everything right of an end token becomes `eos_id`.
        early_exit: a row is complete when everything before its first end token is written (exact, where
            written tokens stay: no later step could change the answer).
        closes: a canvas that grows takes no more masks once there is an end token.
    """

    eos_id: int
    end_ids: tuple[int, ...]
    fill: bool = True
    early_exit: bool = True
    closes: bool = True

    def is_end(self, ids: torch.Tensor) -> torch.Tensor:
        """Mark the end tokens, bool in the shape of `ids`."""
        if len(self.end_ids) == 1:
            return ids == self.end_ids[0]
        return torch.isin(ids, torch.tensor(self.end_ids))

    def apply(self, ids: torch.Tensor, masked: torch.Tensor, free: torch.Tensor) -> Ended:
        """Let the end tokens that have been written have their effect.

        Args:
            ids: [b, W] int64.
            masked: [b, W] bool, positions still to be written.
            free: [b, W] bool, positions that are not given; only there can an answer end.
        """
        ended = self.is_end(ids) & free & ~masked
        if not bool(ended.any()):
            return Ended(ids, masked, ~masked.any(1))
        if self.fill:
            tail = (ended.cumsum(1) - ended.int() > 0) & free
            ids, masked = torch.where(tail, self.eos_id, ids), masked & ~tail
        complete = ~masked.any(1)
        if self.early_exit:
            first = torch.where(ended.any(1), ended.int().argmax(1), -1)
            waiting = (masked & (torch.arange(ids.shape[1]) < first[:, None])).any(1)
            complete = complete | ((first >= 0) & ~waiting)
            leftover = complete[:, None] & masked
            ids, masked = torch.where(leftover, self.eos_id, ids), masked & ~leftover
        return Ended(ids, masked, complete)

    def closed(self, ended: torch.Tensor, done: torch.Tensor) -> torch.Tensor:
        """[b] bool, rows that take no more masks: `ended` [b] hold an end token, `done` [b] are finished."""
        return ended if self.closes else ended & done & self.early_exit
