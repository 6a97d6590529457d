"""Caches of a batch: hidden states and scores, computed when they are needed and kept until the row changes.

An entry belongs to a version of its row; dropping all of them between two steps costs time and changes no
text. (Keys and values that are reused on purpose are the exception, see `Reuse`.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from decoding.canvas import Canvas, resized
from decoding.denoiser import Denoiser, can, hidden_of_rows
from decoding.request import Reuse
from dlm.device import sent
from dlm.errors import ConfigError


class _Entries:
    """For each position of a canvas, True where the cache holds an entry for the row's present version."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.version = torch.full_like(canvas.revision, -1)  # [B]
        self.known = torch.zeros_like(canvas.masked)  # [B, L]

    def _present(self, rows: torch.Tensor) -> torch.Tensor:
        """[b] a number that changes whenever the model would see another row: revision and size."""
        return (self.canvas.revision[rows] << 24) + self.canvas.valid[rows].sum(1)

    def at(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """[b, width] bool, positions of the rows [b] that have an entry."""
        fresh = self.version[rows] == self._present(rows)
        return self.known[rows, :width] & fresh[:, None]

    def add(self, rows: torch.Tensor, where: torch.Tensor) -> None:
        """Note entries for the present version of the rows [b] at `where` [b, W]."""
        width = where.shape[1]
        old = self.at(rows, self.known.shape[1])
        old[:, :width] |= where
        self.known[rows], self.version[rows] = old, self._present(rows)

    def follow(self, canvas: Canvas, rows: torch.Tensor | None) -> None:
        """Go on with another canvas: `rows` of the old one, or the old one with more rows behind it."""
        self.canvas = canvas
        if rows is not None:
            self.known, self.version = self.known[rows], self.version[rows]
        size, width = canvas.ids.shape
        self.known = resized(self.known, size, width)
        new = canvas.revision.new_full((size - len(self.version),), -1)
        self.version = torch.cat([self.version, new])


class ScoreCache:
    """Scores of the reveal rule, the token that each position would receive, and its probability."""

    def __init__(self, canvas: Canvas) -> None:
        self.entries = _Entries(canvas)
        self.token = torch.zeros_like(canvas.ids)  # [B, L]
        self.probability = torch.zeros(canvas.ids.shape)  # [B, L]
        self.score = torch.zeros(*canvas.ids.shape, 1)  # [B, L, C]
        self.alternatives = torch.zeros_like(canvas.alternatives)  # [B, L, k, 2]

    def put(
        self,
        rows: torch.Tensor,
        where: torch.Tensor,
        token: torch.Tensor,
        probability: torch.Tensor,
        score: torch.Tensor,
        alternatives: torch.Tensor,
    ) -> None:
        """Keep scores of the positions `where` [b, W] of the rows [b].

        Args:
            rows: [b].
            where: [b, W] bool, N of them true.
            token: [N].
            probability: [N].
            score: [N, C].
            alternatives: [N, 2k], see `Canvas.alternatives`.
        """
        if self.score.shape[2] != score.shape[1]:
            self.score = score.new_zeros(*self.token.shape, score.shape[1])
        row, position = where.nonzero().unbind(1)
        at = rows[row], position
        self.token[at], self.probability[at], self.score[at] = token, probability, score.to(self.score.dtype)
        self.alternatives[at] = alternatives.view(len(token), *self.alternatives.shape[2:])
        self.entries.add(rows, where)

    def scores(self, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """[b, W] or [b, W, C] scores of the rows [b], 0 outside `where` [b, W]."""
        found = torch.where(where[..., None], self.score[rows, : where.shape[1]], 0)
        return found[..., 0] if found.shape[2] == 1 else found

    def follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        """Go on with another canvas; see `_Entries.follow`."""
        self.entries.follow(canvas, rows)
        for name in ("token", "probability", "score", "alternatives"):
            kept = getattr(self, name)
            kept = kept if rows is None else kept[rows]
            setattr(self, name, resized(kept, *canvas.ids.shape))


class StateCache:
    """Hidden states of a batch, with or without its prompts.

    Args:
        canvas: the rows.
        mask_id: id of the mask token.
        unconditional: True when the model is shown the rows with their prompts masked (for guidance).
        reuse: which keys and values are reused, if any.
    """

    def __init__(
        self, canvas: Canvas, mask_id: int, unconditional: bool = False, reuse: Reuse | None = None
    ) -> None:
        self.canvas, self.mask_id, self.unconditional, self.reuse = canvas, mask_id, unconditional, reuse
        self.entries = _Entries(canvas)
        self.states: torch.Tensor | None = None  # [B, ≤ L, D]
        self.computed_ids = torch.full_like(canvas.ids, -1)  # [B, L] ids that keys and values were made of
        self.refreshed_at = torch.full_like(canvas.start, -1)  # [B] revision of the last full computation
        self.key_values: Any = None

    def of(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[N, D] at the positions [N] of the rows [N], which have been computed."""
        assert self.states is not None
        device = self.states.device
        return self.states[rows.to(device, non_blocking=True), positions.to(device, non_blocking=True)]

    def follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        """Go on with another canvas; the rows stay in order."""
        self.canvas = canvas
        self.entries.follow(canvas, rows)
        if rows is not None:
            self.computed_ids, self.refreshed_at = self.computed_ids[rows], self.refreshed_at[rows]
            self.states = None if self.states is None else self.states[sent(rows, self.states.device)]
            self.key_values = None if self.key_values is None else self.key_values.take(rows)
        size, width = canvas.ids.shape
        self.computed_ids = resized(self.computed_ids, size, width, -1)
        self.refreshed_at = resized(self.refreshed_at[:, None], size, 1, -1)[:, 0]
        if self.states is not None:
            self.states = resized(self.states, size, self.states.shape[1])

    def shown_ids(self, rows: torch.Tensor) -> torch.Tensor:
        """[b, L] the ids that the model is shown."""
        ids = self.canvas.ids[rows]
        if not self.unconditional:
            return ids
        position = torch.arange(ids.shape[1])
        prompt = (position < self.canvas.answer[rows, None]) & self.canvas.valid[rows]
        return torch.where(prompt, self.mask_id, ids)

    def put(self, rows: torch.Tensor, where: torch.Tensor, states: torch.Tensor) -> None:
        """Keep the states [N, D] of the positions `where` [b, W] of the rows [b]."""
        row, position = where.nonzero().unbind(1)
        width = -(-(int(position.max()) + 1) // 64) * 64  # in steps, so that a growing canvas seldom copies
        size = len(self.canvas.ids)
        if self.states is None:
            self.states = states.new_zeros(size, width, states.shape[-1])
        if self.states.shape[1] < width:
            self.states = resized(self.states, size, width)
        place = (x.to(states.device, non_blocking=True) for x in (rows[row], position))
        self.states[tuple(place)] = states
        self.entries.add(rows, where)
        self.canvas.model_calls[rows] += 1

    def compute_partly(self, model: Any, rows: torch.Tensor, where: torch.Tensor) -> None:
        """Compute the rows [b] again, except what `reuse` keeps; `where` [b, W] is needed."""
        assert self.reuse is not None
        if not can(model, "partial"):
            raise ConfigError("this model cannot reuse keys and values: it has no partial_hidden")
        canvas, ids = self.canvas, self.shown_ids(rows)
        masked, valid, revision = canvas.masked[rows], canvas.valid[rows], canvas.revision[rows]
        due = (revision % self.reuse.refresh == 0) & (self.refreshed_at[rows] != revision)
        changed = ids != self.computed_ids[rows]
        if self.reuse.scope == "prompt":
            changed |= torch.arange(ids.shape[1]) >= canvas.start[rows, None]
        elif self.reuse.scope == "prefix":
            changed |= masked
        else:
            changed[:, : where.shape[1]] |= where
        active = (changed | due[:, None]) & valid
        width = int(valid.any(0).nonzero()[-1]) + 1
        if self.key_values is None:
            self.key_values = model.new_memory()
        states = model.partial_hidden(
            ids[:, :width], active[:, :width], valid[:, :width], self.key_values, rows
        )
        self.computed_ids[rows] = torch.where(active, ids, self.computed_ids[rows])
        self.refreshed_at[rows] = torch.where(due, revision, self.refreshed_at[rows])
        self.put(rows, active, states)


@dataclass(frozen=True)
class StateQuery:
    """A need for the states of the rows [b] of a cache, at the positions `where` [b, W]."""

    cache: StateCache
    rows: torch.Tensor
    where: torch.Tensor

    @property
    def stale(self) -> torch.Tensor:
        """[b] bool, rows in which a needed state is not there."""
        return (self.where & ~self.cache.entries.at(self.rows, self.where.shape[1])).any(1)


def compute_states(model: Denoiser, queries: Sequence[StateQuery]) -> None:
    """Compute all states that are needed and not there; other rows cost nothing.

    One model call for all, except for batches that reuse keys and values, which have one each.
    """
    due = []
    for query in queries:
        stale = query.stale
        if not bool(stale.any()):
            continue
        cache, rows = query.cache, query.rows[stale]
        if cache.reuse is not None:
            cache.compute_partly(model, rows, query.where[stale])
        else:
            due.append((cache, rows, cache.canvas.valid[rows]))
    if not due:
        return
    ids = torch.cat([cache.shown_ids(rows)[valid] for cache, rows, valid in due])
    lengths = torch.cat([valid.sum(1) for _, _, valid in due]).tolist()
    each = iter(lengths)
    sizes = [sum(itertools.islice(each, len(rows))) for _, rows, _ in due]
    found = hidden_of_rows(model, ids, lengths).split(sizes)
    for (cache, rows, valid), states in zip(due, found, strict=True):
        cache.put(rows, valid, states)
