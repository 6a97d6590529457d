"""One denoising step: the one place where masks become tokens.

A `Batch` holds rows of one plan. Every row has its own step, time, normaliser, noise stream and stopping
point; rows share nothing but the model call. Savings taken here never change the result: the LM head sees
only positions whose score can matter (with drafts, soon), what it found is kept until the row changes, a row
that did not change is not computed again, and a finished row leaves the batch. (What `Reuse` and a growing
canvas with steps save does change it.)

The canvas, and all arithmetic on it, lie on the host, whichever device the model is on: they are small, and
what happens next depends on them. Ids go to the device, and a few numbers for each position looked at come
back, once in a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from decoding.canvas import Canvas, Rows
from decoding.course import course
from decoding.denoiser import Denoiser, StateQuery, check_capable, compute_states
from decoding.drafts import Drafts, Guess, likeliest_drafts
from decoding.pace import Clock
from decoding.request import Plan
from decoding.reveal.base import PREDICTION_NOISE, Decision, Evidence, StepView
from decoding.scoring import DraftScorer, Scorer, Work
from dlm.errors import ConfigError, DLMError
from dlm.noise import cell_noise


def denoise(model: Denoiser, canvas: Canvas, plan: Plan) -> Iterator[int]:
    """Write the canvas, in place; yields the number of each step after it has been taken.

    With a number of steps, a last pass fills every position that is still masked, so that no mask token ever
    comes out; it is yielded as step number S.

    Raises:
        DLMError: when the model returns NaN, naming the step and the row.
    """
    check_capable(model, plan)
    batch = Batch(model, canvas, plan)
    step = 0
    while not bool(canvas.done.all()):
        raise_first(run_work(model, [batch.step()]))
        failed = (canvas.failed >= 0).nonzero()[:, 0]
        if len(failed):
            row = int(failed[0])
            raise DLMError(f"the model returned NaN in step {int(canvas.failed[row])}, row {row}")
        yield step
        step += 1


def run_work(model: Denoiser, work: Sequence[Work]) -> list[Exception | None]:
    """Do several pieces of work side by side, so that those that wait for the model share its calls.

    Returns:
        For each piece the error that ended it, None where there was none. The others go on. Errors of the
        calls that they share are raised.
    """
    errors: list[Exception | None] = [None] * len(work)

    def advance(number: int, states: Any) -> list[StateQuery] | None:
        """The next queries of a piece of work; None when it has ended."""
        try:
            return work[number].send(states)
        except StopIteration:
            return None
        except Exception as error:
            errors[number] = error
            return None

    waiting = [(number, advance(number, None)) for number in range(len(work))]
    while waiting := [(number, queries) for number, queries in waiting if queries is not None]:
        states = iter(compute_states(model, [query for _, queries in waiting for query in queries]))
        waiting = [(number, advance(number, [next(states) for _ in queries])) for number, queries in waiting]
    return errors


def raise_first(errors: Iterable[Exception | None]) -> None:
    """Raise the first error, if there is one."""
    for error in errors:
        if error is not None:
            raise error


@dataclass(frozen=True)
class OpenWindow:
    """The window of the rows [b] in one step."""

    clock: Clock
    active: torch.Tensor
    """[b, W] bool, masks whose time has come."""
    weight: torch.Tensor
    """[b, W] window weights; all 1 in a row where no active mask has any."""
    t: torch.Tensor
    """Time before the step, [b] or [b, W]."""
    s: torch.Tensor
    """Time after it."""


def open_window(canvas: Canvas, plan: Plan, rows: Rows, width: int) -> OpenWindow:
    """The window of the rows [b] of a canvas in their coming step, over the first `width` positions."""
    window, cells = plan.decoder.window, (rows, slice(width))
    masked, valid, start = canvas.masked[cells], canvas.valid[cells], canvas.start[rows]
    clock = plan.pace.clock(
        canvas.step[rows], canvas.stages[rows], masked, canvas.initial[rows], start, window
    )
    t, s, under_way = window.times(clock.t, clock.s, start, canvas.end[rows], width)
    active = masked & clock.scope[:, :width] & under_way
    alone = None if plan.pace.bounded else window.alone(active)
    if alone is not None:
        active = torch.where(alone.any(1, keepdim=True), alone, active)
    weight = window.weights(~masked & valid, start=start, stage=clock.stage)
    open_somewhere = (active & (weight > 0)).any(1, keepdim=True)  # else all masks are open
    return OpenWindow(clock, active, torch.where(open_somewhere, weight, 1.0), t, s)


class Batch:
    """Rows that are decoded by one plan, and what has been computed for them.

    Args:
        model: computes the logits; hidden states come from whoever does the batch's work.
        canvas: the rows; those of later canvases can join.
        plan: how they are decoded.
        scorer: asks the model; by default for tokens to be drawn.
    """

    def __init__(self, model: Denoiser, canvas: Canvas, plan: Plan, scorer: Scorer | None = None) -> None:
        if canvas.ids.device.type != "cpu":
            raise ConfigError(f"a canvas lies on the host, whatever the model is on; got {canvas.ids.device}")
        self.canvas, self.plan, self.width = canvas, plan, canvas.ids.shape[1]
        self.rule = plan.decoder.reveal
        self.scorer = Scorer(model, canvas, plan) if scorer is None else scorer

    def join(self, canvas: Canvas) -> None:
        """Add rows behind those that are there."""
        self._follow(Canvas.join([self.canvas, canvas]))

    def keep(self, rows: torch.Tensor) -> None:
        """Keep the rows [b], given in rising order."""
        self._follow(self.canvas.take(rows), rows)

    def fork(self, rows: torch.Tensor, keys: torch.Tensor) -> None:
        """Add copies of the rows [b] behind those that are there; their noise is that of `keys` [b] now.

        Hidden states are copied with them. Scores are not: their tokens were drawn with the other noise.
        """
        size, copies = len(self.canvas), self.canvas.take(rows)
        copies.key, copies.model_calls = keys, torch.zeros_like(copies.model_calls)
        self.join(copies)
        self.scorer.copy(rows, torch.arange(size, len(self.canvas)))

    def _follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        self.canvas = canvas
        self.scorer.follow(canvas, rows)

    # ---- one step ------------------------------------------------------------------------------------

    def step(self, chosen: torch.Tensor | None = None) -> Work:
        """Take the next step of every row that is not done, as work to be done beside that of other batches.

        A row that has no step left is late: every position that is still masked gets its token.

        Args:
            chosen: [b] int64, rows in rising order that take the step; all by default.
        """
        canvas = self.canvas
        rows = (~canvas.done).nonzero()[:, 0] if chosen is None else chosen[~canvas.done[chosen]]
        if not len(rows):
            return
        live: Rows = slice(None) if len(rows) == len(canvas.ids) else rows
        late = self.plan.pace.late(canvas.step[rows])
        ends = bool(late.any())
        if ends:
            self._grow(rows[late], int(canvas.end.max()))
        self.width = int(canvas.valid[live].sum(1).max())
        view, cells = self._view(live), (live, slice(self.width))
        masked = canvas.masked[cells]
        evidence = self.rule.evidence(view)
        if evidence.verified is not None:
            evidence = replace(evidence, verified=self._verified(view, evidence.scored, evidence.verified))
        if ends and bool(evidence.scored.any()):
            evidence = replace(evidence, scored=torch.where(late[:, None], masked, evidence.scored))
        guess = self._guess() if self.plan.drafts else None
        yield from self.scorer.compute(rows, evidence, guess)
        view = self.scorer.with_scores(live, view, evidence)
        decision = self.rule.decide(view)
        if ends:
            decision = decision.filled(late[:, None], masked)
        written = decision.reveal if decision.replace is None else decision.reveal | decision.replace
        if bool((written & ~evidence.scored).any()):
            yield from self.scorer.compute(rows, Evidence(written), guess)
        self._write(live, decision, written)
        if ends:
            canvas.done[rows[late]] = True
        if self.plan.ahead is not None:
            self._grow(rows[~late] if ends else rows, self.plan.ahead)

    def rows_without_call(self) -> list[int]:
        """The rows whose coming step needs no call of the model, since a draft of them has come true."""
        if not self.plan.drafts:
            return []
        rows = (~self.canvas.done).nonzero()[:, 0]
        drafted = [cache.became_drafts(rows) for cache in self.scorer.states]
        return rows[torch.stack(drafted).all(0)].tolist() if len(rows) else []

    def _view(self, rows: Rows) -> StepView:
        """View of the rows [b] before any score."""
        canvas, plan, cells = self.canvas, self.plan, (rows, slice(self.width))
        ids, masked, pinned, valid = (
            x[cells] for x in (canvas.ids, canvas.masked, canvas.pinned, canvas.valid)
        )
        start, step = canvas.start[rows], canvas.step[rows]
        opening = open_window(canvas, plan, rows, self.width)
        scope, written = opening.clock.scope[:, : self.width], ~masked & ~pinned
        conflicts = self.scorer.conflicts
        return StepView(
            masked=opening.active,
            weight=opening.weight,
            t=opening.t,
            s=opening.s,
            quota=opening.clock.quota,
            written=written & scope,
            noise=partial(cell_noise, canvas.key[rows], step, self.width),
            ids=ids,
            scope=scope & valid & (torch.arange(self.width) >= start[:, None]),
            step=step,
            tokens=self.scorer.tokens,
            course=partial(course, canvas, plan, rows, self.width),
            beyond=self._beyond(rows) if plan.ahead is not None and plan.pace.bounded else None,
            pace=plan.pace,
            conflicts=None if conflicts is None else partial(conflicts.at, rows, width=self.width),
            state={name: x[cells] if x.dim() > 1 else x[rows] for name, x in canvas.rule_state.items()},
        )

    def _verified(self, view: StepView, scored: torch.Tensor, verified: torch.Tensor) -> torch.Tensor:
        """[b, W] bool, what is verified of what a rule asks for: in calls that are made anyway.

        End tokens that have filled what is behind them stay.
        """
        verified = verified & scored.any(1, keepdim=True)
        ends = self.plan.end_tokens
        return verified & ~ends.is_end(view.ids) if ends.fill else verified

    def _guess(self) -> Guess:
        """Gives the drafts of this step, the same to each cache of states."""
        drafts_of_rows: dict[tuple[int, ...], Drafts | None] = {}

        def guess(rows: torch.Tensor) -> Drafts | None:
            key = tuple(rows.tolist())
            if key not in drafts_of_rows:
                drafts_of_rows[key] = self._drafts(rows)
            return drafts_of_rows[key]

        return guess

    def _drafts(self, rows: torch.Tensor) -> Drafts | None:
        """Drafts of the rows [b], from what the model said of them last; None for more rows than drafts.

        A call is saved where *all* rows that need it have become a draft, which many rows hardly do at once.
        """
        if len(rows) > self.plan.drafts:
            return None

        def take_step(canvas: Canvas, source: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
            scorer = DraftScorer(self.scorer, canvas, rows[source], rank)
            (failed,) = run_work(scorer.model, [Batch(scorer.model, canvas, scorer.plan, scorer).step()])
            # A rule that fails on what a row is not: if it becomes that, the error is the one of its step.
            return scorer.sufficient if failed is None else torch.zeros_like(scorer.sufficient)

        canvas = self.canvas.take(rows)
        canvas.alternatives = canvas.alternatives[:, :, :0]  # nobody reads those of drafts
        drafts = likeliest_drafts(canvas, self.plan.drafts, self.scorer.ranks, take_step)
        return None if drafts is None else replace(drafts, rows=rows[drafts.rows])

    def _beyond(self, rows: Rows) -> torch.Tensor:
        """[b] masks of a fixed window that the canvas does not hold yet."""
        canvas = self.canvas
        closed = self._has_end(rows) & self.plan.end_tokens.fill
        return torch.where(closed, 0, canvas.end[rows] - canvas.valid[rows].sum(1))

    def _has_end(self, rows: Rows) -> torch.Tensor:
        """[b] bool, rows in which an end token has been written."""
        canvas = self.canvas
        given_or_masked = canvas.masked[rows] | canvas.pinned[rows]
        return (self.plan.end_tokens.is_end(canvas.ids[rows]) & ~given_or_masked).any(1)

    def _grow(self, rows: torch.Tensor, ahead: int) -> None:
        """Give the rows [b] masks on the right; none where an end token has closed them."""
        canvas = self.canvas
        closed = self.plan.end_tokens.closed(self._has_end(rows), canvas.done[rows])
        canvas.grow(rows, ahead, closed | (canvas.failed[rows] >= 0))

    def predict(self, rows: torch.Tensor, draws: int, predicted: list[torch.Tensor]) -> Work:
        """Fill copies of the rows [b] at once: each mask with a token drawn by itself, given the row now.

        The canvas stays as it is, and the hidden states serve the next step too. The noise is of streams
        that no step draws from, so a prediction says nothing of the tokens to come.

        Args:
            rows: [b] int64, in rising order.
            draws: predictions of each row.
            predicted: takes `draws` tensors [b, W], ids without a mask up to the end of each row.
        """
        canvas = self.canvas
        self.width = int(canvas.valid[rows].sum(1).max())
        cells = (rows, slice(self.width))
        where = canvas.masked[cells]
        states: list[torch.Tensor] = []
        if bool(where.any()):
            guess = self._guess() if self.plan.drafts else None
            states = yield [StateQuery(cache, rows, where, guess=guess) for cache in self.scorer.states]
        streams = range(PREDICTION_NOISE, PREDICTION_NOISE + draws)
        key, revision = canvas.key[rows], canvas.revision[rows]
        noise = [cell_noise(key, revision, self.width, stream)[where] for stream in streams]
        tokens = self.scorer.draw(rows, where, torch.stack(noise, 1), states) if states else None
        for number in range(draws):
            ids = canvas.ids[cells]
            if tokens is not None:
                ids[where] = tokens[:, number]
            predicted.append(ids)

    # ---- writing -------------------------------------------------------------------------------------

    def _write(self, rows: Rows, decision: Decision, written: torch.Tensor) -> None:
        """Put tokens on the canvas, let ends have their effect, and see which rows are finished."""
        canvas, cells = self.canvas, (rows, slice(self.width))
        ids, masked, sound = canvas.ids[cells], canvas.masked[cells], canvas.failed[rows] < 0
        written = written & sound[:, None]  # the scores of a broken row are nothing to write
        new_ids = torch.where(written, self.scorer.token[cells], ids)
        new_masked = masked & ~(decision.reveal & sound[:, None])
        if decision.remask is not None:
            remask = decision.remask & sound[:, None]
            new_ids, new_masked = torch.where(remask, self.plan.mask_id, new_ids), new_masked | remask
        ended = self.plan.end_tokens.apply(new_ids, new_masked, ~canvas.pinned[cells])
        appeared = (masked | written) & ~ended.masked
        probability = torch.where(written, self.scorer.probability[cells], torch.nan)
        for record, new, none in (
            (canvas.reveal_step, canvas.step[rows][:, None], -1),
            (canvas.confidence, probability, torch.nan),
        ):
            record[cells] = torch.where(ended.masked, none, torch.where(appeared, new, record[cells]))
        if self.plan.top_logprobs:
            noted = torch.where(
                written[..., None, None], self.scorer.alternatives[cells], canvas.alternatives[cells]
            )
            canvas.alternatives[cells] = noted
        changed = ((ended.ids != ids) | (ended.masked != masked)).any(1)
        for name, value in decision.state.items():
            place = cells if value.dim() > 1 else rows
            keep = changed.view(-1, *[1] * (value.dim() - 1))
            canvas.rule_state[name][place] = torch.where(keep, value, canvas.rule_state[name][place])
        canvas.ids[cells], canvas.masked[cells] = ended.ids, ended.masked
        canvas.revision[rows] += changed
        canvas.version[rows] += changed
        canvas.step[rows] += 1
        done = ended.complete
        if decision.settled is not None:
            stuck = ~changed & (not self.plan.pace.bounded)  # such a row would be looked at for ever
            done = done & (decision.settled | stuck)
        canvas.done[rows] = done | ~sound
