"""The denoising loop: the one place where masks become tokens.

Every row has its own step, time, normaliser, noise stream and stopping point; rows share nothing but the
model call. Savings taken here never change the result: the LM head sees only positions whose score can
matter, what it found is kept until the row changes, a row that did not change is not computed again, and a
finished row leaves the batch. (What `Reuse` and a growing canvas with steps save does change it.)

The canvas, and all arithmetic on it, lie on the host, whichever device the model is on: they are small, and
what happens next depends on them. Ids go to the device, and three numbers for each position looked at come
back, once in a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from decoding.canvas import Canvas
from decoding.memo import Memo
from decoding.presets import Decoder
from decoding.reveal import StepView
from decoding.states import Ask, Denoiser, Reuse, States, refresh
from decoding.window import MARGIN, Window
from dlm.device import sent
from dlm.errors import ConfigError, DLMError
from dlm.noise import fold, uniform

_REVEAL, _TOKEN, _REMASK = 0, 1, 2
"""Streams of noise within a step."""

GROWING_WINDOW = 256
"""Length for which kernels and blocks of open size are chosen on a canvas that has no length of its own."""

_CELLS = 1024
"""Positions whose logits [cells, V] are in memory at once."""

Asking = Generator[list[Ask], None, None]
"""Work that stops where it needs hidden states, and goes on when `refresh` has seen to them."""


@dataclass(frozen=True)
class Settings:
    """How one request is decoded.

    The pace is either a number of steps or a rate.

    Attributes:
        steps: S, denoising steps; the final pass that fills what is left comes on top. None with a rate.
        eos_id: id that ends an answer.
        mask_id: id of the mask token.
        eos_fill: once an EOS is written, everything to its right becomes EOS.
        early_exit: stop a row when everything before its first EOS is written (exact: no later step could
            change the answer). Not used by rules that remask.
        rate: tokens to write per model call on average; as many calls are made as that takes.
        grow: whether the canvas begins with a few masks and grows as they are written. With a rate this is
            how length-free decoding works; with steps it is an approximation of a whole window, whose far
            masks count in the normaliser and are not shown to the model.
        margin: masks that a growing canvas holds beyond those that can open.
        reuse: which keys and values are reused (approximate); None for none.
        fit: the length for which kernels and blocks of open size are chosen; the canvas's own by default,
            or `GROWING_WINDOW` for one that grows.
    """

    steps: int | None
    eos_id: int
    mask_id: int
    eos_fill: bool = True
    early_exit: bool = True
    rate: float | None = None
    grow: bool = False
    margin: int = MARGIN
    reuse: Reuse | None = None
    fit: int | None = None

    def __post_init__(self) -> None:
        """Check the pace."""
        if (self.steps is None) == (self.rate is None):
            raise ConfigError(f"give either steps or a rate, got steps={self.steps} and rate={self.rate}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if self.rate is not None and not 1 <= self.rate < math.inf:
            raise ConfigError(f"rate must be at least 1 token per model call, got {self.rate}")
        if not isinstance(self.margin, int) or self.margin < 0:
            raise ConfigError(f"margin must be a whole number, not negative, got {self.margin!r}")

    def length(self, own: int) -> int:
        """The length for which sizes are chosen, on a canvas whose `own` length this is."""
        return self.fit or (GROWING_WINDOW if self.grow else own)

    def ahead(self, decoder: Decoder) -> int | None:
        """How many masks a canvas that grows begins with; None if it does not grow."""
        if not self.grow:
            return None
        return decoder.window.fitted(self.length(GROWING_WINDOW)).ahead + self.margin


@dataclass(frozen=True)
class Clock:
    """Where rows stand in time; all [B]."""

    stage: torch.Tensor
    t: torch.Tensor
    s: torch.Tensor
    index: torch.Tensor
    """Step within the stage."""
    count: torch.Tensor
    """Steps of the stage."""


def clock(step: torch.Tensor | int, steps: int, stages: torch.Tensor) -> Clock:
    """The stage and times of step number `step` ([B] or one for all), for rows with `stages` [B] stages.

    Stage j of b runs from step ⌊jS/b⌋ to ⌊(j+1)S/b⌋ and its own time from 1 to 0.
    """
    stage = ((step + 1) * stages - 1) // steps
    first, last = stage * steps // stages, (stage + 1) * steps // stages
    index, count = step - first, last - first
    return Clock(stage, 1 - index.double() / count, 1 - (index + 1).double() / count, index, count)


def denoise(model: Denoiser, canvas: Canvas, decoder: Decoder, settings: Settings) -> Iterator[int]:
    """Write the canvas, in place; yields the number of each step after it has been taken.

    After `settings.steps` steps a last pass fills every position that is still masked, so that no mask
    token ever comes out; it is yielded as step number `settings.steps`. With a rate, steps are taken until
    nothing is masked.

    Raises:
        ConfigError: when there are fewer steps than stages (blocks), and for a rate with a rule that needs
            times.
        DLMError: when the model returns NaN, naming the step and the row.
    """
    lane = Lane(model, canvas, decoder, settings)
    step = 0
    while not lane.finished:
        work_through(model, lane.work())
        yield step
        step += 1


def work_through(model: Denoiser, work: Sequence[Asking]) -> None:
    """Do several pieces of work side by side, so that those who wait for the model share its calls."""
    waiting = list(work)
    while waiting:
        going = [(piece, next(piece, None)) for piece in waiting]
        waiting = [piece for piece, asks in going if asks is not None]
        refresh(model, [ask for _, asks in going if asks for ask in asks])


def guided(logits: torch.Tensor, blind: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance: log p + g · (log p - log p without the prompt), [N, V] float32, unnormalised.

    g = 0 is the model itself; larger values favour what the prompt makes likelier (arXiv 2207.12598).
    """
    with_prompt, without = logits.float().log_softmax(1), blind.float().log_softmax(1)
    mixed = with_prompt + guidance * (with_prompt - without)
    return torch.where(with_prompt > -math.inf, mixed, -math.inf)


