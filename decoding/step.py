"""One denoising step: the one place where masks become tokens.

A `Batch` holds rows of one plan. Every row has its own step, time, normaliser, noise stream and stopping
point; rows share nothing but the model call. Savings taken here never change the result: the LM head sees
only positions whose score can matter, what it found is kept until the row changes, a row that did not change
is not computed again, and a finished row leaves the batch. (What `Reuse` and a growing canvas with steps save
does change it.)

The canvas, and all arithmetic on it, lie on the host, whichever device the model is on: they are small, and
what happens next depends on them. Ids go to the device, and a few numbers for each position looked at come
back, once in a step.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import torch

from decoding.cache import ScoreCache, StateCache, StateQuery, compute_states
from decoding.canvas import Canvas
from decoding.denoiser import Denoiser
from decoding.ending import Ended
from decoding.pace import Clock
from decoding.request import Plan
from decoding.reveal.base import TOKEN_NOISE, Decision, StepView
from dlm.device import sent
from dlm.errors import ConfigError, DLMError
from dlm.noise import fold, uniform

_CELLS = 1024
"""Positions whose logits [cells, V] are held at once."""

Work = Generator[list[StateQuery], None, None]
"""Work that stops where it needs hidden states, and goes on when `compute_states` has seen to them."""


def denoise(model: Denoiser, canvas: Canvas, plan: Plan) -> Iterator[int]:
    """Write the canvas, in place; yields the number of each step after it has been taken.

    With a number of steps, a last pass fills every position that is still masked, so that no mask token ever
    comes out; it is yielded as step number S.

    Raises:
        ConfigError: when there are fewer steps than stages (blocks).
        DLMError: when the model returns NaN, naming the step and the row.
    """
    batch = Batch(model, canvas, plan)
    step = 0
    while not bool(canvas.done.all()):
        run_work(model, batch.step())
        failed = (canvas.failed >= 0).nonzero()[:, 0]
        if len(failed):
            row = int(failed[0])
            raise DLMError(f"the model returned NaN in step {int(canvas.failed[row])}, row {row}")
        yield step
        step += 1


def run_work(model: Denoiser, work: Sequence[Work]) -> None:
    """Do several pieces of work side by side, so that those that wait for the model share its calls."""
    waiting = list(work)
    while waiting:
        advanced = [(piece, next(piece, None)) for piece in waiting]
        waiting = [piece for piece, queries in advanced if queries is not None]
        compute_states(model, [query for _, queries in advanced if queries for query in queries])


def guided(logits: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance: log p + g · (log p - log p without the prompt), [N, V] float32, unnormalised.

    g = 0 is the model itself; larger values favour what the prompt makes likelier (arXiv 2207.12598).
    """
    with_prompt, without = logits.float().log_softmax(1), unconditional.float().log_softmax(1)
    mixed = with_prompt + guidance * (with_prompt - without)
    return torch.where(with_prompt > -math.inf, mixed, -math.inf)


