"""The canvas: rows that are being written, with all the state that belongs to them.

A row is its canvas: whatever decides its text stands here, so that it can be moved to another batch or engine
between any two steps without changing the text. Hidden states and scores are caches beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from decoding.request import Plan
from dlm.noise import key_of

Rows = torch.Tensor | slice
"""Rows [b] of a canvas, as an index; the slice of all of them gives views, which cost nothing."""


@dataclass(frozen=True)
class Row:
    """One row, before it becomes part of a canvas."""

    ids: list[int]
    """The mask token where something is to be written."""
    answer_start: int
    """First position of the answer; what stands before it is the prompt."""
    name: str = "the row"
    """For errors: "prompt 3", "text 0"."""
    ends_from: int = 0
    """The first position at which an end token may be written."""

    def stages(self, plan: Plan) -> torch.Tensor:
        """[1] int64, stages (blocks) that the row goes through.

        Raises:
            ConfigError: when they are more than the plan has steps.
        """
        masks = [i for i, token in enumerate(self.ids) if token == plan.mask_id] or [0]
        stages = plan.decoder.window.stages(torch.tensor([masks[0]]), torch.tensor([masks[-1] + 1]))
        plan.pace.check_stages(int(stages))
        return stages

    def key(self, seed: int, mask_id: int) -> torch.Tensor:
        """Key [] of the row's noise: a function of the seed and the given tokens, whatever the window."""
        visible = [token for token in self.ids if token != mask_id]
        return key_of(int(seed), hashlib.blake2b(repr(visible).encode(), digest_size=8).digest())


