"""The model as decoding sees it: one call over rows of different lengths, and caches of what it computed.

An entry of a cache is of a version of its row, and counts no more when that changes. Dropping all of them
between two steps costs time and changes no text. (Keys and values that are reused on purpose are the
exception, see `Reuse`.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from decoding.canvas import Canvas, Rows, resized
from decoding.request import Plan, Reuse
from decoding.reveal.base import OPTIONS
from dlm.attention_weights import AttentionWeights
from dlm.errors import ConfigError
from dlm.shadows import Shadows


class Denoiser(Protocol):
    """A model as decoding sees it; `MaskedDiffusionModel` is one, and tests bring their own.

    Ids and masks come from the host, whatever device the model is on. What a model can do beyond this it
    declares, see `Capable`.
    """

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L] -> [B, L, D]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, V], the mask column -inf."""
        ...


@runtime_checkable
class Capable(Protocol):
    """A model that declares what it can do beyond `Denoiser`.

    "packed" stands for `packed_hidden`; "partial" for `partial_hidden` and `new_memory`, with which keys and
    values can be reused; "attention" for the argument `attention` of these calls, which records attention
    weights; "shadows" for the argument `shadows` of `packed_hidden`, with which tokens are verified. See
    `dlm.model`.
    """

    @property
    def capabilities(self) -> frozenset[str]:
        """Names of capabilities."""
        ...


def can(model: Any, capability: str) -> bool:
    """True when the model declares a capability."""
    return isinstance(model, Capable) and capability in model.capabilities


def check_capable(model: Any, plan: Plan) -> None:
    """Refuse a plan that needs more than the model can.

    Raises:
        ConfigError: naming the option.
    """
    for name in sorted(plan.decoder.reveal.requires):
        if not can(model, name):
            raise ConfigError(f"this model cannot tell {name}, which the option {OPTIONS[name]} needs")


def hidden_of_rows(
    model: Any,
    ids: torch.Tensor,
    lengths: Sequence[int],
    attention: Sequence[AttentionWeights] = (),
    shadows: Sequence[Shadows] = (),
) -> torch.Tensor:
    """One model call over rows of these lengths: packed end to end where the model can, else padded.

    Args:
        model: see `Denoiser`.
        ids: [N] int64, the rows end to end.
        lengths: of each row; their sum is N.
        attention: records that the call fills, for a model that can.
        shadows: that the call computes too, for a model that can.

    Returns:
        [N, D].
    """
    records: dict[str, Any] = {"attention": attention} if attention else {}
    if shadows:
        return model.packed_hidden(ids, lengths, shadows=shadows, **records)  # type: ignore[no-any-return]
    if len(set(lengths)) == 1:
        return model.hidden(ids.view(len(lengths), -1), **records).flatten(0, 1)  # type: ignore[no-any-return]
    if can(model, "packed"):
        return model.packed_hidden(ids, lengths, **records)  # type: ignore[no-any-return]
    size = torch.tensor(lengths)
    valid = torch.arange(int(max(lengths))) < size[:, None]
    padded = ids.new_zeros(valid.shape)
    padded[valid] = ids
    states = model.hidden(padded, valid, **records)
    row, position = (x.to(states.device, non_blocking=True) for x in valid.nonzero().unbind(1))
    return states[row, position]  # type: ignore[no-any-return]


