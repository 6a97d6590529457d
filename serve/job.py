"""A request as the worker sees it: rows, what is to be seen of them, and what becomes of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from decoding.canvas import Row
from decoding.engine import Update
from decoding.request import Plan
from dlm.errors import DLMError

_job_numbers = itertools.count(1)


@dataclass(frozen=True)
class Sample:
    """One row to be decoded.

    Attributes:
        row: its tokens.
        plan: how it is decoded.
        seed: of its noise.
    """

    row: Row
    plan: Plan
    seed: int

    @property
    def positions(self) -> int:
        """Positions of the row at its longest, and of its drafts, which are as long."""
        return len(self.row.ids) * (1 + self.plan.drafts)


@dataclass(frozen=True)
class Notice:
    """News of one row: something to show, or its end."""

    index: int
    """Number of the row in the job."""
    value: Any
    """The result of the job's `watch` or `finish` for the update."""
    finished: bool = False


Deliver = Callable[[list[Notice] | Exception], None]
"""Takes news to whoever waits for it; called on the worker's thread and must not block."""


@dataclass(eq=False)
class Job:
    """Rows that are decoded for one request.

    Attributes:
        samples: the rows.
        deliver: takes the news, or the error that ended the job.
        watch: what is made of each step of a row; None when only the end is wanted.
        finish: what is made of the last update of a row; None for its output.
        deadline: `time.monotonic()` at which it is given up; None for never.
        prompt_tokens: tokens of its prompts, for the metrics.
        counted: count the tokens that its rows write; False where most of them are thrown away.
    """

    samples: Sequence[Sample]
    deliver: Deliver
    watch: Callable[[Update], Any] | None = None
    finish: Callable[[Update], Any] | None = None
    deadline: float | None = None
    prompt_tokens: int = 0
    counted: bool = True
    number: int = field(default_factory=lambda: next(_job_numbers))
    arrived: float = field(default_factory=time.monotonic)
    begun: float | None = None
    tickets: dict[int, int] = field(default_factory=dict)
    """Engine's ticket of each row at work, by index."""
    finished: int = 0
    """Rows that are finished."""


class DrainingError(DLMError):
    """Raised to a job that has not begun when the server shuts down."""


class ExpiredError(DLMError):
    """Raised to a job at its deadline."""


class StoppedError(DLMError):
    """Raised to all jobs when the server stops at once."""
