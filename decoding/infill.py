"""Infilling: texts with gaps, and spans that are written again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from decoding.canvas import Canvas, Row
from decoding.denoiser import hidden_of_rows
from decoding.gaps import MANY, Gap, Piece, combinations
from decoding.pace import STEPS_PER_POSITION
from decoding.request import Plan
from decoding.row_maker import Prompt, RowMaker, TooLongError
from dlm.device import to_device
from dlm.errors import ConfigError

MOST_LENGTHS = 256
"""Greatest number of combinations of lengths of the gaps of one text."""

LEAST_PROBABILITY = 2.0**-149
"""Least float32 above 0. A token that was less likely counts as this, so that a score is a number."""

NEIGHBOURS = 4
"""Given tokens on each side of a gap whose likelihood counts when its length is open."""


@dataclass(frozen=True)
class Infilled:
    """A text whose gaps have been filled."""

    text: str
    """All of it."""
    gaps: list[str]
    """Texts written into the gaps; neighbouring gaps count as one."""
    token_ids: list[int]
    model_calls: int
    """Model calls, those for other lengths of the gaps included."""
    reveal_step: list[int]
    """For each of `token_ids`, the step at which it appeared; -1 for given ones."""
    score: float
    """Log-likelihood, in nats, of the tokens in the gaps (each when it was written) and, if lengths had to be
    compared, of the given tokens beside them."""


def rows_with_gaps(
    rows: RowMaker, pieces: Sequence[Piece], prompt: Prompt | None, plan: Plan, name: str
) -> list[tuple[Row, Plan]]:
    """The rows of a text with gaps, each with its plan: one for each combination of lengths of the gaps.

    A plan has no more steps than its row can use. A space before a gap belongs to the gap, since tokens carry
    the space before them.

    Raises:
        ConfigError: for a text that is too long, and for too many combinations.
    """
    count = combinations(pieces)
    if count > MOST_LENGTHS:
        shown = f"{count}" if count < MANY else f"{MANY} or more"
        raise ConfigError(f"{name}: its gaps have {shown} combinations of lengths; at most {MOST_LENGTHS}")
    lengths = [piece.lengths for piece in pieces if isinstance(piece, Gap)]
    try:
        prompt_ids = rows.prompt(prompt) if prompt is not None else []
        piece_ids = [
            None
            if isinstance(piece, Gap)
            else rows.text(piece.removesuffix(" ") if i + 1 < len(pieces) else piece)
            for i, piece in enumerate(pieces)
        ]
    except TooLongError as error:
        raise TooLongError(f"{name}: {error}") from error
    combined = itertools.product(*lengths)
    candidates = [_row(rows, piece_ids, sizes, prompt_ids, plan, name) for sizes in combined]
    return [(row, plan.within(_usable(row, plan))) for row in candidates]


def _usable(row: Row, plan: Plan) -> int:
    """Masks of a row, or as many as have steps enough for a step in each of its blocks."""
    return max(row.ids.count(plan.mask_id), -(-int(row.stages(plan)) // STEPS_PER_POSITION))


def _row(
    rows: RowMaker,
    piece_ids: Sequence[list[int] | None],
    sizes: Sequence[int],
    prompt_ids: list[int],
    plan: Plan,
    name: str,
) -> Row:
    """The row of one combination of lengths; `piece_ids` holds the tokens of each piece, None for gaps."""
    first = next(iter(piece_ids), [])
    if not prompt_ids and rows.spec.shift and (first is None or not first):
        prompt_ids = [rows.spec.eos_token_id]  # the state before the first token has to come from somewhere
    ids: list[int] = []
    remaining = iter(sizes)
    for tokens in piece_ids:
        ids += [plan.mask_id] * min(next(remaining), plan.positions + 1) if tokens is None else tokens
        if len(prompt_ids) + len(ids) > plan.positions:
            raise ConfigError(f"{name} is longer than the model's {plan.positions} positions")
    return Row(prompt_ids + ids, len(prompt_ids), name)


def gap_scores(model: Any, tries: Sequence[Canvas], plan: Plan, batch_size: int) -> list[float]:
    """Log-likelihood of each way to fill a text's gaps (see `Infilled.score`), so many at a time.

    The terms are summed, not averaged: a longer gap has more tokens to explain, and given tokens that are
    certain anyway must not dilute the others. All lengths within the bounds count as equally likely: the
    mean length is right alone and a little short behind a prompt (docs/infilling.md has the numbers), so
    that one prior would not serve both.
    """
    if len(tries) == 1:
        return [float(_written(tries[0]).sum())]
    scores: list[float] = []
    for i in range(0, len(tries), batch_size):
        scores += _scores(model, tries[i : i + batch_size], plan)
    return scores


def _written(canvas: Canvas) -> torch.Tensor:
    """Log-probabilities of the tokens in the gaps, each when it was written (see `LEAST_PROBABILITY`)."""
    probability = canvas.confidence[0][canvas.initial[0]]
    return probability.clamp(min=LEAST_PROBABILITY).double().log()


@torch.inference_mode()
def _scores(model: Any, tries: Sequence[Canvas], plan: Plan) -> list[float]:
    """Scores of some tries, in one model call."""
    rows = [canvas.ids[0, : int(canvas.end[0])] for canvas in tries]
    near = [_beside(canvas.initial[0, : len(row)]) for canvas, row in zip(tries, rows, strict=True)]
    shown = [torch.where(where, plan.mask_id, row) for where, row in zip(near, rows, strict=True)]
    states = hidden_of_rows(model, torch.cat(shown), [len(row) for row in rows])
    cells = torch.cat(near).nonzero()[:, 0]
    likely = model.logits(states[to_device(cells, states.device)]).float().log_softmax(1)
    tokens = to_device(torch.cat(rows)[cells, None], likely.device)
    neighbours = likely.gather(1, tokens)[:, 0].double().cpu().split([int(x.sum()) for x in near])
    written = map(_written, tries)
    return [float(torch.cat(pair).sum()) for pair in zip(written, neighbours, strict=True)]


def _beside(gap: torch.Tensor) -> torch.Tensor:
    """[L] bool, the `NEIGHBOURS` given positions on each side of gaps [L]; never the first of the row."""
    position = torch.arange(len(gap))
    near = (position[:, None] - position[gap]).abs().amin(1) <= NEIGHBOURS
    return near & ~gap & (position > 0)


def likeliest(
    tries: Sequence[Canvas], scores: Sequence[float], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, Infilled]:
    """The likeliest of the lengths that were tried, by its number, and the text; calls are those of all.

    Args:
        tries: the filled rows of one text, a canvas each.
        scores: see `gap_scores`, for which each row was in a model call more if there are several.
        tokenizer: the model's.
    """
    best = max(range(len(tries)), key=scores.__getitem__)
    calls = sum(int(canvas.model_calls[0]) for canvas in tries) + (len(tries) if len(tries) > 1 else 0)
    return best, infilled(tries[best], tokenizer, calls, scores[best])


def infilled(canvas: Canvas, tokenizer: PreTrainedTokenizerBase, calls: int, score: float) -> Infilled:
    """The filled text of a row."""
    start, end = int(canvas.answer_start[0]), int(canvas.end[0])
    ids, reveal_step = canvas.ids[0, start:end].tolist(), canvas.reveal_step[0, start:end].tolist()
    runs = itertools.groupby(zip(ids, reveal_step, strict=True), key=lambda pair: pair[1] >= 0)
    gaps = [[token for token, _ in run] for written, run in runs if written]
    return Infilled(
        text=tokenizer.decode(ids),
        gaps=[tokenizer.decode(gap) for gap in gaps],
        token_ids=ids,
        model_calls=calls,
        reveal_step=reveal_step,
        score=score,
    )