class Entries:
    """Positions of a canvas for which a cache holds an entry, of the version of the row that it is of."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.cached = torch.zeros_like(canvas.masked)  # [B, L]
        self.version = torch.full_like(canvas.version, -1)  # [B] that the entries of a row are of

    def _current(self, rows: Rows) -> torch.Tensor:
        """[b, 1] bool, True where the entries of the rows [b] are of the rows as they are."""
        return (self.version[rows] == self.canvas.version[rows])[:, None]

    def at(self, rows: Rows, width: int) -> torch.Tensor:
        """[b, width] bool, positions of the rows [b] that have an entry."""
        return self.cached[rows, :width] & self._current(rows)

    def add(self, rows: torch.Tensor, where: torch.Tensor) -> None:
        """Note entries for the rows [b] at `where` [b, W]; older ones, of the row as it was, go."""
        cached = self.cached[rows] & self._current(rows)
        cached[:, : where.shape[1]] |= where
        self.cached[rows], self.version[rows] = cached, self.canvas.version[rows]

    def copy(self, rows: torch.Tensor, places: torch.Tensor) -> None:
        """Note the entries of the rows [b] for the rows `places` [b] too, which are equal to them."""
        current = self._current(rows)[:, 0]
        self.cached[places] = self.cached[rows]
        self.version[places] = torch.where(current, self.canvas.version[places], -1)

    def follow(self, canvas: Canvas, rows: torch.Tensor | None) -> None:
        """Go on with another canvas: `rows` of the old one, or the old one with more rows behind it."""
        cached, version = (x if rows is None else x[rows] for x in (self.cached, self.version))
        self.canvas, self.cached = canvas, resized(cached, *canvas.ids.shape)
        self.version = resized(version[:, None], len(canvas.ids), 1, -1)[:, 0]


class StateCache:
    """Hidden states of a batch, with or without its prompts.

    Args:
        canvas: the rows.
        mask_id: id of the mask token.
        block_size: of a block-causal model whose rows can be computed in part; else None.
        unconditional: True when the model is shown the rows with their prompts masked (for guidance).
        reuse: which keys and values are reused, if any.
    """

    def __init__(
        self,
        canvas: Canvas,
        mask_id: int,
        block_size: int | None = None,
        unconditional: bool = False,
        reuse: Reuse | None = None,
    ) -> None:
        self.canvas, self.mask_id, self.block_size = canvas, mask_id, block_size
        self.unconditional, self.reuse = unconditional, reuse
        self.entries = Entries(canvas)
        self.states: torch.Tensor | None = None  # [B, ≤ L, D]
        self.computed_ids = torch.full_like(canvas.ids, -1)  # [B, L] ids that keys and values were made of
        self.refreshed_at = torch.full_like(canvas.start, -1)  # [B] revision of the last full computation
        self.key_values: Any = None

    def follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        """Go on with another canvas; the rows stay in order."""
        self.canvas = canvas
        self.entries.follow(canvas, rows)
        if rows is not None:
            self.computed_ids, self.refreshed_at = self.computed_ids[rows], self.refreshed_at[rows]
            self.states = (
                None if self.states is None else self.states[rows.to(self.states.device, non_blocking=True)]
            )
            self.key_values = None if self.key_values is None else self.key_values.take(rows)
        size, width = canvas.ids.shape
        self.computed_ids = resized(self.computed_ids, size, width, -1)
        self.refreshed_at = resized(self.refreshed_at[:, None], size, 1, -1)[:, 0]
        if self.states is not None:
            self.states = resized(self.states, size, self.states.shape[1])

    def copy(self, rows: torch.Tensor, places: torch.Tensor) -> None:
        """Keep the states of the rows [b] for the rows `places` [b] too, which are equal to them.

        Keys and values are not copied; where there are any they are computed again.
        """
        if self.states is None:
            return
        source, target = (x.to(self.states.device, non_blocking=True) for x in (rows, places))
        self.states[target] = self.states[source]
        self.entries.copy(rows, places)

    def shown_ids(self, rows: torch.Tensor) -> torch.Tensor:
        """[b, L] the ids that the model is shown."""
        ids = self.canvas.ids[rows]
        if not self.unconditional:
            return ids
        position = torch.arange(ids.shape[1])
        prompt = (position < self.canvas.answer_start[rows, None]) & self.canvas.valid[rows]
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
        self.states.flatten(0, 1)[self._cells(rows[row], position)] = states
        self.entries.add(rows, where)
        self.canvas.model_calls[rows] += 1

    def at(self, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """[N, D] the states of the positions `where` [b, W] of the rows [b], in row-major order."""
        assert self.states is not None
        row, position = where.nonzero().unbind(1)
        return self.states.flatten(0, 1)[self._cells(rows[row], position)]

    def _cells(self, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[N] places in the states [B * W, D], on their device."""
        assert self.states is not None
        return (row * self.states.shape[1] + position).to(self.states.device, non_blocking=True)

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

    def compute_blocks(
        self,
        model: Any,
        rows: torch.Tensor,
        where: torch.Tensor,
        size: int,
        record: AttentionWeights | None = None,
    ) -> None:
        """Compute the rows [b] again from the first block of `size` that changed or is needed, exactly.

        In a block-causal model nothing before it depends on what has changed, and nothing that is needed at
        `where` [b, W] on the blocks behind. `record` is filled, if there is one.
        """
        ids, valid = self.shown_ids(rows), self.canvas.valid[rows]
        needed = torch.zeros_like(valid)
        needed[:, : where.shape[1]] = where
        changed = (ids != self.computed_ids[rows]) & valid
        block = torch.arange(ids.shape[1]) // size
        last = torch.where(needed, block, -1).amax(1, keepdim=True)
        from_block = torch.where(changed | needed, block, ids.shape[1]).amin(1, keepdim=True)
        active = valid & (block >= from_block) & (block <= last)
        width = int(active.any(0).nonzero()[-1]) + 1
        if self.key_values is None:
            self.key_values = model.new_memory()
        states = model.partial_hidden(
            ids[:, :width],
            active[:, :width],
            valid[:, :width],
            self.key_values,
            rows,
            **({} if record is None else {"attention": [record]}),
        )
        stale = changed & (block > last)
        self.computed_ids[rows] = torch.where(stale, -1, torch.where(active, ids, self.computed_ids[rows]))
        self.put(rows, active, states)


