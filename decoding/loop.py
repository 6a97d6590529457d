"""The denoising loop: the one place where masks become tokens.

Every row has its own time, normaliser, noise stream and stopping point; rows share nothing but the model
call. Savings taken here never change the result: the LM head sees only positions whose score can matter, a
row that did not change since its last model call is not computed again, and a finished row leaves the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from decoding.presets import Decoder
from decoding.reveal import StepView
from decoding.window import Window
from dlm.errors import ConfigError, DLMError
from dlm.noise import fold, uniform

_REVEAL, _TOKEN, _REMASK = 0, 1, 2
"""Streams of noise within a step."""


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
        cls, ids: torch.Tensor, mask_id: int, key: torch.Tensor, valid: torch.Tensor | None = None
    ) -> Canvas:
        """A canvas from rows [B, L] in which the mask token marks what is to be written.

        Args:
            ids: [B, L] int64.
            mask_id: id of the mask token.
            key: [B] int64 noise keys.
            valid: [B, L] bool, False at right padding.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        masked = (ids == mask_id) & valid
        start = masked.int().argmax(1)
        return cls(ids.clone(), masked, ~masked, valid, start, key)


@dataclass(frozen=True)
class Settings:
    """How one request is decoded.

    Attributes:
        steps: S, denoising steps; the final pass that fills what is left comes on top.
        eos_id: id that ends an answer.
        mask_id: id of the mask token.
        eos_fill: once an EOS is written, everything to its right becomes EOS.
        early_exit: stop a row when everything before its first EOS is written (exact: no later step could
            change the answer). Not used by rules that remask.
    """

    steps: int
    eos_id: int
    mask_id: int
    eos_fill: bool = True
    early_exit: bool = True

    def __post_init__(self) -> None:
        """Check the number of steps."""
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")


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
    token ever comes out; it is yielded as step number `settings.steps`.

    Raises:
        ConfigError: when there are fewer steps than stages (blocks).
        DLMError: when the model returns NaN, naming the step and the row.
    """
    run = _Run(model, canvas, decoder, settings)
    for step in range(settings.steps):
        rows = (~canvas.done).nonzero()[:, 0]
        if len(rows) == 0:
            return
        run.step(step, rows)
        yield step
    rows = (~canvas.done).nonzero()[:, 0]
    if len(rows):
        run.finish(settings.steps, rows)
        yield settings.steps


class _Run:
    """One pass over a canvas: the loop's caches and its arithmetic."""

    def __init__(self, model: Denoiser, canvas: Canvas, decoder: Decoder, settings: Settings) -> None:
        length = canvas.ids.shape[1]
        self.model, self.canvas, self.decoder, self.settings = model, canvas, decoder, settings
        self.window: Window = decoder.window.fitted(length)
        self.stages = self.window.stages(canvas.start, length)
        self.initial = canvas.masked.clone()
        self.fresh = torch.zeros_like(canvas.done)  # [B] whether `hidden` still holds
        self.score = torch.zeros(canvas.ids.shape, device=canvas.ids.device)  # [B, L]
        self.scored = torch.zeros_like(canvas.masked)  # [B, L] whether `score` still holds
        self.hidden: torch.Tensor | None = None  # [B, L, D]
        most = int(self.stages.max())
        if settings.steps < most:
            raise ConfigError(
                f"{settings.steps} steps are too few for {most} blocks; each block needs at least one"
            )

    # ---- one step ------------------------------------------------------------------------------------

    def step(self, step: int, rows: torch.Tensor) -> None:
        """Take one step of the rows [b] given by number."""
        canvas, rule = self.canvas, self.decoder.reveal
        at = clock(step, self.settings.steps, self.stages[rows])
        scope = self.window.scope(canvas.start[rows], at.stage, canvas.ids.shape[1])
        masked = canvas.masked[rows] & scope
        weight = self._weights(rows, masked, at)
        quota = self._quota(rows, scope, at)
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
                written=~canvas.masked[rows] & ~canvas.pinned[rows] & scope,
                noise=self._noise(step, rows, _REVEAL),
                noise_remask=self._noise(step, rows, _REMASK) if rule.remasks else None,
            )
        )
        reveal = decision.reveal
        if token is None:
            token, _ = self._tokens(step, rows, reveal)
        self._write(step, rows, reveal, token, decision.remask)

    def finish(self, step: int, rows: torch.Tensor) -> None:
        """The last denoising pass: every position that is still masked gets its token."""
        masked = self.canvas.masked[rows]
        token, _ = self._tokens(step, rows, masked)
        self._write(step, rows, masked, token, None)
        self.canvas.done[rows] = True

    def _weights(self, rows: torch.Tensor, masked: torch.Tensor, at: Clock) -> torch.Tensor:
        """[b, L] window weights; all ones in a row whose masked positions are all shut (METHOD: w = 1)."""
        canvas = self.canvas
        unmasked = ~canvas.masked[rows] & canvas.valid[rows]
        weight = self.window.weights(unmasked, start=canvas.start[rows], stage=at.stage)
        open_somewhere = (masked & (weight > 0)).any(1, keepdim=True)
        return torch.where(open_somewhere, weight, 1.0)

    def _quota(self, rows: torch.Tensor, scope: torch.Tensor, at: Clock) -> torch.Tensor:
        """[b] this step's even share of the positions that the stage had at first."""
        total = (self.initial[rows] & scope).sum(1)
        return total // at.count + (at.index < total % at.count)

    def _noise(self, step: int, rows: torch.Tensor, stream: int) -> torch.Tensor:
        """[b, L] uniform numbers: a function of (row key, step, stream, position) alone."""
        position = torch.arange(self.canvas.ids.shape[1], device=rows.device)
        return uniform(fold(fold(self.canvas.key[rows], step), stream)[:, None], position)

    # ---- the model -----------------------------------------------------------------------------------

    def _mass(self, step: int, rows: torch.Tensor, needs: torch.Tensor) -> torch.Tensor:
        """[b, L] mass kept by the token rule; 1 without asking the model if the rule cuts nothing."""
        if self.decoder.tokens.keeps_all:
            return torch.ones(needs.shape, device=needs.device)
        missing = needs & ~self.scored[rows]
        asked = missing.any(1)
        if bool(asked.any()):
            some, part = rows[asked], missing[asked]
            cells = self._states(some)[part].split(_CELLS)
            mass = torch.cat([self.decoder.tokens.mass(self.model.logits(h)) for h in cells])
            score = self.score[some]
            score[part] = self._checked(step, some, part, mass)
            self.score[some] = score
            self.scored[some] |= part
        return self.score[rows]

    def _tokens(
        self, step: int, rows: torch.Tensor, where: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a token at the positions `where` [b, L]; returns tokens and confidences, both [b, L]."""
        token = torch.full(where.shape, self.settings.mask_id, device=where.device)
        confidence = torch.zeros(where.shape, device=where.device)
        asked = where.any(1)
        if bool(asked.any()):
            part, some = where[asked], rows[asked]
            cells = self._states(some)[part].split(_CELLS)
            noise = self._noise(step, some, _TOKEN)[part].split(_CELLS)
            choices = [
                self.decoder.tokens.choose(self.model.logits(h), u) for h, u in zip(cells, noise, strict=True)
            ]
            token[where] = torch.cat([choice.token for choice in choices])
            confidences = torch.cat([choice.confidence for choice in choices])
            confidence[where] = self._checked(step, some, part, confidences)
        return token, confidence

    def _states(self, rows: torch.Tensor) -> torch.Tensor:
        """[b, L, D] hidden states, from the model for rows that have changed since their last call."""
        canvas = self.canvas
        stale = rows[~self.fresh[rows]]
        if len(stale):
            valid = canvas.valid[stale]
            states = self.model.hidden(canvas.ids[stale], None if bool(valid.all()) else valid)
            canvas.model_calls[stale] += 1
            self.fresh[stale] = True
            if len(stale) == len(canvas.ids):
                self.hidden = states
            else:
                if self.hidden is None:
                    self.hidden = states.new_zeros(len(canvas.ids), *states.shape[1:])
                self.hidden[stale] = states
        assert self.hidden is not None
        return self.hidden if len(rows) == len(canvas.ids) else self.hidden[rows]

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
        ids, masked = canvas.ids[rows], canvas.masked[rows]
        born = canvas.reveal_step[rows]
        ids = torch.where(reveal, token, ids)
        after = masked & ~reveal
        if remask is not None:
            ids = torch.where(remask, self.settings.mask_id, ids)
            after = after | remask
        free = ~canvas.pinned[rows]
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
        canvas.reveal_step[rows] = torch.where(after, -1, torch.where(appeared, step, born))
        same = (ids == canvas.ids[rows]).all(1)
        self.fresh[rows] &= same
        self.scored[rows] &= same[:, None]
        canvas.ids[rows], canvas.masked[rows] = ids, after
        if not self.decoder.reveal.remasks:
            canvas.done[rows] = finished
