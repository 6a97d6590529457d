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
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from decoding.canvas import Canvas, Rows
from decoding.course import course
from decoding.denoiser import (
    Denoiser,
    ScoreCache,
    StateCache,
    StateQuery,
    can,
    check_capable,
    compute_states,
)
from decoding.pace import Clock
from decoding.request import Plan
from decoding.reveal.base import PREDICTION_NOISE, TOKEN_NOISE, Decision, StepView
from decoding.reveal.dependence import Dependence
from dlm.errors import ConfigError, DLMError
from dlm.noise import cell_noise
from dlm.shadows import Shadows
from dlm.spec import ModelSpec

_LOGIT_ROWS = 1024
"""Positions whose logits [cells, V] are held at once."""

Work = Generator[list[StateQuery], list[torch.Tensor], None]
"""Work that stops where it needs hidden states, and goes on with them: [N, D] for each of its queries."""


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
        run_work(model, [batch.step()])
        failed = (canvas.failed >= 0).nonzero()[:, 0]
        if len(failed):
            row = int(failed[0])
            raise DLMError(f"the model returned NaN in step {int(canvas.failed[row])}, row {row}")
        yield step
        step += 1


def run_work(model: Denoiser, work: Iterable[Work]) -> None:
    """Do several pieces of work side by side, so that those that wait for the model share its calls."""
    waiting = [(piece, next(piece, None)) for piece in work]
    while waiting := [(piece, queries) for piece, queries in waiting if queries is not None]:
        states = iter(compute_states(model, [query for _, queries in waiting for query in queries]))
        waiting = [(piece, _sent(piece, [next(states) for _ in queries])) for piece, queries in waiting]


def _sent(piece: Work, states: list[torch.Tensor]) -> list[StateQuery] | None:
    """Go on with a piece of work; returns its next queries, None when it is done."""
    try:
        return piece.send(states)
    except StopIteration:
        return None


def _on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the host as float64, in one copy."""
    flat = torch.cat([x.double().flatten() for x in tensors]).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def guided(logits: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance: log p + g · (log p - log p without the prompt), [N, V] float32, unnormalised.

    g = 0 is the model itself; larger values favour what the prompt makes likelier (arXiv 2207.12598).
    """
    with_prompt, without_prompt = logits.float().log_softmax(1), unconditional.float().log_softmax(1)
    mixed = with_prompt + guidance * (with_prompt - without_prompt)
    return torch.where(with_prompt > -math.inf, mixed, -math.inf)


@dataclass(frozen=True)
class Opening:
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