@dataclass(frozen=True)
class StateQuery:
    """A need for the states of the rows [b] of a cache, at the positions `where` [b, W].

    With a record also for the attention of a model call, and with shadows for their states, whatever states
    are there already; both number the rows of the query from 0.
    """

    cache: StateCache
    rows: torch.Tensor
    where: torch.Tensor
    record: AttentionWeights | None = None
    shadows: Shadows | None = None


def compute_states(model: Denoiser, queries: Sequence[StateQuery]) -> list[torch.Tensor]:
    """States [N, D] that answer each query, in row-major order of its positions.

    Rows whose states are there already cost nothing. The others share one model call, except for batches that
    reuse keys and values, which have one each; those of a block-causal model always do, since they are exact.
    """
    due: list[tuple[StateCache, torch.Tensor, torch.Tensor]] = []
    records: list[AttentionWeights] = []
    shades: list[Shadows] = []
    for query in queries:
        cache, rows, where = query.cache, query.rows, query.where
        record, shadows = query.record, query.shadows
        stale = (where & ~cache.entries.at(rows, where.shape[1])).any(1)
        if record is not None:
            stale = torch.ones_like(stale)
        if shadows is not None:
            stale[shadows.rows] = True
        if not bool(stale.any()):
            continue
        rows = rows[stale]
        if cache.block_size is not None and shadows is None:
            cache.compute_blocks(model, rows, where[stale], cache.block_size, record)
        elif cache.reuse is not None:
            cache.compute_partly(model, rows, where[stale])
        else:
            offset = sum(len(others) for _, others, _ in due)
            if record is not None:
                record.rows = record.rows + offset
                records.append(record)
            if shadows is not None:
                shadows.rows = (stale.cumsum(0) - 1)[shadows.rows] + offset
                shades.append(shadows)
            due.append((cache, rows, cache.canvas.valid[rows]))
    if due:
        ids = torch.cat([cache.shown_ids(rows)[valid] for cache, rows, valid in due])
        lengths = torch.cat([valid.sum(1) for _, _, valid in due]).tolist()
        row_lengths = iter(lengths)
        sizes = [sum(itertools.islice(row_lengths, len(rows))) for _, rows, _ in due]
        computed = hidden_of_rows(model, ids, lengths, records, shades).split(sizes)
        for (cache, rows, valid), states in zip(due, computed, strict=True):
            cache.put(rows, valid, states)
    return [query.cache.at(query.rows, query.where) for query in queries]
