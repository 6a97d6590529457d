"""The canvas: rows that are being written, with all the state that belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch


@dataclass
class Canvas:
    """Rows that are being written. One tensor row per text; rows know nothing of each other.

    All of it lies on the host, whatever device the model is on.
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
    reveal_step: torch.Tensor = field(init=False)
    """[B, L] int64, step at which each token appeared; -1 for given ones."""
    confidence: torch.Tensor = field(init=False)
    """[B, L] float32, the model's probability of each token when it was written (temperature 1, before any
    cut); NaN for given ones, and for end tokens that only fill up."""
    step: torch.Tensor = field(init=False)
    """[B] int64, steps taken."""
    model_calls: torch.Tensor = field(init=False)
    """[B] int64, model calls that ran the row."""
    done: torch.Tensor = field(init=False)
    """[B] bool."""

    def __post_init__(self) -> None:
        """Start with nothing revealed."""
        self.reveal_step = torch.full_like(self.ids, -1)
        self.confidence = torch.full(self.ids.shape, torch.nan)
        self.step = torch.zeros_like(self.start)
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
        answer: torch.Tensor | None = None,
        ends_from: torch.Tensor | None = None,
    ) -> Canvas:
        """A canvas from rows [B, L] in which the mask token marks what is to be written.

        Args:
            ids: [B, L] int64.
            mask_id: id of the mask token.
            key: [B] int64 noise keys.
            valid: [B, L] bool, False at right padding.
            ahead: for a canvas that grows, how many of the masks behind the last given token are there at
                first; None for all.
            answer: [B] int64, where answers begin; by default with the first mask.
            ends_from: [B] int64, the first position at which an end token may be written; by default any.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        initial = (ids == mask_id) & valid
        start, end = initial.int().argmax(1), valid.sum(1)
        if ahead is not None:
            position = torch.arange(ids.shape[1])
            last = torch.where(valid & ~initial, position + 1, 0).amax(1)  # masks before it are all there
            reach = torch.maximum(start, last) + ahead
            valid = valid & (position < reach[:, None])
        masked = initial & valid
        answer = start if answer is None else answer
        ends_from = torch.zeros_like(start) if ends_from is None else ends_from
        return cls(ids.clone(), masked, ~masked, valid, initial, start, key, end, answer, ends_from)

    @property
    def width(self) -> int:
        """Positions that at least one unfinished row has."""
        reached = self.valid[~self.done].any(0)
        return int(reached.nonzero()[-1]) + 1 if bool(reached.any()) else self.ids.shape[1]

    def ended(self, rows: torch.Tensor, eos_id: int) -> torch.Tensor:
        """[b] bool, rows [b] in which an EOS has been written."""
        return (~self.masked[rows] & ~self.pinned[rows] & (self.ids[rows] == eos_id)).any(1)

    def grow(self, rows: torch.Tensor, ahead: int, closed: torch.Tensor) -> None:
        """Give the rows [b] new masks on the right until they have `ahead`; none to those `closed` [b]."""
        position = torch.arange(self.ids.shape[1])
        valid, masked = self.valid[rows], self.masked[rows]
        reach = torch.minimum(valid.sum(1) + ahead - masked.sum(1), self.end[rows])
        new = (position < torch.where(closed, 0, reach)[:, None]) & ~valid
        self.valid[rows] |= new
        self.masked[rows] |= new
        self.pinned[rows] &= ~new
        self.done[rows] &= ~new.any(1)

    def take(self, rows: torch.Tensor) -> Canvas:
        """Some rows [b], as a canvas of their own."""
        return self._of_fields({f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @classmethod
    def join(cls, canvases: Sequence[Canvas]) -> Canvas:
        """All rows of several canvases, padded on the right to the widest."""
        width = max(c.ids.shape[1] for c in canvases)
        fill = {"pinned": True, "reveal_step": -1, "confidence": torch.nan}
        return cls._of_fields(
            {
                f.name: torch.cat(
                    [
                        x if x.dim() == 1 else resized(x, len(x), width, fill.get(f.name, 0))
                        for x in (getattr(c, f.name) for c in canvases)
                    ]
                )
                for f in fields(cls)
            }
        )

    @classmethod
    def _of_fields(cls, values: dict[str, torch.Tensor]) -> Canvas:
        """A canvas from all its fields, also those that a new one begins with by itself."""
        canvas = cls(**{f.name: values[f.name] for f in fields(cls) if f.init})
        for f in fields(cls):
            setattr(canvas, f.name, values[f.name])
        return canvas


def resized(x: torch.Tensor, rows: int, width: int, fill: float = 0) -> torch.Tensor:
    """[b, w, …] -> [rows, width, …], what is new being `fill`; x itself where nothing changes."""
    if x.shape[:2] == (rows, width):
        return x
    out = x.new_full((rows, width, *x.shape[2:]), fill)
    out[: len(x), : x.shape[1]] = x[:rows, :width]
    return out