@dataclass
class Canvas:
    """Rows that are being written. One tensor row per text; rows know nothing of each other.

    All of it lies on the host, whatever device the model is on. `make_canvas` makes one.
    """

    ids: torch.Tensor
    """[B, L] int64; the mask token where nothing is written yet."""
    masked: torch.Tensor
    """[B, L] bool, positions to be written."""
    pinned: torch.Tensor
    """[B, L] bool, given positions, which no rule ever changes; padding counts as pinned."""
    valid: torch.Tensor
    """[B, L] bool, False at padding (right)."""
    initial: torch.Tensor
    """[B, L] bool, positions that were to be written at first, those included that have yet to grow."""
    start: torch.Tensor
    """[B] int64, the first position to be written."""
    key: torch.Tensor
    """[B] int64, key of the row's noise stream."""
    end: torch.Tensor
    """[B] int64, where a row may not grow beyond; everything valid lies before it."""
    answer_start: torch.Tensor
    """[B] int64, where the answer begins, which may begin with given tokens; the prompt lies before it."""
    ends_from: torch.Tensor
    """[B] int64, the first position at which an end token may be written."""
    stages: torch.Tensor
    """[B] int64, stages (blocks) that the row goes through, each with its own time from 1 to 0."""
    alternatives: torch.Tensor
    """[B, L, k, 2] float64, the k likeliest tokens and their log-probabilities when a position was written
    (see `Output.top_logprobs`)."""
    reveal_step: torch.Tensor
    """[B, L] int64, step at which each token appeared; -1 for given ones."""
    confidence: torch.Tensor
    """[B, L] float32, the model's probability of each token when it was written (temperature 1, before any
    cut); NaN for given ones, and for end tokens that only fill up."""
    step: torch.Tensor
    """[B] int64, steps taken."""
    revision: torch.Tensor
    """[B] int64, how often the row has changed. The noise of tokens is keyed by it: what was drawn for a
    revision is the same whenever it is drawn."""
    version: torch.Tensor
    """[B] int64, how often the row has changed or grown; what is computed of it holds for one version."""
    model_calls: torch.Tensor
    """[B] int64, model calls that ran the row."""
    done: torch.Tensor
    """[B] bool."""
    failed: torch.Tensor
    """[B] int64, the step in which the model returned NaN for the row; -1 for none."""
    rule_state: dict[str, torch.Tensor] = field(default_factory=dict)
    """State of the reveal rule, by name: [B, L, …] or [B]."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)

    def fits(self, plan: Plan) -> bool:
        """True where the canvas keeps of a row what the plan needs."""
        state = plan.decoder.reveal.initial_state(0, self.ids.shape[1])
        shapes = {name: x.shape[1:] for name, x in self.rule_state.items()}
        return shapes == {name: x.shape[1:] for name, x in state.items()} and (
            self.alternatives.shape[2] == plan.top_logprobs
        )

    def grow(self, rows: torch.Tensor, ahead: int, closed: torch.Tensor) -> None:
        """Give the rows [b] new masks on the right until they have `ahead`; none to those `closed` [b]."""
        size = self.valid[rows].sum(1)
        reach = torch.minimum(size + ahead - self.masked[rows].sum(1), self.end[rows])
        grown = (reach > size) & ~closed
        if bool(grown.any()):
            place, position = rows[grown], torch.arange(self.ids.shape[1])
            new = (position >= size[grown][:, None]) & (position < reach[grown][:, None])
            self.valid[place] |= new
            self.masked[place] |= new
            self.pinned[place] &= ~new
            self.done[place] = False
            self.version[place] += 1

    def take(self, rows: Rows) -> Canvas:
        """The rows [b], as a canvas of their own; a slice of rows shares their memory."""
        state = {name: x[rows] for name, x in self.rule_state.items()}
        return Canvas(**{name: getattr(self, name)[rows] for name in _TENSORS}, rule_state=state)

    @classmethod
    def join(cls, canvases: Sequence[Canvas]) -> Canvas:
        """All rows of several canvases, padded on the right to the widest."""
        if len(canvases) == 1:
            return canvases[0]
        width = max(c.ids.shape[1] for c in canvases)
        fill = {"pinned": True, "reveal_step": -1, "confidence": torch.nan}

        def stacked(parts: list[torch.Tensor], padding: float) -> torch.Tensor:
            return torch.cat([x if x.dim() == 1 else resized(x, len(x), width, padding) for x in parts])

        values = {name: stacked([getattr(c, name) for c in canvases], fill.get(name, 0)) for name in _TENSORS}
        names = canvases[0].rule_state
        return cls(**values, rule_state={x: stacked([c.rule_state[x] for c in canvases], 0) for x in names})


_TENSORS = [field.name for field in fields(Canvas) if field.name != "rule_state"]


def make_canvas(rows: Sequence[Row], seeds: Sequence[int], plan: Plan) -> Canvas:
    """Make the canvas of rows that are decoded by one plan; nothing else makes one.

    Args:
        rows: tokens, with the mask token where something is to be written.
        seeds: one for each row; its noise is a function of the seed and the row's given tokens.
        plan: how they will be decoded; on a canvas that grows it says how many masks there are at first.

    Raises:
        ConfigError: when a row has more stages than the plan has steps.
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [plan.mask_id] * (width - len(row.ids)) for row in rows])
    end, position = torch.tensor([len(row.ids) for row in rows]), torch.arange(width)
    valid = position < end[:, None]
    initial = (ids == plan.mask_id) & valid
    start = initial.int().argmax(1)
    if plan.ahead is not None:
        last = torch.where(valid & ~initial, position + 1, 0).amax(1)  # masks before it are all there
        valid = valid & (position < (torch.maximum(start, last) + plan.ahead)[:, None])
    masked, zero = initial & valid, torch.zeros_like(start)
    return Canvas(
        ids=ids,
        masked=masked,
        pinned=~masked,
        valid=valid,
        initial=initial,
        start=start,
        key=torch.stack([row.key(seed, plan.mask_id) for row, seed in zip(rows, seeds, strict=True)]),
        end=end,
        answer_start=torch.tensor([row.answer_start for row in rows]),
        ends_from=torch.tensor([row.ends_from for row in rows]),
        stages=torch.cat([row.stages(plan) for row in rows]),
        alternatives=torch.zeros(len(rows), width, plan.top_logprobs, 2, dtype=torch.float64),
        reveal_step=torch.full_like(ids, -1),
        confidence=torch.full(ids.shape, torch.nan),
        step=zero,
        revision=zero.clone(),
        version=zero.clone(),
        model_calls=zero.clone(),
        done=~masked.any(1),
        failed=torch.full_like(start, -1),
        rule_state=plan.decoder.reveal.initial_state(len(rows), width),
    )


def resized(x: torch.Tensor, rows: int, width: int, fill: float = 0) -> torch.Tensor:
    """[b, w, …] -> [rows, width, …], what is new being `fill`; x itself where nothing changes."""
    if x.shape[:2] == (rows, width):
        return x
    out = x.new_full((rows, width, *x.shape[2:]), fill)
    out[: len(x), : x.shape[1]] = x[:rows, :width]
    return out
