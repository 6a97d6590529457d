"""The engine: rows of different requests, each at its own step, behind one model.

Rows come and go between steps. A row's text never depends on the rows beside it: its noise is counted from
its own key, and everything else that belongs to it stands in its row of a `Canvas`.

An engine belongs to one thread; several engines may share a model.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from decoding import answer
from decoding.answer import Event, Output
from decoding.canvas import Canvas, make_canvas
from decoding.denoiser import Denoiser
from decoding.request import Plan
from decoding.rows import Prompt, Row, RowMaker
from decoding.step import Batch, run_work
from dlm.errors import ConfigError, DLMError
from dlm.spec import ModelSpec


@dataclass(frozen=True)
class Update:
    """A row that has taken a step.

    `confirmed`, `event` and `canvas` are read when they are asked for: ask before the engine's next step.
    """

    ticket: int
    finished: bool
    error: DLMError | None
    """Set when the model failed on this row; it is finished then, and has no output."""
    plan: Plan = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    _read: Callable[[], Canvas] = field(repr=False)

    @property
    def canvas(self) -> Canvas:
        """The row, a canvas of its own."""
        return self._read()

    @property
    def confirmed(self) -> str:
        """Text that can no longer change."""
        return answer.confirmed(self.canvas, self.plan, self.tokenizer)

    @property
    def partial(self) -> Output:
        """The part of the answer that can no longer change, token by token."""
        return answer.partial(self.canvas, self.plan, self.tokenizer)

    @property
    def event(self) -> Event:
        """The row as it is now, masks included."""
        return answer.event(self.canvas, self.plan, self.tokenizer)

    @property
    def output(self) -> Output | None:
        """The answer, when the row is finished."""
        if not self.finished or self.error is not None:
            return None
        return answer.output(self.canvas, self.plan, self.tokenizer)


@dataclass
class _Group:
    """A batch and the tickets of its rows, in order."""

    batch: Batch
    tickets: list[int]


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
            if limit is not None and limit < 1:
                raise ConfigError(f"{name} must be at least 1, got {limit}")
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_positions = max_rows, max_positions
        self._groups: dict[Any, _Group] = {}
        self._plans: dict[int, Plan] = {}
        self._waiting: deque[tuple[int, Canvas]] = deque()
        self._numbers = itertools.count()

    @cached_property
    def rows(self) -> RowMaker:
        """Makes rows of prompts."""
        return RowMaker(self.tokenizer, ModelSpec.of(self.model))

    def __len__(self) -> int:
        """Number of rows, those that wait included."""
        return len(self._plans)

    @property
    def running(self) -> int:
        """Number of rows at work."""
        return len(self._plans) - len(self._waiting)

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
        row = prompt if isinstance(prompt, Row) else self.rows.answer(prompt, plan)
        return self.add(make_canvas([row], [seed], plan), plan)

    def add(self, canvas: Canvas, plan: Plan) -> int:
        """Take up a row as it is, a canvas of one, perhaps from another engine; returns its ticket."""
        size = int(canvas.end[0])
        if self.max_positions is not None and size > self.max_positions:
            raise ConfigError(
                f"a row of {size} positions is longer than the engine's limit of {self.max_positions}"
            )
        ticket = next(self._numbers)
        self._plans[ticket] = plan
        self._waiting.append((ticket, canvas.take(torch.tensor([0]))))
        return ticket

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """Take the next step of every row; rows that are finished leave the engine.

        Returns:
            One update for each row that took a step. A row for which the model fails is finished with an
            error; the others go on.
        """
        self._admit()
        run_work(self.model, [work for group in self._groups.values() for work in group.batch.step()])
        updates = [update for group in self._groups.values() for update in self._updates(group)]
        self._drop([update.ticket for update in updates if update.finished])
        return updates

    def cancel(self, ticket: int) -> None:
        """Forget a row.

        Raises:
            KeyError: for a ticket that is not there.
        """
        self.remove(ticket)

    @torch.inference_mode()
    def remove(self, ticket: int) -> Canvas:
        """Give a row away as a canvas of its own, which another engine can go on with (see `add`).

        Its text is the same there; with reused keys and values, which stay behind, the move is a refresh.

        Raises:
            KeyError: for a ticket that is not there.
        """
        canvas = self.canvas(ticket)
        self._drop([ticket])
        return canvas

    @torch.inference_mode()
    def canvas(self, ticket: int) -> Canvas:
        """A row as it is now.

        Raises:
            KeyError: for a ticket that is not there.
        """
        if ticket not in self._plans:
            raise KeyError(f"no row has the ticket {ticket}")
        for waiting, canvas in self._waiting:
            if waiting == ticket:
                return canvas.take(torch.tensor([0]))
        group = self._groups[self._plans[ticket].batch_key]
        return group.batch.canvas.take(torch.tensor([group.tickets.index(ticket)]))

    def _admit(self) -> None:
        """Let rows that wait begin, in order, as far as the limits allow."""
        running = self.running
        positions = sum(int(group.batch.canvas.end.sum()) for group in self._groups.values())
        admitted: dict[Any, list[tuple[int, Canvas]]] = {}
        while self._waiting:
            ticket, canvas = self._waiting[0]
            positions += int(canvas.end[0])
            if self.max_rows is not None and running >= self.max_rows:
                break
            if self.max_positions is not None and positions > self.max_positions:
                break
            admitted.setdefault(self._plans[ticket].batch_key, []).append(self._waiting.popleft())
            running += 1
        for key, rows in admitted.items():
            canvas = Canvas.join([canvas for _, canvas in rows])
            tickets = [ticket for ticket, _ in rows]
            if key in self._groups:
                self._groups[key].batch.join(canvas)
                self._groups[key].tickets += tickets
            else:
                self._groups[key] = _Group(Batch(self.model, canvas, self._plans[tickets[0]]), tickets)

    def _updates(self, group: _Group) -> list[Update]:
        """Updates of the rows of a group."""
        canvas = group.batch.canvas
        done, failed = canvas.done.tolist(), canvas.failed.tolist()
        return [self._update(ticket, canvas, i, done[i], failed[i]) for i, ticket in enumerate(group.tickets)]

    def _update(self, ticket: int, canvas: Canvas, index: int, done: bool, failed: int) -> Update:
        plan = self._plans[ticket]
        row: Canvas | None = None
        if plan.stop and plan.keeps_tokens and not done:
            row = canvas.take(torch.tensor([index]))
            done = answer.find_stop(row, plan, self.tokenizer) is not None
            row.done |= done
        if done:
            kept = canvas.take(torch.tensor([index])) if row is None else row
            error = DLMError(f"the model returned NaN in step {failed}") if failed >= 0 else None
            return Update(ticket, True, error, plan, self.tokenizer, lambda: kept)
        return Update(ticket, False, None, plan, self.tokenizer, lambda: self.canvas(ticket))

    def _drop(self, tickets: list[int]) -> None:
        """Forget rows; batches that are empty go too."""
        gone = set(tickets)
        if not gone:
            return
        for ticket in gone:
            del self._plans[ticket]
        self._waiting = deque(item for item in self._waiting if item[0] not in gone)
        for key, group in list(self._groups.items()):
            staying = [i for i, ticket in enumerate(group.tickets) if ticket not in gone]
            if len(staying) == len(group.tickets):
                continue
            group.tickets = [group.tickets[i] for i in staying]
            if staying:
                group.batch.keep(torch.tensor(staying))
            else:
                del self._groups[key]
