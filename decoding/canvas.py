"""The canvas: rows that are being written, with all the state that belongs to them.

A row is its canvas: whatever decides its text stands here, so that it can be moved to another batch or engine
between any two steps without changing the text. Hidden states and scores are caches beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from decoding.request import Plan
from decoding.rows import Row
from dlm.errors import ConfigError
from dlm.noise import key_of


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
    answer: torch.Tensor
    """[B] int64, where the answer begins, which may begin with given tokens; the prompt lies before it."""
    ends_from: torch.Tensor
    """[B] int64, the first position at which an end token may be written."""
    stages: torch.Tensor
    """[B] int64, stages (blocks) that the row goes through, each with its own time from 1 to 0."""
    alternatives: torch.Tensor
    """[B, L, k, 2] float64, the k likeliest tokens and their log-probabilities when a position was written
    (see `Output.top_logprobs`)."""
    rule_state: dict[str, torch.Tensor] = field(default_factory=dict)
    """State of the reveal rule, by name: [B, L, …] or [B]."""
    reveal_step: torch.Tensor = field(init=False)
    """[B, L] int64, step at which each token appeared; -1 for given ones."""
    confidence: torch.Tensor = field(init=False)
    """[B, L] float32, the model's probability of each token when it was written (temperature 1, before any
    cut); NaN for given ones, and for end tokens that only fill up."""
    step: torch.Tensor = field(init=False)
    """[B] int64, steps taken."""
    revision: torch.Tensor = field(init=False)
    """[B] int64, how often the row has changed. The noise of tokens is keyed by it: what was drawn for a
    revision is the same whenever it is drawn."""
    model_calls: torch.Tensor = field(init=False)
    """[B] int64, model calls that ran the row."""
    done: torch.Tensor = field(init=False)
    """[B] bool."""
    failed: torch.Tensor = field(init=False)
    """[B] int64, the step in which the model returned NaN for the row; -1 for none."""

    def __post_init__(self) -> None:
        """Start with nothing revealed."""
        self.reveal_step = torch.full_like(self.ids, -1)
        self.confidence = torch.full(self.ids.shape, torch.nan)
        self.step, self.revision, self.model_calls = (torch.zeros_like(self.start) for _ in range(3))
        self.failed = torch.full_like(self.start, -1)
        self.done = ~self.masked.any(1)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)

    @property
    def width(self) -> int:
        """Positions that at least one unfinished row has."""
        reached = self.valid[~self.done].any(0)
        return int(reached.nonzero()[-1]) + 1 if bool(reached.any()) else self.ids.shape[1]

    def grow(self, rows: torch.Tensor, ahead: int, closed: torch.Tensor) -> None:
        """Give the rows [b] new masks on the right until they have `ahead`; none to those `closed` [b]."""
        position = torch.arange(self.ids.shape[1])
        valid, masked = self.valid[rows], self.masked[rows]
        reach = torch.minimum(valid.sum(1) + ahead - masked.sum(1), self.end[rows])
        new = (position < torch.where(closed, 0, reach)[:, None]) & ~valid
        grown = new.any(1)
        if bool(grown.any()):
            self.valid[rows] |= new
            self.masked[rows] |= new
            self.pinned[rows] &= ~new
            self.done[rows] &= ~grown

    def take(self, rows: torch.Tensor) -> Canvas:
        """Some rows [b], as a canvas of their own."""
        values = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "rule_state"}
        return self._of_fields(values, {name: x[rows] for name, x in self.rule_state.items()})

    @classmethod
    def join(cls, canvases: Sequence[Canvas]) -> Canvas:
        """All rows of several canvases, padded on the right to the widest."""
        if len(canvases) == 1:
            return canvases[0]
        width = max(c.ids.shape[1] for c in canvases)
        fill = {"pinned": True, "reveal_step": -1, "confidence": torch.nan}
        wide = [{f.name: getattr(c, f.name) for f in fields(cls) if f.name != "rule_state"} for c in canvases]
        values = {name: _stacked([w[name] for w in wide], width, fill.get(name, 0)) for name in wide[0]}
        rule_state = {
            name: _stacked([c.rule_state[name] for c in canvases], width, 0)
            for name in canvases[0].rule_state
        }
        return cls._of_fields(values, rule_state)

    @classmethod
    def _of_fields(cls, values: Mapping[str, torch.Tensor], rule_state: dict[str, torch.Tensor]) -> Canvas:
        """A canvas from all its fields, also those that a new one begins with by itself."""
        given: dict[str, Any] = {f.name: values[f.name] for f in fields(cls) if f.init and f.name in values}
        canvas = cls(**given, rule_state=rule_state)
        for name, value in values.items():
            setattr(canvas, name, value)
        return canvas


def make_canvas(rows: Sequence[Row], seeds: Sequence[int], plan: Plan) -> Canvas:
    """Make the canvas of rows that are decoded by one plan; nothing else makes one.

    Args:
        rows: tokens, with the mask token where something is to be written.
        seeds: one for each row; its noise is a function of the seed and the row's given tokens.
        plan: how they will be decoded; on a canvas that grows it says how many masks there are at first.

    Raises:
        ConfigError: when a row has more stages than the plan has steps.
    """
    mask_id = plan.mask_id
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [mask_id] * (width - len(row.ids)) for row in rows])
    end = torch.tensor([len(row.ids) for row in rows])
    keys = [key_of(int(seed), row.digest(mask_id)) for row, seed in zip(rows, seeds, strict=True)]
    position = torch.arange(width)
    valid = position < end[:, None]
    initial = (ids == mask_id) & valid
    start = initial.int().argmax(1)
    if plan.ahead is not None:
        last = torch.where(valid & ~initial, position + 1, 0).amax(1)  # masks before it are all there
        valid = valid & (position < (torch.maximum(start, last) + plan.ahead)[:, None])
    stages, steps = plan.decoder.window.stages(start, end), plan.pace.steps
    if steps is not None and steps < int(stages.max()):
        raise ConfigError(
            f"{steps} steps are too few for {int(stages.max())} blocks; each block needs at least one"
        )
    return Canvas(
        ids=ids,
        masked=initial & valid,
        pinned=~(initial & valid),
        valid=valid,
        initial=initial,
        start=start,
        key=torch.stack(keys),
        end=end,
        answer=torch.tensor([row.answer for row in rows]),
        ends_from=torch.tensor([row.ends_from for row in rows]),
        stages=stages,
        alternatives=torch.zeros(len(rows), width, plan.top_logprobs, 2, dtype=torch.float64),
        rule_state=plan.decoder.reveal.initial_state(len(rows), width),
    )


def _stacked(parts: Sequence[torch.Tensor], width: int, fill: float) -> torch.Tensor:
    """Rows of several tensors, those of [b, w, …] padded to the width."""
    return torch.cat([x if x.dim() == 1 else resized(x, len(x), width, fill) for x in parts])


def resized(x: torch.Tensor, rows: int, width: int, fill: float = 0) -> torch.Tensor:
    """[b, w, …] -> [rows, width, …], what is new being `fill`; x itself where nothing changes."""
    if x.shape[:2] == (rows, width):
        return x
    out = x.new_full((rows, width, *x.shape[2:]), fill)
    out[: len(x), : x.shape[1]] = x[:rows, :width]
    return out
