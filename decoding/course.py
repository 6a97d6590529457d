"""The course of a row: how far its process is, where positions lie, and the trace of a finished answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from decoding.canvas import Canvas, Rows
from decoding.request import Plan
from decoding.reveal.base import Course

OPEN_COURSE = 128
"""Tokens that stand for the length of a row whose length is open: a canvas that grows at a rate."""


def _lengths(canvas: Canvas, plan: Plan, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """[b] positions to be written, and [b] positions from the first of them to the last."""
    initial = canvas.initial[rows]
    if plan.ahead is not None and not plan.pace.bounded:
        length = torch.full((len(initial),), OPEN_COURSE)
        return length, length
    last = torch.where(initial, torch.arange(initial.shape[1]) + 1, 0).amax(1)
    return initial.sum(1).clamp(min=1), (last - canvas.start[rows]).clamp(min=1)


def course(canvas: Canvas, plan: Plan, rows: Rows, width: int) -> Course:
    """The course of the rows [b] of a canvas, over its first `width` positions."""
    count, span = _lengths(canvas, plan, rows)
    written = (~canvas.masked[rows] & ~canvas.pinned[rows]).sum(1)
    elapsed = plan.pace.elapsed(canvas.step[rows], written, count)
    place = (torch.arange(width) - canvas.start[rows][:, None]).double() / span[:, None]
    return Course(elapsed, place.clamp(0, 1))


@dataclass(frozen=True)
class Trace:
    """Time, certainty and place of the tokens of one row when they were written, each a share in [0, 1].

    Tokens that were written behind the end count too; those that only fill up do not.
    """

    elapsed: list[float]
    """Share of the process that had passed."""
    confidence: list[float]
    """The model's probability of the token."""
    place: list[float]
    """Relative position."""

    @classmethod
    def of(cls, canvas: Canvas, plan: Plan) -> Trace:
        """The trace of a finished row, a canvas of its own."""
        row = slice(0, 1)
        count, _ = _lengths(canvas, plan, row)
        step, confidence = canvas.reveal_step[0], canvas.confidence[0]
        timed = canvas.initial[0] & (step >= 0) & ~confidence.isnan()
        steps_of_tokens = step[canvas.initial[0] & (step >= 0)]
        earlier = (steps_of_tokens[None] < step[:, None]).sum(1)
        elapsed = plan.pace.elapsed(step, earlier, count)
        place = course(canvas, plan, row, len(step)).place[0]
        columns = (elapsed, confidence.double(), place)
        return cls(*([round(x, 6) for x in column[timed].tolist()] for column in columns))
