"""The engine: rows of different requests, each at its own step, behind one model.

Rows come and go between steps. A row's text never depends on the rows beside it: its noise is counted from
its own key, and everything else that belongs to it stands in its row of a `Canvas`.

An engine belongs to one thread; several engines may share a model.
"""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from decoding import answer
from decoding.answer import Detokenizer, Event, Output
from decoding.canvas import Canvas, Row, make_canvas
from decoding.denoiser import Denoiser, check_capable
from decoding.request import Plan
from decoding.row_maker import Prompt, RowMaker
from decoding.step import Batch, raise_first, run_work
from dlm.errors import ConfigError, DLMError, check_whole
from dlm.spec import ModelSpec


@dataclass(frozen=True)
class Update:
    """A row that has taken a step.

    `canvas`, `confirmed`, `partial` and `event` are read when they are asked for, which must be before the
    engine's next step (a `DLMError` says so); of a finished row at any time.
    """

    ticket: int
    finished: bool
    error: Exception | None
    """Set when this row has failed; it is finished then, and has no output. A `DLMError` says in which step
    the model returned NaN; other errors are those of the row's rules."""
    plan: Plan = field(repr=False)
    detokenizer: Detokenizer = field(repr=False)
    _canvas: Callable[[], Canvas] = field(repr=False)

    @property
    def canvas(self) -> Canvas:
        """The row, a canvas of its own."""
        return self._canvas()

    @property
    def confirmed(self) -> str:
        """Text that can no longer change."""
        return answer.confirmed(self.canvas, self.plan, self.detokenizer)

    @property
    def partial(self) -> Output:
        """The part of the answer that can no longer change, token by token."""
        return answer.partial(self.canvas, self.plan, self.detokenizer)

    @property
    def event(self) -> Event:
        """The row as it is now, masks included."""
        return answer.event(self.canvas, self.plan, self.detokenizer)

    def raise_error(self, place: str) -> None:
        """Raise the error, if there is one, naming the row's place among others."""
        if type(self.error) is DLMError:
            raise DLMError(f"{self.error}, {place}")
        if self.error is not None:
            self.error.add_note(place)
            raise self.error

    @property
    def output(self) -> Output | None:
        """The answer, when the row is finished."""
        if not self.finished or self.error is not None:
            return None
        return answer.output(self.canvas, self.plan, self.detokenizer)


@dataclass
class _Group:
    """A batch and the tickets of its rows, in order."""

    batch: Batch
    tickets: list[int]


@dataclass(frozen=True)
class _EngineRow:
    """A row that the engine has taken up."""

    plan: Plan
    detokenizer: Detokenizer
    size: int
    """Positions of the row at its longest."""


