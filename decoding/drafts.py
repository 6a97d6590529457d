"""Drafts: rows as they may be after the next steps, computed in a call that is made anyway.

What a row becomes depends on the row alone. So its states can be computed before it is there: a call computes
the row and a few guesses of what it will be, and where it becomes one of them its next step needs no call.
Wrong guesses cost their share of the call. Texts are the same with and without: each step is taken by the
model's word on the row as it is. This is self-speculative decoding of diffusion models (arXiv 2510.04147),
for any decoder whose tokens the model's last word foretells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from decoding.canvas import Canvas

LEAST_CHANCE = 0.03
"""Drafts that are less likely than this are not computed."""


@dataclass(frozen=True)
class Drafts:
    """Drafts of some rows of a canvas, those of a row side by side."""

    rows: torch.Tensor
    """[m] int64, in rising order, the rows' numbers in the canvas."""
    ids: torch.Tensor
    """[m, L] int64."""
    valid: torch.Tensor
    """[m, L] bool, False at padding (right)."""
    masked: torch.Tensor
    """[m, L] bool, positions that are still to be written."""


Guess = Callable[[torch.Tensor], Drafts | None]
"""Numbers of rows [b] -> drafts of them; None where there is nothing likely enough."""


@dataclass(frozen=True)
class DraftedRow:
    """A draft whose states are known."""

    ids: torch.Tensor
    """[n] int64, the ids that the model was shown."""
    where: torch.Tensor
    """[n] bool, positions of which there are states."""
    states: torch.Tensor
    """[N, D] of these."""

    def is_of(self, ids: torch.Tensor) -> bool:
        """True for the ids [n] of a row that is this one."""
        return torch.equal(ids, self.ids)

    def covers(self, where: torch.Tensor) -> bool:
        """True where there are states of all positions `where` [w], of some of the row or padded."""
        size = len(self.ids)
        return not bool((where[:size] & ~self.where[: len(where)]).any())


TakeStep = Callable[[Canvas, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes a step of copies [c] of rows, in place, by the scores that there are of them. It is also given the
number of each one's row, and which of the likeliest tokens it writes [c], 0 being the likeliest; it returns
[c] bool, True where the scores were sufficient."""


def likeliest_drafts(canvas: Canvas, count: int, ranks: int, take_step: TakeStep) -> Drafts | None:
    """The likeliest drafts of the rows [b], at most `count` in all; None where none is likely enough.

    Each row has a tree. The trunk is the row as it goes on while the likeliest tokens are written. At each
    step that writes one token, branches of one step write one of the next in rank. The chance of a draft is
    the product of those of its tokens.

    Args:
        canvas: the rows, which stay as they are.
        count: of drafts.
        ranks: how many of the likeliest tokens are tried.
        take_step: see `TakeStep`.
    """
    size = len(canvas)
    source, rank = torch.arange(size).repeat_interleave(ranks), torch.arange(ranks).repeat(size)
    trunk, copied = torch.ones(size, dtype=torch.float64), source
    steps: list[Canvas] = []
    chances: list[torch.Tensor] = []  # [b, ranks] for each step
    for _ in range(count):
        canvas = canvas.take(copied)
        chance, changed = _branch(canvas, source, rank, take_step)
        chance = chance.view(size, ranks) * trunk[:, None]
        steps.append(canvas)
        chances.append(torch.where(changed.view(size, ranks), chance, 0))
        trunk, copied = chance[:, 0], source * ranks
        chances_of_all = torch.cat(chances, 1)
        best = chances_of_all.flatten().topk(min(count, chances_of_all.numel()))
        if not bool((trunk > best.values[-1].clamp(min=LEAST_CHANCE)).any()):
            break  # what follows is no likelier
    likely = best.indices[best.values >= LEAST_CHANCE].sort().values
    if not len(likely):
        return None
    row, place = likely // chances_of_all.shape[1], likely % chances_of_all.shape[1]
    step, branch = (place // ranks).tolist(), (row * ranks + place % ranks).tolist()
    drafts = Canvas.join([steps[i].take(slice(j, j + 1)) for i, j in zip(step, branch, strict=True)])
    return Drafts(row, drafts.ids, drafts.valid, drafts.masked)


def _branch(
    canvas: Canvas, source: torch.Tensor, rank: torch.Tensor, take_step: TakeStep
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a step of the copies [c]; gives their chances [c], 0 for no drafts, and which have changed [c]."""
    step, revision = canvas.step.clone(), canvas.revision.clone()
    sufficient = take_step(canvas, source, rank)
    fresh = canvas.reveal_step == step[:, None]
    chance = torch.where(fresh, canvas.confidence.double().nan_to_num(1), 1).prod(1)
    sound = sufficient & ~canvas.done & ((rank == 0) | (fresh.sum(1) == 1))
    return torch.where(sound, chance, 0), canvas.revision > revision
