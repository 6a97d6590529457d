"""The batch engine: rows of different requests, each at its own step, behind one model.

Rows can be added and taken away between steps. A row's text never depends on its batch-mates: its noise is
counted from its own key, and everything else that belongs to it stands in its row of a `Canvas`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from decoding.canvas import Canvas
from decoding.loop import BrokenRowError, Lane, Settings, work_through
from decoding.presets import Decoder
from decoding.states import Denoiser
from dlm.errors import DLMError


class BrokenTicketError(DLMError):
    """The model returned NaN for a row of the engine.

    Attributes:
        ticket: the row's.
        step: the step that it was to take.
    """

    def __init__(self, ticket: int, step: int) -> None:
        super().__init__(f"the model returned NaN in step {step} of the row with the ticket {ticket}")
        self.ticket, self.step = ticket, step


class Engine:
    """Decodes whatever rows it holds, one step at a time.

    Rows with the same decoder and settings share a `Lane`; all lanes share the model calls, except those that
    reuse keys and values, which have calls of their own.

    Args:
        model: see `Denoiser`.
    """

    def __init__(self, model: Denoiser) -> None:
        self.model = model
        self.lanes: dict[tuple[Decoder, Settings], Lane] = {}
        self.tickets: dict[tuple[Decoder, Settings], list[int]] = {}
        self.where: dict[int, tuple[Decoder, Settings]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.where)

    @torch.inference_mode()
    def add(self, canvas: Canvas, decoder: Decoder, settings: Settings) -> list[int]:
        """Take up rows.

        Args:
            canvas: the rows [B, L]; it is copied.
            decoder: how they are decoded.
            settings: at what pace, and so on.

        Returns:
            A ticket for each row.

        Raises:
            ConfigError: for settings that do not fit the decoder or the rows; nothing is added then.
        """
        own = (decoder, replace(settings, fit=settings.length(canvas.ids.shape[1])))
        if own in self.lanes:
            self.lanes[own].join(canvas)
        else:
            rows = torch.arange(len(canvas.ids))
            self.lanes[own] = Lane(self.model, canvas.take(rows), *own)
        tickets = list(itertools.islice(self._numbers, len(canvas.ids)))
        self.tickets.setdefault(own, []).extend(tickets)
        self.where.update(dict.fromkeys(tickets, own))
        return tickets

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Take the next step of every row that is not done; returns the tickets of those that are now.

        Those that were done before are among them, until they are removed.

        Raises:
            BrokenTicketError: when the model returns NaN for a row. Without that row the others go on.
        """
        try:
            work_through(self.model, [piece for lane in self.lanes.values() for piece in lane.work()])
        except BrokenRowError as error:
            owner = next(own for own, lane in self.lanes.items() if lane is error.lane)
            raise BrokenTicketError(self.tickets[owner][error.row], error.step) from error
        return [
            ticket
            for own, lane in self.lanes.items()
            for ticket, done in zip(self.tickets[own], lane.canvas.done.tolist(), strict=True)
            if done
        ]

    @torch.inference_mode()
    def row(self, ticket: int) -> Canvas:
        """The row as it is now, a canvas of its own [1, L]."""
        lane, index = self._find(ticket)
        return lane.canvas.take(torch.tensor([index]))

    @torch.inference_mode()
    def remove(self, *tickets: int) -> list[Canvas]:
        """Give rows away, finished or not; returns each as a canvas of its own.

        Raises:
            KeyError: for a ticket that is not there; nothing is removed then.
        """
        rows = [self.row(ticket) for ticket in tickets]
        for own in {self.where.pop(ticket): None for ticket in dict.fromkeys(tickets)}:
            staying = [i for i, ticket in enumerate(self.tickets[own]) if ticket in self.where]
            self.tickets[own] = [self.tickets[own][i] for i in staying]
            if staying:
                lane = self.lanes[own]
                lane.keep(torch.tensor(staying))
            else:
                del self.lanes[own], self.tickets[own]
        return rows

    def _find(self, ticket: int) -> tuple[Lane, int]:
        """The lane that holds a row, and its number there."""
        if ticket not in self.where:
            raise KeyError(f"no row has the ticket {ticket}")
        own = self.where[ticket]
        return self.lanes[own], self.tickets[own].index(ticket)