class Engine:
    """Decodes whatever rows it holds, one step at a time.

    Rows whose plans agree share the arithmetic of a step; all rows share the model calls, except for those
    that reuse keys and values, which have calls of their own.

    Args:
        model: see `Denoiser`.
        tokenizer: its tokenizer.
        max_rows: rows at work at a time; others wait their turn. None for no limit.
        max_positions: positions of all rows at work, each counted at its longest; None for no limit.
    """

    def __init__(
        self,
        model: Denoiser,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int | None = None,
        max_positions: int | None = None,
    ) -> None:
        for name, limit in (("max_rows", max_rows), ("max_positions", max_positions)):
            if limit is not None:
                check_whole(name, limit)
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_positions = max_rows, max_positions
        self._waiting: OrderedDict[int, tuple[_EngineRow, Canvas]] = OrderedDict()
        self._running: dict[int, _EngineRow] = {}
        self._groups: dict[Any, _Group] = {}
        self._tickets = itertools.count()
        self._steps = 0

    @cached_property
    def rows(self) -> RowMaker:
        """Makes rows of prompts."""
        return RowMaker(self.tokenizer, ModelSpec.of(self.model))

    def __len__(self) -> int:
        """Number of rows, those that wait included."""
        return len(self._waiting) + len(self._running)

    @property
    def waiting(self) -> int:
        """Number of rows that wait their turn."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of rows at work."""
        return len(self._running)

    def submit(self, prompt: Prompt | list[int] | Row, plan: Plan, seed: int = 0) -> int:
        """Take up an answer to a prompt, or a row that has been made already.

        Args:
            prompt: a text, chat messages, token ids as they are, or a `Row`.
            plan: how it is decoded, from `Request.resolve`.
            seed: of its noise; equal seeds and prompts give equal texts, whatever rows are beside them.

        Returns:
            Its ticket.

        Raises:
            ConfigError: for a prompt that does not fit; nothing is taken up then.
        """
        if not isinstance(plan, Plan):
            raise ConfigError(f"a plan is what Request(…).resolve(model) gives, got {plan!r}")
        row = prompt if isinstance(prompt, Row) else self.rows.answer_row(prompt, plan)
        return self._wait(make_canvas([row], [operator.index(seed)], plan), plan)

    def add(self, canvas: Canvas, plan: Plan) -> int:
        """Take up a copy of a row, a canvas of one, perhaps from another engine; returns its ticket.

        Raises:
            ConfigError: for several rows, and for a row of another kind of plan.
        """
        if len(canvas) != 1:
            raise ConfigError(f"an engine takes up one row at a time, got a canvas of {len(canvas)}")
        if not canvas.fits(plan):
            raise ConfigError("the plan keeps other things of a row than that which the canvas was made for")
        return self._wait(canvas.take(torch.tensor([0])), plan)

    def _wait(self, canvas: Canvas, plan: Plan) -> int:
        """Put a canvas of one row, which is the engine's from now on, at the end of the queue."""
        check_capable(self.model, plan)
        bias = plan.decoder.tokens.logit_bias
        if bias and bias[-1][0] >= len(self.tokenizer):
            raise ConfigError(f"logit_bias names token {bias[-1][0]}, and there are {len(self.tokenizer)}")
        size = int(canvas.end[0])
        if self.max_positions is not None and size > self.max_positions:
            raise ConfigError(
                f"a row of {size} positions is longer than the engine's limit of {self.max_positions}"
            )
        ticket = next(self._tickets)
        self._waiting[ticket] = _EngineRow(plan, Detokenizer(self.tokenizer), size), canvas
        return ticket

    def lengths(self) -> dict[int, int]:
        """Positions of each row at work as it is now, by ticket; first, rows that wait begin."""
        self._admit()
        return {
            ticket: length
            for group in self._groups.values()
            for ticket, length in zip(group.tickets, group.batch.canvas.valid.sum(1).tolist(), strict=True)
        }

    @torch.inference_mode()
    def step(self, tickets: Collection[int] | None = None) -> list[Update]:
        """Take the next step of every row; rows that are finished leave the engine.

        Where drafts of some rows have come true (`Request.drafts`), these rows alone take it: they need no
        model call, and the others wait for them.

        Args:
            tickets: of the rows that take the step, all by default; texts do not depend on it. Rows that wait
                take none.

        Returns:
            One update for each row that took a step, and for each that has failed. A row for which the model
            or a rule fails is finished with an error; the others go on, those decoded together with it in the
            next step.

        Raises:
            KeyError: for a ticket that is not there.
        """
        self._admit()
        for ticket in () if tickets is None else tickets:
            self._check_ticket(ticket)
        self._steps += 1
        stepping = [
            (group, None if tickets is None else [i for i, x in enumerate(group.tickets) if x in tickets])
            for group in self._groups.values()
        ]
        stepping = [(group, rows) for group, rows in stepping if rows != []]
        if tickets is None:  # so that a call is made when all rows need one
            ahead = [(group, group.batch.rows_without_call()) for group, _ in stepping]
            stepping = [(group, rows) for group, rows in ahead if rows] or stepping
        errors = run_work(
            self.model,
            [group.batch.step(None if rows is None else torch.tensor(rows)) for group, rows in stepping],
        )
        updates: list[Update] = []
        for (group, rows), error in zip(stepping, errors, strict=True):
            updates += self._updates(group, rows) if error is None else self._failures(group, rows, error)
        self._drop({update.ticket for update in updates if update.finished})
        return updates

    def cancel(self, *tickets: int) -> None:
        """Forget rows.

        Raises:
            KeyError: for a ticket that is not there; nothing is forgotten then.
        """
        for ticket in tickets:
            self._check_ticket(ticket)
        self._drop({ticket for ticket in set(tickets) if self._waiting.pop(ticket, None) is None})

    @torch.inference_mode()
    def remove(self, ticket: int) -> Canvas:
        """Give a row away as a canvas of its own, which another engine can go on with (see `add`).

        Its text is the same there; with reused keys and values, which stay behind, the move is a refresh.

        Raises:
            KeyError: for a ticket that is not there.
        """
        canvas = self.canvas(ticket)
        self.cancel(ticket)
        return canvas

    @torch.inference_mode()
    def canvas(self, ticket: int) -> Canvas:
        """A row as it is now.

        Raises:
            KeyError: for a ticket that is not there.
        """
        if ticket in self._waiting:
            return self._waiting[ticket][1].take(torch.tensor([0]))
        self._check_ticket(ticket)
        group = self._groups[self._running[ticket].plan.batch_key]
        return group.batch.canvas.take(torch.tensor([group.tickets.index(ticket)]))

    @torch.inference_mode()
    def fork(self, tickets: Sequence[int], keys: torch.Tensor) -> list[int]:
        """Copy rows at work; the rows stay as they are, and the copies go on with noise of their own.

        Args:
            tickets: of the rows; one that occurs twice is copied twice.
            keys: [N] int64, of each copy's noise from now on (`dlm.noise.fold` makes new ones of a key).

        Returns:
            The tickets of the copies, which take part in the next step.

        Raises:
            KeyError: for a ticket that is not at work.
            ConfigError: when the copies are more than the engine's limits allow, or not as many as the keys.
        """
        if keys.shape != (len(tickets),):
            raise ConfigError(f"{len(tickets)} copies need as many keys, got {list(keys.shape)}")
        for ticket in tickets:
            if ticket not in self._running:
                raise KeyError(f"no row at work has the ticket {ticket}")
        sizes = [self._running[ticket].size for ticket in tickets]
        if not self._has_room(len(sizes), self._positions() + sum(sizes)):
            raise ConfigError(
                f"{len(tickets)} copies are more than the engine has room for: it holds {len(self._running)} "
                f"rows, max_rows is {self.max_rows} and max_positions {self.max_positions}"
            )
        copies = [next(self._tickets) for _ in tickets]
        for group in self._groups.values():
            copied = [i for i, ticket in enumerate(tickets) if ticket in group.tickets]
            if copied:
                rows = torch.tensor([group.tickets.index(tickets[i]) for i in copied])
                group.batch.fork(rows, keys[copied])
                group.tickets += [copies[i] for i in copied]
        for ticket, copy in zip(tickets, copies, strict=True):
            self._running[copy] = replace(self._running[ticket], detokenizer=Detokenizer(self.tokenizer))
        return copies

    @torch.inference_mode()
    def predictions(self, tickets: Collection[int], draws: int = 1) -> dict[int, list[str]]:
        """Answers that rows at work would give if every mask were filled now (`Batch.predict`).

        Nothing changes, and the model calls are those of the next step.

        Args:
            tickets: of the rows.
            draws: answers for each row.

        Returns:
            By ticket, so many texts.

        Raises:
            KeyError: for a ticket that is not at work.
        """
        check_whole("draws", draws)
        self._admit()
        for ticket in tickets:
            if ticket not in self._running:
                raise KeyError(f"no row at work has the ticket {ticket}")
        work, predicted = [], []
        for group in self._groups.values():
            rows = [i for i, ticket in enumerate(group.tickets) if ticket in tickets]
            if rows:
                ids: list[torch.Tensor] = []
                work.append(group.batch.predict(torch.tensor(rows), draws, ids))
                predicted.append((group, rows, ids))
        raise_first(run_work(self.model, work))
        return {
            group.tickets[row]: [self._predicted_text(group, row, filled_ids[place]) for filled_ids in ids]
            for group, rows, ids in predicted
            for place, row in enumerate(rows)
        }

    def _predicted_text(self, group: _Group, row: int, ids: torch.Tensor) -> str:
        """The answer of a row of a batch, were its tokens these [W]."""
        entry = self._running[group.tickets[row]]
        canvas = group.batch.canvas.take(torch.tensor([row]))
        return answer.completed(canvas, ids, entry.plan, Detokenizer(self.tokenizer)).text

    def _check_ticket(self, ticket: int) -> None:
        if ticket not in self._waiting and ticket not in self._running:
            raise KeyError(f"no row has the ticket {ticket}")

    def _positions(self) -> int:
        """Positions of all rows at work, each at its longest."""
        return sum(int(group.batch.canvas.end.sum()) for group in self._groups.values())

    def _has_room(self, new: int, positions: int) -> bool:
        """True where `new` rows more, `positions` in all, are within the limits."""
        rows = self.max_rows is None or len(self._running) + new <= self.max_rows
        return rows and (self.max_positions is None or positions <= self.max_positions)

    def _admit(self) -> None:
        """Let rows that wait begin, in order, as far as the limits allow."""
        if not self._waiting:
            return
        positions = self._positions()
        admitted: dict[Any, list[int]] = {}
        for ticket, (entry, _) in self._waiting.items():
            positions += entry.size
            if not self._has_room(1, positions):
                break
            admitted.setdefault(entry.plan.batch_key, []).append(ticket)
            self._running[ticket] = entry
        for key, tickets in admitted.items():
            canvas = Canvas.join([self._waiting.pop(ticket)[1] for ticket in tickets])
            if key in self._groups:
                self._groups[key].batch.join(canvas)
                self._groups[key].tickets += tickets
            else:
                self._groups[key] = _Group(Batch(self.model, canvas, self._running[tickets[0]].plan), tickets)

    def _updates(self, group: _Group, rows: list[int] | None) -> Iterator[Update]:
        """The updates of some rows of a batch (None for all), in order."""
        canvas = group.batch.canvas
        done, failed = canvas.done.tolist(), canvas.failed.tolist()
        for index in range(len(group.tickets)) if rows is None else rows:
            yield self._update(group.tickets[index], canvas, index, done[index], failed[index])

    def _failures(self, group: _Group, rows: list[int] | None, error: Exception) -> Iterator[Update]:
        """The updates of a batch with an `error`: the rows that fail alone, else all but those that are done.

        The others have taken no step.
        """
        canvas = group.batch.canvas
        places = list(range(len(group.tickets))) if rows is None else rows
        done = [place for place in places if bool(canvas.done[place])]
        yield from self._updates(group, done)
        places = [place for place in places if place not in done]
        alone = {place: self._error_alone(canvas.take(torch.tensor([place])), group) for place in places}
        for place in places:
            failure = alone[place] if any(alone.values()) else error
            if failure is not None:
                yield self._last_update(group.tickets[place], canvas.take(torch.tensor([place])), failure)

    def _error_alone(self, canvas: Canvas, group: _Group) -> Exception | None:
        """The error of the next step of a copy of a row, nothing beside it."""
        return run_work(self.model, [Batch(self.model, canvas, group.batch.plan).step()])[0]

    def _update(self, ticket: int, canvas: Canvas, index: int, done: bool, failed: int) -> Update:
        """The update of a row, number `index` of its batch, that is done, or failed in a step (-1 for no)."""
        entry = self._running[ticket]
        plan, detokenizer = entry.plan, entry.detokenizer
        if plan.stop and plan.keeps_tokens and not done:
            done = answer.find_stop(canvas.take(slice(index, index + 1)), plan, detokenizer) is not None
        if not done:
            return Update(ticket, False, None, plan, detokenizer, partial(self._row_now, ticket, self._steps))
        row = canvas.take(torch.tensor([index]))
        row.done |= done
        error = DLMError(f"the model returned NaN in step {failed}") if failed >= 0 else None
        return self._last_update(ticket, row, error)

    def _row_now(self, ticket: int, steps: int) -> Canvas:
        """The row that an update speaks of, as long as the engine has taken no more than so many steps."""
        if self._steps != steps:
            raise DLMError(f"the engine has taken a step since this update of row {ticket}: read it before")
        return self.canvas(ticket)

    def _last_update(self, ticket: int, row: Canvas, error: Exception | None) -> Update:
        """The update of a row that leaves the engine, a canvas of its own."""
        entry = self._running[ticket]
        return Update(ticket, True, error, entry.plan, entry.detokenizer, lambda: row)

    def _drop(self, tickets: set[int]) -> None:
        """Forget rows at work; batches that are empty go too."""
        for ticket in tickets:
            del self._running[ticket]
        for key, group in list(self._groups.items()) if tickets else ():
            staying = [i for i, ticket in enumerate(group.tickets) if ticket not in tickets]
            if len(staying) == len(group.tickets):
                continue
            group.tickets = [group.tickets[i] for i in staying]
            if staying:
                group.batch.keep(torch.tensor(staying))
            else:
                del self._groups[key]