class BrokenRowError(DLMError):
    """The model returned NaN for a row.

    Attributes:
        lane: that holds the row.
        row: its number there.
        step: the step that it was to take.
    """

    def __init__(self, lane: Lane, row: int, step: int) -> None:
        super().__init__(f"the model returned NaN in step {step}, row {row}")
        self.lane, self.row, self.step = lane, row, step


class Lane:
    """Rows that are decoded in the same way: the loop's arithmetic, and what it remembers.

    Args:
        model: computes the logits; hidden states come from whoever does the lane's work.
        canvas: the rows; those of later canvases can join.
        decoder: how they are decoded.
        settings: at what pace, and so on.
    """

    def __init__(self, model: Denoiser, canvas: Canvas, decoder: Decoder, settings: Settings) -> None:
        if settings.rate is not None and decoder.timed:
            raise ConfigError(f"decoder {decoder.name!r} goes by time: it needs steps, not a rate")
        if canvas.ids.device.type != "cpu":
            raise ConfigError(f"a canvas lies on the host, whatever the model is on; got {canvas.ids.device}")
        self.model, self.canvas, self.decoder, self.settings = model, canvas, decoder, settings
        self.window: Window = decoder.window.fitted(settings.length(canvas.ids.shape[1]))
        self._check(canvas)
        self.width = canvas.width
        self.endless = bool((canvas.ends_from > 0).any())  # whether there are places for no end token
        self.seeing = States(canvas, settings.mask_id, reuse=settings.reuse)
        self.blind = States(canvas, settings.mask_id, blind=True, reuse=settings.reuse)
        self.memo = Memo(canvas)

    def _check(self, canvas: Canvas) -> None:
        """Whether there are enough steps for the rows' stages."""
        most = int(self.window.stages(canvas.start, canvas.end).max())
        if self.settings.steps is not None and self.settings.steps < most:
            raise ConfigError(
                f"{self.settings.steps} steps are too few for {most} blocks; each block needs at least one"
            )

    def join(self, canvas: Canvas) -> None:
        """More rows, behind those that are there."""
        self._check(canvas)
        self._follow(Canvas.join([self.canvas, canvas]))

    def keep(self, rows: torch.Tensor) -> None:
        """Keep the rows [b], given in rising order."""
        self._follow(self.canvas.take(rows), rows)

    def _follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        self.canvas, self.width = canvas, canvas.width
        self.endless = bool((canvas.ends_from > 0).any())
        for kept in (self.seeing, self.blind, self.memo):
            kept.follow(canvas, rows)

    @property
    def finished(self) -> bool:
        """Whether all rows are done."""
        return bool(self.canvas.done.all())

    # ---- one step ------------------------------------------------------------------------------------

    def work(self) -> list[Asking]:
        """The next step of every row that is not done, as work to be done beside that of other lanes."""
        canvas, steps = self.canvas, self.settings.steps
        rows = (~canvas.done).nonzero()[:, 0]
        if len(rows) == 0:
            return []
        late = torch.zeros_like(rows, dtype=torch.bool) if steps is None else canvas.step[rows] >= steps
        if self.settings.grow:
            if bool(late.any()):
                self._grow(rows[late], int(canvas.end.max()))
            self.width = canvas.width
        pieces = []
        if not bool(late.all()):
            pieces.append(self._step(rows[~late]))
        if bool(late.any()):
            pieces.append(self._finish(rows[late]))
        return pieces

    def _step(self, rows: torch.Tensor) -> Asking:
        """Take one step of the rows [b]."""
        canvas, rule = self.canvas, self.decoder.reveal
        unwritten = self._cut(canvas.masked, rows)
        at = self._clock(rows, unwritten)
        scope = self.window.scope(canvas.start[rows], at.stage, self.width)
        t, s, inside = self.window.times(at.t, at.s, canvas.start[rows], canvas.end[rows], self.width)
        masked = unwritten & scope & inside
        weight = self._weights(rows, masked, at)
        quota = self._quota(rows, scope, at)
        needs = rule.needs(masked, weight, quota)
        if rule.kind == "mass" and self.decoder.tokens.keeps_all:
            score = torch.ones(needs.shape)  # without asking the model
        else:
            yield from self._learn(rows, needs)
            score = torch.where(needs, self._cut(self.memo.score, rows), 0.0)
        step = canvas.step[rows]
        decision = rule.decide(
            StepView(
                masked=masked,
                weight=weight,
                score=score,
                t=t,
                s=s,
                quota=quota,
                written=~unwritten & ~self._cut(canvas.pinned, rows) & scope,
                beyond=self._beyond(rows),
                noise=self._noise(rows, _REVEAL),
                noise_remask=self._noise(rows, _REMASK) if rule.remasks else None,
                rate=self.settings.rate,
            )
        )
        yield from self._learn(rows, decision.reveal)
        self._write(rows, step, decision.reveal, decision.remask)
        canvas.step[rows] = step + 1
        if self.settings.grow:
            self._grow(rows, self.window.ahead + self.settings.margin)

    def _finish(self, rows: torch.Tensor) -> Asking:
        """The last denoising pass: every position that is still masked gets its token."""
        masked = self._cut(self.canvas.masked, rows)
        yield from self._learn(rows, masked)
        self._write(rows, self.canvas.step[rows], masked, None)
        self.canvas.step[rows] += 1
        self.canvas.done[rows] = True

    def _grow(self, rows: torch.Tensor, ahead: int) -> None:
        """Give the rows [b] masks on the right; none where an EOS has closed them."""
        ended = self.canvas.ended(rows, self.settings.eos_id)
        if self.settings.rate is None and not self.settings.eos_fill:
            over = self.canvas.done[rows] & self.settings.early_exit
            ended = ended & over if not self.decoder.reveal.remasks else torch.zeros_like(ended)
        self.canvas.grow(rows, ahead, closed=ended)

    def _cut(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [b, W]: some rows, as far as the canvas reaches now."""
        return x[rows, : self.width]

    def _clock(self, rows: torch.Tensor, masked: torch.Tensor) -> Clock:
        """Stage and times of the rows; with a rate only the stage means something."""
        canvas = self.canvas
        if self.settings.steps is not None:
            stages = self.window.stages(canvas.start[rows], canvas.end[rows])
            return clock(canvas.step[rows], self.settings.steps, stages)
        stage = self.window.current(masked, canvas.start[rows])
        one = torch.ones(len(rows), dtype=torch.float64)
        return Clock(stage, one, 0 * one, torch.zeros_like(stage), torch.ones_like(stage))

    def _weights(self, rows: torch.Tensor, masked: torch.Tensor, at: Clock) -> torch.Tensor:
        """[b, W] window weights; all ones in a row whose masked positions are all shut."""
        canvas = self.canvas
        unmasked = ~self._cut(canvas.masked, rows) & self._cut(canvas.valid, rows)
        weight = self.window.weights(unmasked, start=canvas.start[rows], stage=at.stage)
        open_somewhere = (masked & (weight > 0)).any(1, keepdim=True)
        return torch.where(open_somewhere, weight, 1.0)

    def _quota(self, rows: torch.Tensor, scope: torch.Tensor, at: Clock) -> torch.Tensor:
        """[b] this step's even share of the positions that the stage had at first, or of the rate."""
        canvas = self.canvas
        if self.settings.rate is not None:
            step = canvas.step[rows].double()
            return (((step + 1) * self.settings.rate).floor() - (step * self.settings.rate).floor()).long()
        if self.settings.grow:  # positions that have yet to grow belong to the stage as well
            scope = self.window.scope(canvas.start[rows], at.stage, canvas.ids.shape[1])
        total = (canvas.initial[rows, : scope.shape[1]] & scope).sum(1)
        return total // at.count + (at.index < total % at.count)

    def _beyond(self, rows: torch.Tensor) -> torch.Tensor | None:
        """[b] masks of the process that a growing canvas does not hold yet; None where there are none."""
        if not self.settings.grow or self.settings.rate is not None:
            return None
        canvas = self.canvas
        closed = canvas.ended(rows, self.settings.eos_id) & self.settings.eos_fill
        return torch.where(closed, 0, canvas.end[rows] - canvas.valid[rows].sum(1))

    def _noise(self, rows: torch.Tensor, stream: int) -> torch.Tensor:
        """[b, W] uniform numbers: a function of (row key, step, stream, position) alone."""
        position = torch.arange(self.width)
        key = fold(fold(self.canvas.key[rows], self.canvas.step[rows]), stream)
        return uniform(key[:, None], position)

    # ---- the model -----------------------------------------------------------------------------------

    def _learn(self, rows: torch.Tensor, where: torch.Tensor) -> Asking:
        """Find out, where it is not known, which token `where` [b, W] receives and how sure the model is.

        What was found on the model's device comes back in one piece: the one time in a step that the host
        waits for it.
        """
        missing = where & ~self._cut(self.memo.known, rows)
        asked = missing.any(1)
        if not bool(asked.any()):
            return
        some, part = rows[asked], missing[asked]
        yield self._asks(some, part)
        given = self._drawn_with(some, part).split(_CELLS)
        found = [self._looked_at(*each) for each in zip(self._logits(some, part), given, strict=True)]
        score, token, probability = torch.cat(found, dim=1).cpu()
        self._check_numbers(some, part, score + probability)
        self.memo.put(some, part, score.float(), token.long(), probability.float())

    def _drawn_with(self, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """[N] what the tokens at `where` [b, W] are drawn with: uniform numbers."""
        return self._noise(rows, _TOKEN)[where]

    def _looked_at(self, logits: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """[N, V] and what `_drawn_with` says -> [3, N] float64: score, token, and the token's probability."""
        tokens, kind = self.decoder.tokens, self.decoder.reveal.kind
        choice = tokens.choose(logits, sent(given, logits.device))
        if kind == "mass":
            score = choice.mass
        else:
            score = choice.probability if kind == "confidence" else tokens.certainty(logits, kind)
        return torch.stack([score.double(), choice.token.double(), choice.probability.double()])

    def _asks(self, rows: torch.Tensor, where: torch.Tensor) -> list[Ask]:
        asks = [Ask(self.seeing, rows, where)]
        return [*asks, Ask(self.blind, rows, where)] if self.decoder.guidance else asks

    def _logits(self, rows: torch.Tensor, where: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits [≤ _CELLS, V] of the positions `where` [b, W], in row-major order, a piece at a time."""
        tokens, guidance = self.decoder.tokens, self.decoder.guidance
        owner, position = where.nonzero().unbind(1)  # which of the rows each cell belongs to, and where
        cells = self.seeing.of(rows[owner], position)
        blind = self.blind.of(rows[owner], position).split(_CELLS) if guidance else itertools.repeat(None)
        endless = sent(position < self.canvas.ends_from[rows][owner], cells.device)
        owner = sent(owner, cells.device)
        seen: torch.Tensor | None = None
        each = zip(cells.split(_CELLS), blind, owner.split(_CELLS), endless.split(_CELLS), strict=False)
        for hidden, unseen, row, shut in each:
            logits = self.model.logits(hidden)
            if self.endless:
                logits[:, self.settings.eos_id].masked_fill_(shut, -math.inf)
            if unseen is not None:
                logits = guided(logits, self.model.logits(unseen), guidance)
            if tokens.repetition_penalty != 1:
                seen = self._seen(rows, logits) if seen is None else seen
                logits = tokens.penalised(logits, seen[row])
            yield logits

    def _seen(self, rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """[b, V] bool, the tokens that a row holds; never the end token, which templates hold too."""
        known = self._cut(self.canvas.valid & ~self.canvas.masked, rows)
        ids = torch.where(known, self._cut(self.canvas.ids, rows), self.settings.mask_id)
        seen = torch.zeros(len(rows), logits.shape[1], dtype=torch.bool, device=logits.device)
        seen.scatter_(1, sent(ids, logits.device), True)
        seen[:, self.settings.eos_id] = False
        return seen

    def _check_numbers(self, rows: torch.Tensor, where: torch.Tensor, value: torch.Tensor) -> None:
        """Whether `value` [N], found at the positions `where` [b, W], holds NaN."""
        bad = value.isnan()
        if bool(bad.any()):
            row = int(rows[where.nonzero()[bad.nonzero()[0, 0], 0]])
            raise BrokenRowError(self, row, int(self.canvas.step[row]))

    # ---- writing -------------------------------------------------------------------------------------

    def _write(
        self,
        rows: torch.Tensor,
        step: torch.Tensor,
        reveal: torch.Tensor,
        remask: torch.Tensor | None,
    ) -> None:
        """Put tokens on the canvas, fill behind an EOS, and see which rows are finished."""
        canvas, eos = self.canvas, self.settings.eos_id
        ids, masked = self._cut(canvas.ids, rows), self._cut(canvas.masked, rows)
        ids = torch.where(reveal, self._cut(self.memo.token, rows), ids)
        after = masked & ~reveal
        if remask is not None:
            ids = torch.where(remask, self.settings.mask_id, ids)
            after = after | remask
        free = ~self._cut(canvas.pinned, rows)
        ended = (ids == eos) & free & ~after
        behind = (ended.cumsum(1) - ended.int() > 0) & free  # strictly right of the first EOS
        if self.settings.eos_fill:
            ids = torch.where(behind, eos, ids)
            after = after & ~behind
        finished = ~after.any(1)
        if self.settings.early_exit and not self.decoder.reveal.remasks:
            first = torch.where(ended.any(1), ended.int().argmax(1), -1)
            position = torch.arange(ids.shape[1])
            waiting = (after & (position < first[:, None])).any(1)
            finished |= (first >= 0) & ~waiting
            closed = finished[:, None] & after
            ids, after = torch.where(closed, eos, ids), after & ~closed
        probability = torch.where(reveal & ~after, self._cut(self.memo.probability, rows), torch.nan)
        self._note(rows, step, masked & ~after, after, probability)
        same = (ids == self._cut(canvas.ids, rows)).all(1)
        for kept in (self.seeing, self.blind, self.memo):
            kept.forget(rows, same)
        canvas.ids[rows, : self.width], canvas.masked[rows, : self.width] = ids, after
        if not self.decoder.reveal.remasks:
            canvas.done[rows] = finished

    def _note(
        self,
        rows: torch.Tensor,
        step: torch.Tensor,
        appeared: torch.Tensor,
        masked: torch.Tensor,
        probability: torch.Tensor,
    ) -> None:
        """Record when tokens appeared and how probable they were; forget those that are masked again."""
        canvas = self.canvas
        for field, new, none in (
            (canvas.reveal_step, step[:, None], -1),
            (canvas.confidence, probability, torch.nan),
        ):
            old = self._cut(field, rows)
            field[rows, : self.width] = torch.where(masked, none, torch.where(appeared, new, old))
