"""The denoising loop: the one place where masks become tokens.

Every row has its own time, normaliser, noise stream and stopping point; rows share nothing but the model
call. Savings taken here never change the result: the LM head sees only positions whose score can matter, a
row that did not change since its last model call is not computed again, and a finished row leaves the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from decoding.presets import Decoder
from decoding.reveal import StepView
from decoding.tokens import Certainty
from decoding.window import Window
from dlm.errors import ConfigError, DLMError
from dlm.noise import fold, uniform

_REVEAL, _TOKEN, _REMASK = 0, 1, 2
"""Streams of noise within a step."""


GROWING_WINDOW = 256
"""Length for which kernels and blocks of open size are chosen on a canvas that has no length of its own."""

_CELLS = 1024
"""Positions whose logits [cells, V] are in memory at once."""


class Denoiser(Protocol):
    """What the loop needs of a model; `MaskedDiffusionModel` has it, and tests bring their own."""

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L] -> [B, L, D]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V], the mask column -inf."""
        ...


@dataclass
class Canvas:
    """Rows that are being written, with all the state that decoding keeps. One tensor row per text."""

    ids: torch.Tensor
    """[B, L] int64; the mask token where nothing is written yet."""
    masked: torch.Tensor
    """[B, L] bool, positions to be written."""
    pinned: torch.Tensor
    """[B, L] bool, given positions, which no rule ever changes; padding counts as pinned."""
    valid: torch.Tensor
    """[B, L] bool, False at padding (right)."""
    start: torch.Tensor
    """[B] int64, the first position to be written."""
    key: torch.Tensor
    """[B] int64, key of the row's noise stream."""
    end: torch.Tensor
    """[B] int64, where a row may not grow beyond; everything valid lies before it."""
    reveal_step: torch.Tensor = field(init=False)
    """[B, L] int64, step at which each token appeared; -1 for given ones."""
    model_calls: torch.Tensor = field(init=False)
    """[B] int64, model calls that ran the row."""
    done: torch.Tensor = field(init=False)
    """[B] bool."""

    def __post_init__(self) -> None:
        """Start with nothing revealed."""
        self.reveal_step = torch.full_like(self.ids, -1)
        self.model_calls = torch.zeros_like(self.start)
        self.done = ~self.masked.any(1)

    @classmethod
    def of(
        cls,
        ids: torch.Tensor,
        mask_id: int,
        key: torch.Tensor,
        valid: torch.Tensor | None = None,
        ahead: int | None = None,
    ) -> Canvas:
        """A canvas from rows [B, L] in which the mask token marks what is to be written.

        Args:
            ids: [B, L] int64.
            mask_id: id of the mask token.
            key: [B] int64 noise keys.
            valid: [B, L] bool, False at right padding.
            ahead: for a canvas that grows, how many of the masks are there at first; None for all.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        start = ((ids == mask_id) & valid).int().argmax(1)
        end = valid.sum(1)
        if ahead is not None:
            valid = valid & (torch.arange(ids.shape[1], device=ids.device) < (start + ahead)[:, None])
        masked = (ids == mask_id) & valid
        return cls(ids.clone(), masked, ~masked, valid, start, key, end)

    @property
    def width(self) -> int:
        """Positions that at least one unfinished row has."""
        reached = self.valid[~self.done].any(0)
        return int(reached.nonzero()[-1]) + 1 if bool(reached.any()) else self.ids.shape[1]

    def grow(self, rows: torch.Tensor, ahead: int, eos_id: int) -> None:
        """Give the rows [b] new masks on the right until they have `ahead`; none once an EOS is written."""
        position = torch.arange(self.ids.shape[1], device=self.ids.device)
        valid, masked = self.valid[rows], self.masked[rows]
        ended = (~masked & ~self.pinned[rows] & (self.ids[rows] == eos_id)).any(1)
        reach = torch.minimum(valid.sum(1) + ahead - masked.sum(1), self.end[rows])
        new = (position < torch.where(ended, 0, reach)[:, None]) & ~valid
        self.valid[rows] |= new
        self.masked[rows] |= new
        self.pinned[rows] &= ~new
        self.done[rows] &= ~new.any(1)


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
        grow: whether the canvas begins with a few masks and grows as they are written.
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
    fit: int | None = None

    def __post_init__(self) -> None:
        """Check the pace."""
        if (self.steps is None) == (self.rate is None):
            raise ConfigError(f"give either steps or a rate, got steps={self.steps} and rate={self.rate}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if self.rate is not None and not 1 <= self.rate < math.inf:
            raise ConfigError(f"rate must be at least 1 token per model call, got {self.rate}")
        if self.grow and self.rate is None:
            raise ConfigError("a canvas that grows has no number of steps; give a rate")


@dataclass(frozen=True)
class Clock:
    """Where a row stands in time; all [B]."""

    stage: torch.Tensor
    t: torch.Tensor
    s: torch.Tensor
    index: torch.Tensor
    """Step within the stage."""
    count: torch.Tensor
    """Steps of the stage."""


def clock(step: int, steps: int, stages: torch.Tensor) -> Clock:
    """The stage and times of step number `step`, for rows with `stages` [B] stages sharing `steps`.

    Stage j runs from step ⌊jS/b⌋ to ⌊(j+1)S/b⌋ and its own time from 1 to 0.
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
        ConfigError: when there are fewer steps than stages (blocks), and for a rate with a rule that remasks.
        DLMError: when the model returns NaN, naming the step and the row.
    """
    run = _Run(model, canvas, decoder, settings)
    steps = itertools.count() if settings.steps is None else range(settings.steps)
    for step in steps:
        rows = (~canvas.done).nonzero()[:, 0]
        if len(rows) == 0:
            return
        run.step(step, rows)
        yield step
    rows = (~canvas.done).nonzero()[:, 0]
    if len(rows):
        run.finish(len(steps), rows)  # type: ignore[arg-type]
        yield len(steps)  # type: ignore[arg-type]


def guided(logits: torch.Tensor, blind: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance: log p + g · (log p - log p without the prompt), [N, V] float32, unnormalised.

    g = 0 is the model itself; larger values favour what the prompt makes likelier (arXiv 2207.12598).
    """
    with_prompt, without = logits.float().log_softmax(1), blind.float().log_softmax(1)
    mixed = with_prompt + guidance * (with_prompt - without)
    return torch.where(with_prompt > -math.inf, mixed, -math.inf)