def open_window(canvas: Canvas, plan: Plan, rows: Rows, width: int) -> Opening:
    """The window of the rows [b] of a canvas in their coming step, over the first `width` positions."""
    window, cells = plan.decoder.window, (rows, slice(width))
    masked, valid, start = canvas.masked[cells], canvas.valid[cells], canvas.start[rows]
    clock = plan.pace.clock(
        canvas.step[rows], canvas.stages[rows], masked, canvas.initial[rows], start, window
    )
    t, s, under_way = window.times(clock.t, clock.s, start, canvas.end[rows], width)
    active = masked & clock.scope[:, :width] & under_way
    weight = window.weights(~masked & valid, start=start, stage=clock.stage)
    open_somewhere = (active & (weight > 0)).any(1, keepdim=True)  # else all masks are open
    return Opening(clock, active, torch.where(open_somewhere, weight, 1.0), t, s)


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
        self.model, self.canvas, self.plan, self.width = model, canvas, plan, canvas.ids.shape[1]
        self.rule, self.tokens = plan.decoder.reveal, plan.decoder.tokens
        has_conflicts = self.rule.dependence is not None
        self.scores = ScoreCache(canvas, self.rule.score_width, has_conflicts)
        blocks = ModelSpec.of(model).visibility.block_size if can(model, "partial") else None
        self.states = [
            StateCache(canvas, plan.mask_id, blocks, unconditional=unconditional, reuse=plan.reuse)
            for unconditional in ((False, True) if plan.decoder.guidance else (False,))
        ]
        self.constant_score = self.rule.constant_score(self.tokens)
        self.penalises = self.tokens.penalises

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
        for cache in self.states:
            cache.copy(rows, torch.arange(size, len(self.canvas)))

    def _follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        self.canvas = canvas
        self.scores.follow(canvas, rows)
        for cache in self.states:
            cache.follow(canvas, rows)

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
        if self.constant_score is None:
            needed = self.rule.needs(view)
            if ends:
                needed = torch.where(late[:, None], masked, needed)
            verified = self._verified(view, needed) if self.rule.verifies else None
            yield from self._score_positions(rows, needed, verified, self.rule.dependence)
            score = self.scores.scores(live, needed)
        else:
            needed, score = torch.zeros_like(masked), torch.full(masked.shape, self.constant_score)
        token = torch.where(needed, self.scores.token[cells], self.plan.mask_id)
        confidence = torch.where(needed, self.scores.probability[cells], 0)
        view = replace(view, score=score, token=token, confidence=confidence)
        if self.rule.verifies:
            has_value = self.scores.verified.at(live, self.width)
            leave_one_out = torch.where(has_value, self.scores.leave_one_out[cells], torch.inf)
            view = replace(view, leave_one_out=leave_one_out)
        decision = self.rule.decide(view)
        if ends:
            decision = decision.filled(late[:, None], masked)
        written = decision.reveal if decision.replace is None else decision.reveal | decision.replace
        if bool((written & ~needed).any()):
            yield from self._score_positions(rows, written)
        self._write(live, decision, written)
        if ends:
            canvas.done[rows[late]] = True
        if self.plan.ahead is not None:
            self._grow(rows[~late] if ends else rows, self.plan.ahead)

    def _view(self, rows: Rows) -> StepView:
        """View of the rows [b] before any score."""
        canvas, plan, cells = self.canvas, self.plan, (rows, slice(self.width))
        ids, masked, pinned, valid = (
            x[cells] for x in (canvas.ids, canvas.masked, canvas.pinned, canvas.valid)
        )
        start, step = canvas.start[rows], canvas.step[rows]
        opening = open_window(canvas, plan, rows, self.width)
        scope, written = opening.clock.scope[:, : self.width], ~masked & ~pinned
        conflicts = self.scores.conflicts
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
            course=partial(course, canvas, plan, rows, self.width),
            beyond=self._beyond(rows) if plan.ahead is not None and plan.pace.bounded else None,
            rate=plan.pace.rate,
            conflicts=None if conflicts is None else partial(conflicts.at, rows, width=self.width),
            state={name: x[cells] if x.dim() > 1 else x[rows] for name, x in canvas.rule_state.items()},
        )

    def _beyond(self, rows: Rows) -> torch.Tensor:
        """[b] masks of a fixed window that the canvas does not hold yet."""
        canvas = self.canvas
        closed = self._has_end(rows) & self.plan.ending.fill
        return torch.where(closed, 0, canvas.end[rows] - canvas.valid[rows].sum(1))

    def _has_end(self, rows: Rows) -> torch.Tensor:
        """[b] bool, rows in which an end token has been written."""
        canvas = self.canvas
        given_or_masked = canvas.masked[rows] | canvas.pinned[rows]
        return (self.plan.ending.is_end(canvas.ids[rows]) & ~given_or_masked).any(1)

    def _grow(self, rows: torch.Tensor, ahead: int) -> None:
        """Give the rows [b] masks on the right; none where an end token has closed them."""
        canvas = self.canvas
        closed = self.plan.ending.closed(self._has_end(rows), canvas.done[rows])
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
        owner, position = where.nonzero().unbind(1)
        states = (yield [StateQuery(cache, rows, where) for cache in self.states]) if len(owner) else ()
        streams = range(PREDICTION_NOISE, PREDICTION_NOISE + draws)
        key, revision = canvas.key[rows], canvas.revision[rows]
        noise = [cell_noise(key, revision, self.width, stream)[where] for stream in streams]
        pieces = [x.split(_LOGIT_ROWS) for x in (rows[owner], position, torch.stack(noise, 1), *states)]
        tokens = [
            self._tokens(self._logits(row, place, *hidden), uniform)
            for row, place, uniform, *hidden in zip(*pieces, strict=True)
            if len(row)
        ]
        for number in range(draws):
            ids = canvas.ids[cells]
            if tokens:
                ids[where] = torch.cat(tokens)[:, number]
            predicted.append(ids)

    def _tokens(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """[N, draws] int64 on the host, tokens drawn from the logits [N, V] with the noise [N, draws]."""
        drawn = [self.tokens.choose(logits, x.to(logits.device, non_blocking=True)).token for x in noise.T]
        return torch.stack(drawn, 1).cpu()

    # ---- the model -----------------------------------------------------------------------------------

    def _verified(self, view: StepView, needed: torch.Tensor) -> torch.Tensor:
        """[b, W] bool, tokens that are verified in a step that needs a call; ends that have filled stay."""
        verified = self.rule.verified(view)
        if self.plan.ending.fill:
            verified = verified & ~self.plan.ending.is_end(view.ids)
        return verified & needed.any(1, keepdim=True)

    def _score_positions(
        self,
        rows: torch.Tensor,
        where: torch.Tensor,
        verified: torch.Tensor | None = None,
        dependence: Dependence | None = None,
    ) -> Work:
        """Score the positions `where` [b, W] and draw their tokens, where that has not been done.

        Also ask what the tokens `verified` [b, W] are worth and, with a `dependence`, which positions are in
        conflict; that is done for all of a row at once. The results come back from the model's device in one
        piece: the one time in a step that the host waits for it.
        """
        missing = where & ~self.scores.entries.at(rows, self.width)
        incomplete = missing.any(1)
        if verified is not None:
            verified = verified & ~self.scores.verified.at(rows, self.width)
            incomplete = incomplete | verified.any(1)
        if not bool(incomplete.any()):
            return
        where = missing if dependence is None else where
        if not bool(incomplete.all()):
            rows, where = rows[incomplete], where[incomplete]
            verified = None if verified is None else verified[incomplete]
        record = shadows = None
        if dependence is not None:
            record = dependence.record(where & self.canvas.masked[rows, : self.width])
        if verified is not None and bool(verified.any()):
            shadows = Shadows(*verified.nonzero().unbind(1))
        extras = {False: (record, shadows), True: (None, None)}  # by whether the prompt is left out
        states = yield [StateQuery(cache, rows, where, *extras[cache.unconditional]) for cache in self.states]
        results = [self._scored(rows, where, states)]
        if dependence is not None and record is not None:
            results.append(dependence.conflicts(record))
        if shadows is not None:
            results.append(self._likelihood(shadows.states, self.canvas.ids[rows, : self.width][verified]))
        columns, *more = _on_host(results)
        self._put(rows, where, columns)
        if record is not None and self.scores.conflicts is not None:
            self.scores.conflicts.put(rows, record.positions, more[0] > 0)
        if verified is not None and shadows is not None:
            self.scores.put_verified(rows, verified, more[-1])

    def _scored(self, rows: torch.Tensor, where: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        """[N, C] what `_columns` says of the positions `where` [b, W], of which there are the states."""
        canvas = self.canvas
        noise = cell_noise(canvas.key[rows], canvas.revision[rows], self.width, TOKEN_NOISE)
        owner, position = where.nonzero().unbind(1)
        cells = [x.split(_LOGIT_ROWS) for x in (rows[owner], position, noise[where], *states)]
        pieces = [
            self._columns(self._logits(row, place, *hidden), row, place, uniform)
            for row, place, uniform, *hidden in zip(*cells, strict=True)
        ]
        return torch.cat(pieces)

    def _likelihood(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[S] the model's probability of the tokens [S], of which shadows have the states [S, D]."""
        logp = []
        for x, y in zip(states.split(_LOGIT_ROWS), ids.split(_LOGIT_ROWS), strict=True):
            likely = self.model.logits(x).float().log_softmax(1)
            tokens = y[:, None].to(likely.device, non_blocking=True)  # the head may lie elsewhere
            logp.append(likely.gather(1, tokens)[:, 0])
        return torch.cat(logp).exp()

    def _put(self, rows: torch.Tensor, where: torch.Tensor, columns: torch.Tensor) -> None:
        """Keep what was computed at `where` [b, W]; rows for which the model returned NaN fail."""
        bad = columns[:, :2].isnan().any(1) | columns[:, 2].isnan()
        if bool(bad.any()):  # these rows fail, the others go on
            broken = rows[where.nonzero()[bad, 0]]
            self.canvas.failed[broken] = self.canvas.step[broken]
        size = columns.shape[1] - 2 * self.plan.top_logprobs  # behind it, log-probabilities may be -inf
        columns[:, :size] = columns[:, :size].nan_to_num()
        self.scores.put(rows, where, columns)

    def _columns(
        self, logits: torch.Tensor, row: torch.Tensor, position: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The token drawn at some positions, its probability, and the rule's score.

        Args:
            logits: [N, V].
            row: [N] int64, rows of the canvas.
            position: [N] int64, positions in them.
            noise: [N] uniform numbers.

        Returns:
            [N, 2 + C + 2k] float64, at the end the k likeliest tokens (see `TokenRule.likeliest`).
        """
        choice = self.tokens.choose(logits, noise.to(logits.device, non_blocking=True))
        tensors = {name: x for name, x in self.canvas.rule_state.items() if x.dim() > 1}
        state = {name: x[row, position].to(logits.device, non_blocking=True) for name, x in tensors.items()}
        score = self.rule.score(logits, choice, state, self.tokens).double()
        columns = [choice.token.double()[:, None], choice.probability.double()[:, None]]
        columns.append(score[:, None] if score.dim() == 1 else score)
        if self.plan.top_logprobs:
            columns.append(self.tokens.likeliest(logits, self.plan.top_logprobs).flatten(1))
        return torch.cat(columns, dim=1)

    def _logits(
        self,
        row: torch.Tensor,
        position: torch.Tensor,
        states: torch.Tensor,
        *unconditional_states: torch.Tensor,
    ) -> torch.Tensor:
        """[N, V] logits at the positions [N] of the rows [N], of which `states` [N, D] are the hidden states.

        For guidance there are also the states `unconditional_states` without the prompt.
        """
        logits = self.model.logits(states)
        if bool(self.canvas.ends_from.any()):
            shut = position < self.canvas.ends_from[row]  # too early for an end token
            for end_id in self.plan.ending.end_ids:
                logits[:, end_id].masked_fill_(shut.to(logits.device, non_blocking=True), -math.inf)
        return self._changed(logits, row, *unconditional_states)

    def _changed(
        self, logits: torch.Tensor, row: torch.Tensor, *unconditional_states: torch.Tensor
    ) -> torch.Tensor:
        """[N, V] the model's logits with guidance, bias and penalties; arguments as of `_logits`."""
        for unconditional in unconditional_states:
            logits = guided(logits, self.model.logits(unconditional), self.plan.decoder.guidance)
        if self.tokens.logit_bias:
            logits = self.tokens.biased(logits)
        if self.penalises:
            rows, owner = row.unique(return_inverse=True)
            owner = owner.to(logits.device, non_blocking=True)
            logits = self.tokens.penalised(logits, *(x[owner] for x in self._present(rows, logits)))
        return logits

    def _present(self, rows: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that each row holds [b, V] bool, and how often it has written each [b, V].

        End tokens count for neither: templates hold them too.
        """
        canvas, cells = self.canvas, (rows, slice(self.width))
        held = canvas.valid[cells] & ~canvas.masked[cells]
        ids = canvas.ids[cells].to(logits.device, non_blocking=True)
        counts = torch.zeros(2, len(rows), logits.shape[1], device=logits.device)
        for count, where in zip(counts, (held, held & canvas.initial[cells]), strict=True):
            count.scatter_add_(1, ids, where.float().to(logits.device, non_blocking=True))
        for end_id in self.plan.ending.end_ids:
            counts[:, :, end_id] = 0
        return counts[0] > 0, counts[1]

    # ---- writing -------------------------------------------------------------------------------------

    def _write(self, rows: Rows, decision: Decision, written: torch.Tensor) -> None:
        """Put tokens on the canvas, let ends have their effect, and see which rows are finished."""
        canvas, cells = self.canvas, (rows, slice(self.width))
        ids, masked, sound = canvas.ids[cells], canvas.masked[cells], canvas.failed[rows] < 0
        written = written & sound[:, None]  # the scores of a broken row are nothing to write
        new_ids = torch.where(written, self.scores.token[cells], ids)
        new_masked = masked & ~(decision.reveal & sound[:, None])
        if decision.remask is not None:
            remask = decision.remask & sound[:, None]
            new_ids, new_masked = torch.where(remask, self.plan.mask_id, new_ids), new_masked | remask
        after = self.plan.ending.apply(new_ids, new_masked, ~canvas.pinned[cells])
        appeared = (masked | written) & ~after.masked
        probability = torch.where(written, self.scores.probability[cells], torch.nan)
        for record, new, none in (
            (canvas.reveal_step, canvas.step[rows][:, None], -1),
            (canvas.confidence, probability, torch.nan),
        ):
            record[cells] = torch.where(after.masked, none, torch.where(appeared, new, record[cells]))
        if self.plan.top_logprobs:
            noted = torch.where(
                written[..., None, None], self.scores.alternatives[cells], canvas.alternatives[cells]
            )
            canvas.alternatives[cells] = noted
        changed = ((after.ids != ids) | (after.masked != masked)).any(1)
        for name, value in decision.state.items():
            place = cells if value.dim() > 1 else rows
            keep = changed.view(-1, *[1] * (value.dim() - 1))
            canvas.rule_state[name][place] = torch.where(keep, value, canvas.rule_state[name][place])
        canvas.ids[cells], canvas.masked[cells] = after.ids, after.masked
        canvas.revision[rows] += changed
        canvas.version[rows] += changed
        canvas.step[rows] += 1
        done = after.complete
        if decision.settled is not None:
            still = ~changed & (not self.plan.pace.bounded)  # such a row would be looked at for ever
            done = done & (decision.settled | still)
        canvas.done[rows] = done | ~sound
