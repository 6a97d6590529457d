"""The model as decoding sees it: one call over rows of different lengths, and caches of what it computed.

An entry of a cache is of a version of its row, and counts no more when that changes. Dropping all of them
between two steps costs time and changes no text. (Keys and values that are reused on purpose are the
exception, see `Reuse`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard, overload, runtime_checkable

import torch

from decoding.canvas import Canvas, Rows, resized
from decoding.drafts import DraftedRow, Drafts, Guess
from decoding.request import Plan, Reuse
from decoding.reveal.base import NEEDS
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


class PackedDenoiser(Denoiser, Protocol):
    """A model that computes rows end to end ("packed"), and shadows of written tokens beside ("shadows")."""

    def packed_hidden(
        self,
        input_ids: torch.Tensor,
        lengths: Sequence[int],
        *,
        attention: Sequence[AttentionWeights] = ...,
        shadows: Sequence[Shadows] = ...,
    ) -> torch.Tensor:
        """[N] of rows of these lengths -> [N, D]; see `MaskedDiffusionModel.packed_hidden`."""
        ...


class PartialDenoiser(Denoiser, Protocol):
    """A model that computes some positions of rows, and keeps keys and values of the others ("partial")."""

    def new_memory(self) -> Any:
        """Room for keys and values."""
        ...

    def partial_hidden(
        self,
        input_ids: torch.Tensor,
        active: torch.Tensor,
        valid: torch.Tensor,
        memory: Any,
        rows: torch.Tensor,
        *,
        attention: Sequence[AttentionWeights] = ...,
        guests: int = ...,
    ) -> torch.Tensor:
        """[N, D] of the active positions; see `MaskedDiffusionModel.partial_hidden`."""
        ...


@runtime_checkable
class Capable(Protocol):
    """A model that declares what it can do beyond `Denoiser`.

    "packed" and "shadows" stand for `PackedDenoiser`, "partial" for `PartialDenoiser`, with which keys and
    values can be reused, guests (for drafts) included; "attention" for the argument `attention` of all these
    calls, `hidden` included, which records attention weights.
    """

    @property
    def capabilities(self) -> frozenset[str]:
        """Names of capabilities."""
        ...


@overload
def can(model: object, capability: Literal["packed", "shadows"]) -> TypeGuard[PackedDenoiser]: ...


@overload
def can(model: object, capability: Literal["partial"]) -> TypeGuard[PartialDenoiser]: ...


@overload
def can(model: object, capability: str) -> bool: ...


def can(model: object, capability: str) -> bool:
    """True when the model declares a capability."""
    return isinstance(model, Capable) and capability in model.capabilities


def check_capable(model: Denoiser, plan: Plan) -> None:
    """Refuse a plan that needs more than the model can.

    Raises:
        ConfigError: naming the option.
    """
    for name in sorted(plan.decoder.reveal.requires):
        if not can(model, name):
            raise ConfigError(NEEDS[name])


def hidden_of_rows(
    model: Denoiser,
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
        if not can(model, "shadows"):
            raise ConfigError(NEEDS["shadows"])
        return model.packed_hidden(ids, lengths, shadows=shadows, **records)
    if len(set(lengths)) == 1:
        return model.hidden(ids.view(len(lengths), -1), **records).flatten(0, 1)
    if can(model, "packed"):
        return model.packed_hidden(ids, lengths, **records)
    size = torch.tensor(lengths)
    valid = torch.arange(int(max(lengths))) < size[:, None]
    padded = ids.new_zeros(valid.shape)
    padded[valid] = ids
    states = model.hidden(padded, valid, **records)
    row, position = (x.to(states.device, non_blocking=True) for x in valid.nonzero().unbind(1))
    return states[row, position]


class CachedPositions:
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
        self.entries = CachedPositions(canvas)
        self.states: torch.Tensor | None = None  # [B, ≤ L, D]
        self.computed_ids = torch.full_like(canvas.ids, -1)  # [B, L] ids that keys and values were made of
        self.refreshed_at = torch.full_like(canvas.start, -1)  # [B] revision of the last full computation
        self.key_values: Any = None
        self.drafted: dict[int, list[DraftedRow]] = {}  # by row, of its last call

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
            self.drafted = {
                i: self.drafted[row] for i, row in enumerate(rows.tolist()) if row in self.drafted
            }
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
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            if row in self.drafted:
                self.drafted[place] = self.drafted[row]

    def shown_ids(self, rows: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """[b, L] what the model is shown of the rows [b], or of other `ids` [b, L] of theirs."""
        ids = self.canvas.ids[rows] if ids is None else ids
        if not self.unconditional:
            return ids
        position = torch.arange(ids.shape[1])
        prompt = (position < self.canvas.answer_start[rows, None]) & self.canvas.valid[rows]
        return torch.where(prompt, self.mask_id, ids)

    def put(
        self, rows: torch.Tensor, where: torch.Tensor, states: torch.Tensor, drafts: Drafted | None = None
    ) -> None:
        """Keep the states [N, D] of positions of the rows [b], and those of drafts of them.

        Args:
            rows: that a call has computed.
            where: [b, W] bool, positions that it computed of each.
            states: of these, in row-major order.
            drafts: what it computed of drafts; drafts of earlier calls are dropped.
        """
        self._keep(rows, where, states)
        self.canvas.model_calls[rows] += 1
        for row in rows.tolist() if self.drafted else ():
            self.drafted.pop(row, None)
        for row, draft in drafts or ():
            self.drafted[row] = [*self.drafted.get(row, ()), draft]

    def _keep(self, rows: torch.Tensor, where: torch.Tensor, states: torch.Tensor) -> None:
        """See `put`."""
        row, position = where.nonzero().unbind(1)
        width = -(-(int(position.max()) + 1) // 64) * 64  # in steps, so that a growing canvas seldom copies
        size = len(self.canvas.ids)
        if self.states is None:
            self.states = states.new_zeros(size, width, states.shape[-1])
        if self.states.shape[1] < width:
            self.states = resized(self.states, size, width)
        self.states.flatten(0, 1)[self._cells(rows[row], position)] = states
        self.entries.add(rows, where)

    def became_drafts(self, rows: torch.Tensor) -> torch.Tensor:
        """[b] bool, rows that have become a draft since their last call."""
        return torch.tensor([self._draft_of(row) is not None for row in rows.tolist()])

    def _draft_of(self, row: int) -> DraftedRow | None:
        """The draft that a row has become, if there is one."""
        drafts = self.drafted.get(row)
        if not drafts:
            return None
        shown = self.shown_ids(torch.tensor([row]))[0, self.canvas.valid[row]]
        return next((draft for draft in drafts if draft.is_of(shown)), None)

    def recall(self, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Take the states at `where` [b, W] from drafts that rows have become; [b] bool, which rows have."""
        recalled = torch.zeros(len(rows), dtype=torch.bool)
        if not self.drafted:
            return recalled
        for i, row in enumerate(rows.tolist()):
            draft = self._draft_of(row)
            if draft is not None and draft.covers(where[i]):
                self._keep(rows[i : i + 1], draft.where[None], draft.states)
                recalled[i] = True
        return recalled

    def at(self, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """[N, D] the states of the positions `where` [b, W] of the rows [b], in row-major order."""
        assert self.states is not None
        row, position = where.nonzero().unbind(1)
        return self.states.flatten(0, 1)[self._cells(rows[row], position)]

    def _cells(self, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[N] places in the states [B * W, D], on their device."""
        assert self.states is not None
        return (row * self.states.shape[1] + position).to(self.states.device, non_blocking=True)

    def compute_partly(self, model: PartialDenoiser, rows: torch.Tensor, where: torch.Tensor) -> None:
        """Compute the rows [b] again, except what `reuse` keeps; `where` [b, W] is needed."""
        assert self.reuse is not None
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
        model: PartialDenoiser,
        rows: torch.Tensor,
        where: torch.Tensor,
        size: int,
        record: AttentionWeights | None = None,
        drafts: Drafts | None = None,
    ) -> None:
        """Compute the rows [b] again from the first block of `size` that changed or is needed, exactly.

        In a block-causal model nothing before it depends on what has changed, and nothing that is needed at
        `where` [b, W] on the blocks behind. `record` is filled, if there is one. Drafts of the rows are
        computed as far as the rows, counted in blocks from the first mask.
        """
        ids, valid = self.shown_ids(rows), self.canvas.valid[rows]
        needed = torch.zeros_like(valid)
        needed[:, : where.shape[1]] = where
        block = torch.arange(ids.shape[1]) // size
        last = last_block(needed, block)
        changed = (ids != self.computed_ids[rows]) & valid
        active = blocks_up_to(last, changed | needed, block) & valid
        computed_ids = torch.where(active, ids, self.computed_ids[rows])
        computed_ids = torch.where(changed & (block > last), -1, computed_ids)
        call_rows, guests = rows, None
        if drafts is not None:
            shown, computed = self._draft_blocks(drafts, rows, last, computed_ids, block)
            ids, active = torch.cat([ids, shown]), torch.cat([active, computed])
            valid, call_rows = torch.cat([valid, drafts.valid]), torch.cat([rows, drafts.rows])
            guests = len(drafts.rows)
        width = int(active.any(0).nonzero()[-1]) + 1
        if self.key_values is None:
            self.key_values = model.new_memory()
        states = model.partial_hidden(
            ids[:, :width],
            active[:, :width],
            valid[:, :width],
            self.key_values,
            call_rows,
            **_given(attention=None if record is None else [record], guests=guests),
        )
        self.computed_ids[rows] = computed_ids
        if drafts is None:
            self.put(rows, active, states)
        else:
            states, *draft_states = states.split([int(active[: len(rows)].sum()), *computed.sum(1).tolist()])
            self.put(rows, active[: len(rows)], states, _drafted(drafts, shown, computed, draft_states))

    def _draft_blocks(
        self,
        drafts: Drafts,
        rows: torch.Tensor,
        last: torch.Tensor,
        computed_ids: torch.Tensor,
        block: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [m, L] that the model is shown of drafts, and the positions [m, L] that it must compute.

        Args:
            drafts: of some of the rows.
            rows: [b] int64, those of the call.
            last: [b, 1] number of the last block that each needs.
            computed_ids: [b, L] ids of the rows' keys and values behind the call.
            block: [L] number of each position's block.
        """
        place, first = torch.searchsorted(rows, drafts.rows), first_block(drafts.masked, block)
        further = (last[place] - first_block(self.canvas.masked[drafts.rows], block)).clamp(min=0)
        shown = self.shown_ids(drafts.rows, drafts.ids)
        wanted = ((shown != computed_ids[place]) | (block == first)) & drafts.valid
        return shown, blocks_up_to(first + further, wanted, block) & drafts.valid


def _given(**values: Any) -> dict[str, Any]:
    """Keyword arguments that are not None; a model need not know the others."""
    return {name: value for name, value in values.items() if value is not None}


Drafted = Iterable[tuple[int, DraftedRow]]
"""Drafts whose states are known, with the rows that they are of."""


def _drafted(
    drafts: Drafts, ids: torch.Tensor, where: torch.Tensor, states: Iterable[torch.Tensor]
) -> Drafted:
    """The drafts with their states [N, D] at `where` [m, L]; the model was shown `ids` [m, L]."""
    for row, shown, valid, covered, values in zip(
        drafts.rows.tolist(), ids, drafts.valid, where, states, strict=True
    ):
        yield row, DraftedRow(shown[valid], covered[valid], values.clone())


def first_block(where: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """[b, 1] number of the first of the blocks [L] in which rows [b, L] have a place; L for none."""
    return torch.where(where, block, len(block)).amin(1, keepdim=True)


def last_block(where: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """[b, 1] number of the last of the blocks [L] in which rows [b, L] have a place; -1 for none."""
    return torch.where(where, block, -1).amax(1, keepdim=True)


def blocks_up_to(last: torch.Tensor, where: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """[b, L] bool, blocks [L] from the first in which rows [b, L] have a place to number `last` [b, 1]."""
    return (block >= first_block(where, block)) & (block <= last)


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
    guess: Guess | None = None
    """Gives drafts of those rows that need a call; their states are computed in it."""

    def rows_to_compute(self) -> torch.Tensor:
        """[b] bool, rows that need a call of the model; keeps the states of drafts that rows have become."""
        rows, where, cache = self.rows, self.where, self.cache
        if self.record is not None:
            return torch.ones(len(where), dtype=torch.bool)
        missing = (where & ~cache.entries.at(rows, where.shape[1])).any(1)
        if self.shadows is not None:
            missing[self.shadows.rows] = True
        elif cache.drafted:
            places = missing.nonzero()[:, 0]
            missing[places] = ~cache.recall(rows[places], where[places])
        return missing


@dataclass(frozen=True)
class _WholeRows:
    """Rows of a cache, and drafts of them behind, that are computed whole in a call with those of others."""

    cache: StateCache
    rows: torch.Tensor
    """[b] int64."""
    drafts: Drafts | None
    ids: torch.Tensor
    """[N] int64, what the model is shown, the rows and drafts end to end."""
    lengths: list[int]
    """Of the rows and the drafts."""

    @classmethod
    def of(cls, cache: StateCache, rows: torch.Tensor, drafts: Drafts | None) -> _WholeRows:
        """The rows [b] of a cache, as they are."""
        valid = cache.canvas.valid[rows]
        ids, lengths = cache.shown_ids(rows)[valid], valid.sum(1).tolist()
        if drafts is not None:
            ids = torch.cat([ids, cache.shown_ids(drafts.rows, drafts.ids)[drafts.valid]])
            lengths += drafts.valid.sum(1).tolist()
        return cls(cache, rows, drafts, ids, lengths)

    def put(self, states: torch.Tensor) -> None:
        """Keep the states [N, D]; of drafts those behind the prompt."""
        cache, rows, drafts = self.cache, self.rows, self.drafts
        row_states, *draft_states = states.split([sum(self.lengths[: len(rows)]), *self.lengths[len(rows) :]])
        if drafts is None:
            return cache.put(rows, cache.canvas.valid[rows], row_states)
        start = cache.canvas.start[drafts.rows]
        where = drafts.valid & (torch.arange(drafts.valid.shape[1]) >= start[:, None])
        answer_states = [x[first:] for x, first in zip(draft_states, start.tolist(), strict=True)]
        shown = cache.shown_ids(drafts.rows, drafts.ids)
        return cache.put(
            rows, cache.canvas.valid[rows], row_states, _drafted(drafts, shown, where, answer_states)
        )


def compute_states(model: Denoiser, queries: Sequence[StateQuery]) -> list[torch.Tensor]:
    """States [N, D] that answer each query, in row-major order of its positions.

    Rows whose states are there already cost nothing. The others share one model call, except for batches that
    reuse keys and values, which have one each; those of a block-causal model always do, since they are exact.
    """
    whole_rows: list[_WholeRows] = []
    records: list[AttentionWeights] = []
    all_shadows: list[Shadows] = []
    for query in queries:
        cache, record, shadows = query.cache, query.record, query.shadows
        missing = query.rows_to_compute()
        if not bool(missing.any()):
            continue
        rows, where = query.rows[missing], query.where[missing]
        drafts = None if query.guess is None else query.guess(rows)
        if cache.block_size is not None and shadows is None and can(model, "partial"):
            cache.compute_blocks(model, rows, where, cache.block_size, record, drafts)
        elif cache.reuse is not None:
            if not can(model, "partial"):
                raise ConfigError("this model cannot reuse keys and values: it has no partial_hidden")
            cache.compute_partly(model, rows, where)
        else:
            offset = sum(len(item.lengths) for item in whole_rows)
            if record is not None:
                record.rows = record.rows + offset
                records.append(record)
            if shadows is not None:
                shadows.rows = (missing.cumsum(0) - 1)[shadows.rows] + offset
                all_shadows.append(shadows)
            whole_rows.append(_WholeRows.of(cache, rows, drafts))
    if whole_rows:
        ids = torch.cat([item.ids for item in whole_rows])
        lengths = [length for item in whole_rows for length in item.lengths]
        computed = hidden_of_rows(model, ids, lengths, records, all_shadows)
        for item, states in zip(whole_rows, computed.split([len(x.ids) for x in whole_rows]), strict=True):
            item.put(states)
    return [query.cache.at(query.rows, query.where) for query in queries]