class _States:
    """Hidden states of the rows of a canvas, computed again for those that have changed since."""

    def __init__(self, model: Denoiser, canvas: Canvas) -> None:
        self.model, self.canvas = model, canvas
        self.hidden: torch.Tensor | None = None  # [B, ≤ L, D]
        self.fresh = torch.zeros_like(canvas.done)  # [B] whether `hidden` still holds

    def of(self, rows: torch.Tensor, ids: torch.Tensor, width: int) -> torch.Tensor:
        """[b, W, D] of the rows [b]; `ids` [B, L] are what the model is shown, as far as `width`."""
        canvas = self.canvas
        stale = rows[~self.fresh[rows]]
        if len(stale):
            valid = canvas.valid[stale, :width]
            states = self.model.hidden(ids[stale, :width], None if bool(valid.all()) else valid)
            canvas.model_calls[stale] += 1
            self.fresh[stale] = True
            if len(stale) == len(canvas.ids):
                self.hidden = states
            else:
                self._room(states, width)[stale, :width] = states
        assert self.hidden is not None
        whole = len(rows) == len(canvas.ids) and width == self.hidden.shape[1]
        return self.hidden if whole else self._room(self.hidden, width)[rows, :width]

    def _room(self, like: torch.Tensor, width: int) -> torch.Tensor:
        """The kept states [B, ≥ W, D], made wider when the canvas has grown."""
        if self.hidden is None or self.hidden.shape[1] < width:
            wide = like.new_zeros(len(self.canvas.ids), width, like.shape[-1])
            if self.hidden is not None:
                wide[:, : self.hidden.shape[1]] = self.hidden
            self.hidden = wide
        return self.hidden


