"""A row as cells: what is given, what is written, and which masks are open now."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from decoding.canvas import Canvas
from decoding.request import Plan
from decoding.step import open_window

State = Literal["given", "written", "open", "shut"]


@dataclass(frozen=True)
class Cell:
    """One position behind the prompt."""

    token_id: int
    """The mask token where nothing is written."""
    state: State
    """"open" where the window lets a token be written in the next step, "shut" where it does not."""
    probability: float | None
    """The model's probability of a written token when it was written; None for others."""
    step: int | None
    """The step in which it was written; None for others."""


def cells(canvas: Canvas, plan: Plan) -> list[Cell]:
    """The cells of a row as it is now, those that there are on a growing canvas."""
    first, end = int(canvas.answer_start[0]), int(canvas.valid[0].sum())
    is_open = open_positions(canvas, plan)[0, first:end].tolist()
    masked, initial = canvas.masked[0, first:end].tolist(), canvas.initial[0, first:end].tolist()
    ids, steps = canvas.ids[0, first:end].tolist(), canvas.reveal_step[0, first:end].tolist()
    probability = canvas.confidence[0, first:end].tolist()
    out = []
    for i, token in enumerate(ids):
        if masked[i]:
            out.append(Cell(token, "open" if is_open[i] else "shut", None, None))
        elif initial[i]:
            p = None if math.isnan(probability[i]) else probability[i]
            out.append(Cell(token, "written", p, steps[i]))
        else:
            out.append(Cell(token, "given", None, None))
    return out


def open_positions(canvas: Canvas, plan: Plan) -> torch.Tensor:
    """Masks [B, L] at which a token can be written in the coming step; all of a row in its last pass."""
    opening = open_window(canvas, plan, torch.arange(len(canvas)), canvas.ids.shape[1])
    is_open = opening.active & (opening.weight > 0)
    return torch.where(plan.pace.late(canvas.step)[:, None], canvas.masked, is_open)