class Batch:
    """Rows that are decoded by one plan, and what has been computed for them.

    Args:
        model: computes the logits; hidden states come from whoever does the batch's work.
        canvas: the rows; those of later canvases can join.
        plan: how they are decoded.
    """

    def __init__(self, model: Denoiser, canvas: Canvas, plan: Plan) -> None:
        if canvas.ids.device.type != "cpu":
            raise ConfigError(f"a canvas lies on the host, whatever the model is on; got {canvas.ids.device}")
        self.model, self.canvas, self.plan = model, canvas, plan
        self.window, self.rule, self.tokens = plan.decoder.window, plan.decoder.reveal, plan.decoder.tokens
        self.width, self.ahead = canvas.ids.shape[1], plan.ahead
        self.constant_score = self.rule.constant_score(self.tokens)
        self.scores = ScoreCache(canvas)
        self.states = StateCache(canvas, plan.mask_id, reuse=plan.reuse)
        self.unconditional_states: StateCache | None = None
        if plan.decoder.guidance:
            self.unconditional_states = StateCache(canvas, plan.mask_id, unconditional=True, reuse=plan.reuse)

    def join(self, canvas: Canvas) -> None:
        """Add rows behind those that are there."""
        self._follow(Canvas.join([self.canvas, canvas]))

    def keep(self, rows: torch.Tensor) -> None:
        """Keep the rows [b], given in rising order."""
        self._follow(self.canvas.take(rows), rows)

    def _follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        self.canvas = canvas
        self.scores.follow(canvas, rows)
        self.states.follow(canvas, rows)
        if self.unconditional_states is not None:
            self.unconditional_states.follow(canvas, rows)

    # ---- one step ------------------------------------------------------------------------------------

    def step(self) -> list[Work]:
        """The next step of every row that is not done, as work to be done beside that of other batches."""
        rows = (~self.canvas.done).nonzero()[:, 0]
        late = self.plan.pace.late(self.canvas.step[rows])
        if bool(late.any()):
            self._grow(rows[late], int(self.canvas.end.max()))
        self.width = self.canvas.width
        work = []
        if not bool(late.all()):
            work.append(self._denoise(rows[~late]))
        if bool(late.any()):
            work.append(self._fill(rows[late]))
        return work

    def _denoise(self, rows: torch.Tensor) -> Work:
        """Take one step of the rows [b]."""
        view = self._view(rows)
        if self.constant_score is None:
            needed = self.rule.needs(view)
            yield from self._look(rows, needed)
            score = self.scores.scores(rows, needed)
        else:
            score = torch.full(view.masked.shape, self.constant_score)
        view = replace(
            view,
            score=score,
            token=self._cut(self.scores.token, rows),
            confidence=self._cut(self.scores.probability, rows),
        )
        decision = self.rule.decide(view)
        written = decision.reveal if decision.replace is None else decision.reveal | decision.replace
        yield from self._look(rows, written)
        self._write(rows, decision, written)
        if self.ahead is not None:
            self._grow(rows, self.ahead)

    def _fill(self, rows: torch.Tensor) -> Work:
        """The last denoising pass: every position that is still masked gets its token."""
        masked = self._cut(self.canvas.masked, rows)
        yield from self._look(rows, masked)
        self._write(rows, Decision(masked), masked)
        self.canvas.done[rows] = True

    def _view(self, rows: torch.Tensor) -> StepView:
        """View of the rows [b] before any score."""
        canvas, pace = self.canvas, self.plan.pace
        masked, pinned = self._cut(canvas.masked, rows), self._cut(canvas.pinned, rows)
        start, end, step = canvas.start[rows], canvas.end[rows], canvas.step[rows]
        clock = pace.clock(step, canvas.stages[rows], masked, start, self.window)
        whole_scope = self.window.scope(start, clock.stage, canvas.ids.shape[1])
        scope = whole_scope[:, : self.width]
        t, s, under_way = self.window.times(clock.t, clock.s, start, end, self.width)
        active = masked & scope & under_way
        weight = self._weights(rows, active, clock)
        total = (canvas.initial[rows] & whole_scope).sum(1)
        return StepView(
            masked=active,
            weight=weight,
            t=t,
            s=s,
            quota=pace.quota(step, clock, total),
            written=~masked & ~pinned & scope,
            noise=lambda stream: self._noise(rows, step, stream),
            ids=self._cut(canvas.ids, rows),
            scope=scope & self._cut(canvas.valid, rows) & (torch.arange(self.width) >= start[:, None]),
            progress=lambda: (~masked & ~pinned).sum(1) / canvas.initial[rows].sum(1).clamp(min=1),
            step=step,
            beyond=self._beyond(rows),
            rate=pace.rate,
            state={
                name: self._cut(x, rows) if x.dim() > 1 else x[rows] for name, x in canvas.rule_state.items()
            },
        )

    def _cut(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[B, L, …] -> [b, W, …]: some rows, as far as the canvas reaches now."""
        return x[rows, : self.width]

    def _weights(self, rows: torch.Tensor, active: torch.Tensor, clock: Clock) -> torch.Tensor:
        """[b, W] window weights; all ones in a row whose masked positions are all shut."""
        canvas = self.canvas
        unmasked = ~self._cut(canvas.masked, rows) & self._cut(canvas.valid, rows)
        weight = self.window.weights(unmasked, start=canvas.start[rows], stage=clock.stage)
        open_somewhere = (active & (weight > 0)).any(1, keepdim=True)
        return torch.where(open_somewhere, weight, 1.0)

    def _beyond(self, rows: torch.Tensor) -> torch.Tensor | None:
        """[b] masks of a fixed window that the canvas does not hold yet; None where there are none."""
        if self.plan.margin is None or self.plan.pace.steps is None:
            return None
        canvas = self.canvas
        closed = self._has_end(rows) & self.plan.ending.fill
        return torch.where(closed, 0, canvas.end[rows] - canvas.valid[rows].sum(1))

    def _noise(self, rows: torch.Tensor, count: torch.Tensor, stream: int) -> torch.Tensor:
        """[b, W] uniform numbers: a function of (row key, step or revision [b], stream, position) alone."""
        key = fold(fold(self.canvas.key[rows], count), stream)
        return uniform(key[:, None], torch.arange(self.width))

    def _has_end(self, rows: torch.Tensor) -> torch.Tensor:
        """[b] bool, rows in which an end token has been written."""
        canvas = self.canvas
        written = ~canvas.masked[rows] & ~canvas.pinned[rows]
        return (written & self.plan.ending.is_end(canvas.ids[rows])).any(1)

    def _grow(self, rows: torch.Tensor, ahead: int) -> None:
        """Give the rows [b] masks on the right; none where an end token has closed them."""
        canvas = self.canvas
        closed = self.plan.ending.closed(self._has_end(rows), canvas.done[rows])
        canvas.grow(rows, ahead, closed | (canvas.failed[rows] >= 0))

    # ---- the model -----------------------------------------------------------------------------------

    def _look(self, rows: torch.Tensor, where: torch.Tensor) -> Work:
        """Score the positions `where` [b, W] and draw their tokens, where that has not been done.

        What was found on the model's device comes back in one piece: the one time in a step that the host
        waits for it.
        """
        missing = where & ~self.scores.entries.at(rows, self.width)
        incomplete = missing.any(1)
        if not bool(incomplete.any()):
            return
        rows, missing = rows[incomplete], missing[incomplete]
        yield self._queries(rows, missing)
        given = [x.split(_CELLS) for x in self._given(rows, missing)]
        pieces = [
            self._columns(logits, *some)
            for logits, *some in zip(self._logits(rows, missing), *given, strict=True)
        ]
        found = torch.cat(pieces).cpu()
        self._fail_broken(rows, missing, found)
        found = found.nan_to_num()
        score, alternatives = found[:, 2:].tensor_split(
            [found.shape[1] - 2 - 2 * self.plan.top_logprobs], dim=1
        )
        self.scores.put(rows, missing, found[:, 0].long(), found[:, 1].float(), score.float(), alternatives)

    def _given(self, rows: torch.Tensor, where: torch.Tensor) -> list[torch.Tensor]:
        """Uniform numbers and the rule's state at the positions, [N, …] each, for `_columns`."""
        noise = self._noise(rows, self.canvas.revision[rows], TOKEN_NOISE)[where]
        tensors = [x for x in self.canvas.rule_state.values() if x.dim() > 1]
        return [noise, *(self._cut(x, rows)[where] for x in tensors)]

    def _columns(self, logits: torch.Tensor, noise: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Columns for N positions, [N, V] -> [N, 2 + C + 2k] float64.

        The token drawn, its probability, the rule's score, and the k likeliest tokens (see
        `TokenRule.likeliest`).
        """
        choice = self.tokens.choose(logits, noise.to(logits.device, non_blocking=True))
        names = [name for name, x in self.canvas.rule_state.items() if x.dim() > 1]
        state = {name: x.to(logits.device, non_blocking=True) for name, x in zip(names, tensors, strict=True)}
        score = self.rule.score(logits, choice, state, self.tokens).double()
        columns = [choice.token.double()[:, None], choice.probability.double()[:, None]]
        columns.append(score[:, None] if score.dim() == 1 else score)
        if self.plan.top_logprobs:
            columns.append(self.tokens.likeliest(logits, self.plan.top_logprobs).flatten(1))
        return torch.cat(columns, dim=1)

    def _queries(self, rows: torch.Tensor, where: torch.Tensor) -> list[StateQuery]:
        queries = [StateQuery(self.states, rows, where)]
        if self.unconditional_states is not None:
            queries.append(StateQuery(self.unconditional_states, rows, where))
        return queries

    def _logits(self, rows: torch.Tensor, where: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits [≤ _CELLS, V] of the positions `where` [b, W], in row-major order, a piece at a time."""
        guidance, end_ids = self.plan.decoder.guidance, self.plan.ending.end_ids
        owner, position = where.nonzero().unbind(1)  # which of the rows each cell belongs to, and where
        cells = self.states.of(rows[owner], position)
        unconditional = self.unconditional_states
        without = None if unconditional is None else unconditional.of(rows[owner], position).split(_CELLS)
        no_end = position < self.canvas.ends_from[rows][owner]
        any_shut, shut = bool(no_end.any()), no_end.to(cells.device, non_blocking=True).split(_CELLS)
        owners = owner.to(cells.device, non_blocking=True).split(_CELLS)
        present: tuple[torch.Tensor, torch.Tensor] | None = None
        for i, hidden in enumerate(cells.split(_CELLS)):
            logits = self.model.logits(hidden)
            if any_shut:
                for end_id in end_ids:
                    logits[:, end_id].masked_fill_(shut[i], -math.inf)
            if without is not None:
                logits = guided(logits, self.model.logits(without[i]), guidance)
            logits = self.tokens.biased(logits)
            if self.tokens.penalises:
                present = self._present(rows, logits) if present is None else present
                seen, written = present
                logits = self.tokens.penalised(logits, seen[owners[i]], written[owners[i]])
            yield logits

    def _present(self, rows: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that each row holds [b, V] bool, and how often it has written each [b, V].

        End tokens count for neither: templates hold them too.
        """
        held = self._cut(self.canvas.valid & ~self.canvas.masked, rows)
        ids = self._cut(self.canvas.ids, rows)
        counts = torch.zeros(2, len(rows), logits.shape[1], device=logits.device)
        for count, where in zip(counts, (held, held & self._cut(self.canvas.initial, rows)), strict=True):
            count.scatter_add_(1, sent(ids, logits.device), sent(where.float(), logits.device))
        for end_id in self.plan.ending.end_ids:
            counts[:, :, end_id] = 0
        return counts[0] > 0, counts[1]

    def _fail_broken(self, rows: torch.Tensor, where: torch.Tensor, found: torch.Tensor) -> None:
        """Mark the rows [b] for which the model returned NaN; the others go on."""
        bad = found[:, :2].isnan().any(1) | found[:, 2].isnan()
        if bool(bad.any()):
            broken = rows[where.nonzero()[bad.nonzero()[:, 0], 0]]
            self.canvas.failed[broken] = self.canvas.step[broken]

    # ---- writing -------------------------------------------------------------------------------------

    def _write(self, rows: torch.Tensor, decision: Decision, written: torch.Tensor) -> None:
        """Put tokens on the canvas, let ends have their effect, and see which rows are finished."""
        canvas = self.canvas
        ids, masked = self._cut(canvas.ids, rows), self._cut(canvas.masked, rows)
        new_ids = torch.where(written, self._cut(self.scores.token, rows), ids)
        new_masked = masked & ~decision.reveal
        if decision.remask is not None:
            new_ids = torch.where(decision.remask, self.plan.mask_id, new_ids)
            new_masked = new_masked | decision.remask
        broken = canvas.failed[rows] >= 0  # what was found there is nothing to write
        new_ids = torch.where(broken[:, None], ids, new_ids)
        new_masked = torch.where(broken[:, None], masked, new_masked)
        written = written & ~broken[:, None]
        after = self.plan.ending.apply(new_ids, new_masked, ~self._cut(canvas.pinned, rows))
        self._note(rows, masked, written, after)
        changed = ((after.ids != ids) | (after.masked != masked)).any(1)
        for name, value in decision.state.items():
            place = (rows, slice(None, self.width)) if value.dim() > 1 else rows
            keep = changed.view(-1, *[1] * (value.dim() - 1))
            canvas.rule_state[name][place] = torch.where(keep, value, canvas.rule_state[name][place])
        canvas.ids[rows, : self.width], canvas.masked[rows, : self.width] = after.ids, after.masked
        canvas.revision[rows] += changed
        canvas.step[rows] += 1
        done = after.complete
        if decision.settled is not None:
            endless = self.plan.pace.steps is None  # a row that stays as it is would be looked at for ever
            done = done & (decision.settled | (~changed & endless))
        canvas.done[rows] = done | broken

    def _note(self, rows: torch.Tensor, masked: torch.Tensor, written: torch.Tensor, after: Ended) -> None:
        """Record when tokens appeared and how probable they were; forget those that are masked again."""
        canvas = self.canvas
        appeared = (masked | written) & ~after.masked
        probability = torch.where(written, self._cut(self.scores.probability, rows), torch.nan)
        for record, new, none in (
            (canvas.reveal_step, canvas.step[rows][:, None], -1),
            (canvas.confidence, probability, torch.nan),
        ):
            old = self._cut(record, rows)
            record[rows, : self.width] = torch.where(after.masked, none, torch.where(appeared, new, old))
        if self.plan.top_logprobs:
            old = self._cut(canvas.alternatives, rows)
            new = self._cut(self.scores.alternatives, rows)
            canvas.alternatives[rows, : self.width] = torch.where(written[..., None, None], new, old)