class _Run:
    """One pass over a canvas: the loop's caches and its arithmetic."""

    def __init__(self, model: Denoiser, canvas: Canvas, decoder: Decoder, settings: Settings) -> None:
        length = canvas.ids.shape[1]
        if settings.rate is not None and decoder.reveal.remasks:
            raise ConfigError(f"decoder {decoder.name!r} remasks by time: it needs steps, not a rate")
        self.model, self.canvas, self.decoder, self.settings = model, canvas, decoder, settings
        self.window: Window = decoder.window.fitted(
            settings.fit or (GROWING_WINDOW if settings.grow else length)
        )
        self.stages = self.window.stages(canvas.start, canvas.end)
        self.width = canvas.width
        self.initial = canvas.masked.clone()
        self.seeing, self.blind = _States(model, canvas), _States(model, canvas)
        self.score = torch.zeros(canvas.ids.shape, device=canvas.ids.device)  # [B, L]
        self.scored = torch.zeros_like(canvas.masked)  # [B, L] whether `score` still holds
        most = int(self.stages.max())
        if settings.steps is not None and settings.steps < most:
            raise ConfigError(
                f"{settings.steps} steps are too few for {most} blocks; each block needs at least one"
            )

    # ---- one step ------------------------------------------------------------------------------------

    def step(self, step: int, rows: torch.Tensor) -> None:
        """Take one step of the rows [b] given by number."""
        canvas, rule = self.canvas, self.decoder.reveal
        self.width = canvas.width if self.settings.grow else self.width
        unwritten = self._cut(canvas.masked, rows)
        at = self._clock(step, rows, unwritten)
        scope = self.window.scope(canvas.start[rows], at.stage, self.width)
        masked = unwritten & scope
        weight = self._weights(rows, masked, at)
        quota = self._quota(step, rows, scope, at)
        needs = rule.needs(masked, weight, quota)
        token = None
        if rule.kind == "mass":
            score = self._mass(step, rows, needs)
        else:
            token, score = self._tokens(step, rows, needs)
        decision = rule.decide(
            StepView(
                masked=masked,
                weight=weight,
                score=score,
                t=at.t,
                s=at.s,
                quota=quota,
                written=~unwritten & ~self._cut(canvas.pinned, rows) & scope,
                noise=self._noise(step, rows, _REVEAL),
                noise_remask=self._noise(step, rows, _REMASK) if rule.remasks else None,
                rate=self.settings.rate,
            )
        )
        reveal = decision.reveal
        if token is None:
            token, _ = self._tokens(step, rows, reveal)
        self._write(step, rows, reveal, token, decision.remask)
        if self.settings.grow:
            canvas.grow(rows, self.window.ahead, self.settings.eos_id)

    def _cut(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [b, W]: some rows, as far as the canvas reaches now."""
        return x[rows, : self.width]

    def _clock(self, step: int, rows: torch.Tensor, masked: torch.Tensor) -> Clock:
        """Stage and times of the rows; with a rate only the stage means something."""
        if self.settings.steps is not None:
            return clock(step, self.settings.steps, self.stages[rows])
        stage = self.window.current(masked, self.canvas.start[rows])
        one = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        return Clock(stage, one, 0 * one, torch.zeros_like(stage), torch.ones_like(stage))

    def finish(self, step: int, rows: torch.Tensor) -> None:
        """The last denoising pass: every position that is still masked gets its token."""
        masked = self._cut(self.canvas.masked, rows)
        token, _ = self._tokens(step, rows, masked)
        self._write(step, rows, masked, token, None)
        self.canvas.done[rows] = True

    def _weights(self, rows: torch.Tensor, masked: torch.Tensor, at: Clock) -> torch.Tensor:
        """[b, L] window weights; all ones in a row whose masked positions are all shut."""
        canvas = self.canvas
        unmasked = ~self._cut(canvas.masked, rows) & self._cut(canvas.valid, rows)
        weight = self.window.weights(unmasked, start=canvas.start[rows], stage=at.stage)
        open_somewhere = (masked & (weight > 0)).any(1, keepdim=True)
        return torch.where(open_somewhere, weight, 1.0)

    def _quota(self, step: int, rows: torch.Tensor, scope: torch.Tensor, at: Clock) -> torch.Tensor:
        """[b] this step's even share of the positions that the stage had at first, or of the rate."""
        if self.settings.rate is not None:
            share = math.floor((step + 1) * self.settings.rate) - math.floor(step * self.settings.rate)
            return torch.full_like(at.stage, share)
        total = (self._cut(self.initial, rows) & scope).sum(1)
        return total // at.count + (at.index < total % at.count)

    def _noise(self, step: int, rows: torch.Tensor, stream: int) -> torch.Tensor:
        """[b, L] uniform numbers: a function of (row key, step, stream, position) alone."""
        position = torch.arange(self.width, device=rows.device)
        return uniform(fold(fold(self.canvas.key[rows], step), stream)[:, None], position)

    # ---- the model -----------------------------------------------------------------------------------

    def _mass(self, step: int, rows: torch.Tensor, needs: torch.Tensor) -> torch.Tensor:
        """[b, L] mass kept by the token rule; 1 without asking the model if the rule cuts nothing."""
        if self.decoder.tokens.keeps_all:
            return torch.ones(needs.shape, device=needs.device)
        missing = needs & ~self._cut(self.scored, rows)
        asked = missing.any(1)
        if bool(asked.any()):
            some, part = rows[asked], missing[asked]
            mass = torch.cat([self.decoder.tokens.mass(logits) for logits in self._logits(some, part)])
            score = self._cut(self.score, some)
            score[part] = self._checked(step, some, part, mass)
            self.score[some, : self.width] = score
            self.scored[some, : self.width] |= part
        return self._cut(self.score, rows)

    def _tokens(
        self, step: int, rows: torch.Tensor, where: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a token at the positions `where` [b, L]; returns tokens and confidences, both [b, L]."""
        token = torch.full(where.shape, self.settings.mask_id, device=where.device)
        confidence = torch.zeros(where.shape, device=where.device)
        asked = where.any(1)
        if bool(asked.any()):
            part, some = where[asked], rows[asked]
            kind = self.decoder.reveal.kind
            by: Certainty = "confidence" if kind == "mass" else kind
            noise = self._noise(step, some, _TOKEN)[part].split(_CELLS)
            choices = [
                self.decoder.tokens.choose(logits, u, by)
                for logits, u in zip(self._logits(some, part), noise, strict=True)
            ]
            token[where] = torch.cat([choice.token for choice in choices])
            confidences = torch.cat([choice.score for choice in choices])
            confidence[where] = self._checked(step, some, part, confidences)
        return token, confidence

    def _logits(self, rows: torch.Tensor, where: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits [≤ _CELLS, V] of the positions `where` [b, W], in row-major order, a piece at a time."""
        tokens, guidance = self.decoder.tokens, self.decoder.guidance
        cells = self._states(rows)[where].split(_CELLS)
        blind = self._blind_states(rows)[where].split(_CELLS) if guidance else [None] * len(cells)
        owner = where.nonzero()[:, 0].split(_CELLS)  # which of the rows each cell belongs to
        seen: torch.Tensor | None = None
        for hidden, unseen, row in zip(cells, blind, owner, strict=True):
            logits = self.model.logits(hidden)
            if unseen is not None:
                logits = guided(logits, self.model.logits(unseen), guidance)
            if tokens.repetition_penalty != 1:
                seen = self._seen(rows, logits.shape[1]) if seen is None else seen
                logits = tokens.penalised(logits, seen[row])
            yield logits

    def _seen(self, rows: torch.Tensor, vocab: int) -> torch.Tensor:
        """[b, V] bool, the tokens that a row holds; never the end token, which templates hold too."""
        known = self._cut(self.canvas.valid & ~self.canvas.masked, rows)
        ids = torch.where(known, self._cut(self.canvas.ids, rows), self.settings.mask_id)
        seen = torch.zeros(len(rows), vocab, dtype=torch.bool, device=rows.device)
        seen.scatter_(1, ids, True)
        seen[:, self.settings.eos_id] = False
        return seen

    def _states(self, rows: torch.Tensor) -> torch.Tensor:
        """[b, W, D] hidden states of the rows as they are."""
        return self.seeing.of(rows, self.canvas.ids, self.width)

    def _blind_states(self, rows: torch.Tensor) -> torch.Tensor:
        """[b, W, D] hidden states of the rows with their prompts masked."""
        position = torch.arange(self.canvas.ids.shape[1], device=rows.device)
        prompt = position < self.canvas.start[:, None]
        ids = torch.where(prompt & self.canvas.valid, self.settings.mask_id, self.canvas.ids)
        return self.blind.of(rows, ids, self.width)

    def _checked(
        self, step: int, rows: torch.Tensor, where: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """`value` [N] unless it holds NaN."""
        bad = value.isnan()
        if bool(bad.any()):
            row = int(rows[where.nonzero()[bad.nonzero()[0, 0], 0]])
            raise DLMError(f"the model returned NaN in step {step}, row {row}")
        return value

    # ---- writing -------------------------------------------------------------------------------------

    def _write(
        self,
        step: int,
        rows: torch.Tensor,
        reveal: torch.Tensor,
        token: torch.Tensor,
        remask: torch.Tensor | None,
    ) -> None:
        """Put tokens on the canvas, fill behind an EOS, and see which rows are finished."""
        canvas, eos = self.canvas, self.settings.eos_id
        ids, masked = self._cut(canvas.ids, rows), self._cut(canvas.masked, rows)
        born = self._cut(canvas.reveal_step, rows)
        ids = torch.where(reveal, token, ids)
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
            position = torch.arange(ids.shape[1], device=ids.device)
            waiting = (after & (position < first[:, None])).any(1)
            finished |= (first >= 0) & ~waiting
            closed = finished[:, None] & after
            ids, after = torch.where(closed, eos, ids), after & ~closed
        appeared = masked & ~after
        canvas.reveal_step[rows, : self.width] = torch.where(after, -1, torch.where(appeared, step, born))
        same = (ids == self._cut(canvas.ids, rows)).all(1)
        self.seeing.fresh[rows] &= same
        self.blind.fresh[rows] &= same
        self.scored[rows] &= same[:, None]
        canvas.ids[rows, : self.width], canvas.masked[rows, : self.width] = ids, after
        if not self.decoder.reveal.remasks:
            canvas.done[rows] = finished
