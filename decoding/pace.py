"""The pace of a row: how its time passes, how many tokens fall to a step, and when it is late."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Protocol

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

    stage: torch.Tensor
    """[b] int64, number of the stage (the block, for windows that have blocks)."""
    t: torch.Tensor
    """[b] float64, share of masks before the step, by the noise schedule at the time within the stage."""
    s: torch.Tensor
    """[b] float64, share of masks after it."""
    index: torch.Tensor
    """[b] int64, number of the step within its stage."""
    count: torch.Tensor
    """[b] int64, steps of the stage."""


def stage_clock(step: torch.Tensor | int, steps: int, stages: torch.Tensor) -> Clock:
    """Clock of step number `step` ([b] or one for all) for rows with `stages` [b] stages.

    Stage j of b runs from step ⌊jS/b⌋ to ⌊(j+1)S/b⌋ and its own time from 1 to 0.
    """
    stage = ((step + 1) * stages - 1) // steps
    first, last = stage * steps // stages, (stage + 1) * steps // stages
    index, count = step - first, last - first
    return Clock(stage, 1 - index.double() / count, 1 - (index + 1).double() / count, index, count)


class Pace(Protocol):
    """The interface of paces."""

    @property
    def steps(self) -> int | None:
        """Denoising steps, where their number is fixed."""
        ...

    @property
    def rate(self) -> float | None:
        """Expected tokens per step, where that is fixed."""
        ...

    def clock(
        self,
        step: torch.Tensor,
        stages: torch.Tensor,
        masked: torch.Tensor,
        start: torch.Tensor,
        window: Window,
    ) -> Clock:
        """Clock of the rows [b] at their steps [b], `stages` [b] and masks [b, W] from `start` [b] on."""
        ...

    def quota(self, step: torch.Tensor, clock: Clock, total: torch.Tensor) -> torch.Tensor:
        """[b] int64, tokens that fall to this step, of `total` [b] in the stage."""
        ...

    def late(self, step: torch.Tensor) -> torch.Tensor:
        """[b] bool, rows that have no step left, so that one last pass fills what is masked."""
        ...


@dataclass(frozen=True)
class Steps:
    """A fixed number of denoising steps, as in the papers; a last pass fills what is left.

    Attributes:
        steps: S.
        schedule: noise schedule whose curve is walked backwards, S equal pieces of time from 1 to 0.
    """

    steps: int
    schedule: NoiseSchedule = field(default_factory=LogLinear)
    rate: None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the number."""
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")

    def clock(
        self,
        step: torch.Tensor,
        stages: torch.Tensor,
        masked: torch.Tensor,
        start: torch.Tensor,
        window: Window,
    ) -> Clock:
        """See `Pace`: time runs from 1 to 0 within each stage of the window."""
        del masked, start, window
        clock = stage_clock(step, self.steps, stages)
        t, s = self.schedule.mask_share(torch.stack([clock.t, clock.s]))
        return replace(clock, t=t, s=s)

    def quota(self, step: torch.Tensor, clock: Clock, total: torch.Tensor) -> torch.Tensor:
        """See `Pace`: what falls between the mask shares before and after the step.

        The log-linear schedule spreads the stage evenly, larger steps first (as LLaDA's loop).
        """
        del step
        if isinstance(self.schedule, LogLinear):
            return total // clock.count + (clock.index < total % clock.count)
        before, after = ((total * share).round().long() for share in (clock.t, clock.s))
        return before - after

    def late(self, step: torch.Tensor) -> torch.Tensor:
        """See `Pace`."""
        return step >= self.steps

    def within(self, positions: int) -> Steps:
        """This pace, with no more steps than so many masked positions can use, and a note if it had more.

        A position is written once, so that most steps beyond their number are empty. What
        finer steps still change is that two tokens fall into one step: of n positions, (n - 1)/32 pairs on
        average with `STEPS_PER_POSITION` each (log-linear); none at a rate of 1, which is the limit.
        """
        most = STEPS_PER_POSITION * positions
        if self.steps <= most:
            return self
        _note_unused(self.steps, most, positions)
        return replace(self, steps=most)


@cache
def _note_unused(steps: int, most: int, positions: int) -> None:
    """Say once that steps are left out."""
    logger.warning(
        "steps %d are more than %d positions can use: %d are taken, %d for each (rate 1 is their limit)",
        steps, positions, most, STEPS_PER_POSITION,
    )  # fmt: skip


class _Untimed:
    """A pace without times: a stage lasts until nothing of it is masked."""

    steps: None = None

    def clock(
        self,
        step: torch.Tensor,
        stages: torch.Tensor,
        masked: torch.Tensor,
        start: torch.Tensor,
        window: Window,
    ) -> Clock:
        """See `Pace`; only the stage means something."""
        del stages
        one = torch.ones(len(step), dtype=torch.float64)
        stage = window.current(masked, start)
        return Clock(stage, one, torch.zeros_like(one), torch.zeros_like(stage), torch.ones_like(stage))

    def late(self, step: torch.Tensor) -> torch.Tensor:
        """See `Pace`: never."""
        return torch.zeros_like(step, dtype=torch.bool)


@dataclass(frozen=True)
class Rate(_Untimed):
    """So many tokens per model call on average; as many calls as that takes.

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

    def quota(self, step: torch.Tensor, clock: Clock, total: torch.Tensor) -> torch.Tensor:
        """See `Pace`: whole tokens whose mean is the rate."""
        del clock, total
        done = step.double()
        return (((done + 1) * self.rate).floor() - (done * self.rate).floor()).long()


@dataclass(frozen=True)
class OwnPace(_Untimed):
    """The pace of a reveal rule that says itself how many tokens a step writes (threshold, entropy bound)."""

    rate: None = field(default=None, init=False, repr=False)

    def quota(self, step: torch.Tensor, clock: Clock, total: torch.Tensor) -> torch.Tensor:
        """See `Pace`; such a rule does not look at it."""
        del clock, total
        return torch.ones_like(step)
