"""The order of requests: the rows that begin, and the rows at work that take the next step.

Of those that wait, the request with the fewest rows at work comes first, the earliest among equals; so a
request of eight answers does not starve others. A row too large for what is free is passed by smaller ones,
but not for ever. Of those at work, as many take a step as fit into it, in turn.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

J = TypeVar("J", bound=Hashable)
R = TypeVar("R", bound=Hashable)
T = TypeVar("T", bound=Hashable)

PATIENCE = 32
"""Rows that may pass one that does not fit; then all wait until it does."""


@dataclass
class _Entry:
    """A request: sizes of the rows that wait, in order, and of those at work."""

    number: int
    waiting: deque[int]
    working: dict[int, int]
    passed: int = 0


class Queue(Generic[J]):
    """Requests whose rows wait or are at work.

    Args:
        max_rows: rows at work at a time.
        max_positions: positions of all rows at work.
    """

    def __init__(self, max_rows: int, max_positions: int) -> None:
        self.max_rows, self.max_positions = max_rows, max_positions
        self._entries: dict[J, _Entry] = {}
        self._sizes: dict[J, list[int]] = {}
        self._numbers = itertools.count()
        self.rows = 0
        """Rows at work."""
        self.positions = 0
        """Positions of the rows at work."""

    def __len__(self) -> int:
        """Number of requests."""
        return len(self._entries)

    @property
    def waiting(self) -> int:
        """Number of requests of which no row has begun."""
        return sum(not entry.working for entry in self._entries.values())

    def add(self, job: J, sizes: Sequence[int]) -> None:
        """Take up a request whose rows have these sizes, in positions."""
        self._sizes[job] = list(sizes)
        self._entries[job] = _Entry(next(self._numbers), deque(range(len(sizes))), {})

    def admit(self) -> list[tuple[J, int]]:
        """Rows that may begin now, (request, index of its row), in order."""
        admitted = []
        while (job := self._next()) is not None:
            entry = self._entries[job]
            index = entry.waiting.popleft()
            size = self._sizes[job][index]
            entry.working[index] = size
            entry.passed = 0
            self.rows += 1
            self.positions += size
            admitted.append((job, index))
        return admitted

    def _next(self) -> J | None:
        """The request whose row begins next; None when nothing more fits."""
        if self.rows >= self.max_rows:
            return None
        candidates = [(len(e.working), e.number, job) for job, e in self._entries.items() if e.waiting]
        candidates.sort(key=lambda item: item[:2])
        passed: list[_Entry] = []
        for _, _, job in candidates:
            entry = self._entries[job]
            if self.positions + self._sizes[job][entry.waiting[0]] <= self.max_positions:
                for each in passed:
                    each.passed += 1
                return job
            if entry.passed >= PATIENCE:
                return None
            passed.append(entry)
        return None

    def release(self, job: J, index: int) -> None:
        """Forget a row that is finished; the request goes with its last row."""
        entry = self._entries[job]
        self.rows -= 1
        self.positions -= entry.working.pop(index)
        if not entry.working and not entry.waiting:
            del self._entries[job], self._sizes[job]

    def remove(self, job: J) -> list[int]:
        """Forget a request; returns its rows that were at work."""
        entry = self._entries.pop(job)
        del self._sizes[job]
        self.rows -= len(entry.working)
        self.positions -= sum(entry.working.values())
        return list(entry.working)

    def __contains__(self, job: object) -> bool:
        """True for a request that waits or is at work."""
        return job in self._entries

    def jobs(self) -> list[J]:
        """All requests, in order."""
        return list(self._entries)

    def waiting_jobs(self) -> list[J]:
        """Requests of which no row has begun, in order."""
        return [job for job, entry in self._entries.items() if not entry.working]


class Shares(Generic[J, R]):
    """The rows at work that take the next step, where it cannot hold them all: requests take turns.

    A turn is a step of one row. Requests of several rows have second turns when all have had one, and their
    rows take turns too. A row that does not fit in what is left is passed by others; its request comes
    earlier in the next step.

    Args:
        budget: positions of one step, which a row alone may exceed; 0 for no limit.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._requests: list[J] = []
        self._rows: list[R] = []

    def choose(self, rows: Mapping[J, Mapping[R, int]]) -> list[R]:
        """Rows of the next step; `rows` holds the positions of every request's rows at work."""
        owner = {row: job for job, sizes in rows.items() for row in sizes}
        if not self.budget or sum(sum(sizes.values()) for sizes in rows.values()) <= self.budget:
            return list(owner)
        self._requests, self._rows = _go_on(self._requests, rows), _go_on(self._rows, owner)
        waiting: dict[J, deque[R]] = {job: deque() for job in self._requests}
        for row in self._rows:
            waiting[owner[row]].append(row)
        selected: list[R] = []
        room, turns = self.budget, deque(self._requests)
        while turns:
            job = turns.popleft()
            size = rows[job][waiting[job][0]]
            if size <= room or not selected:
                selected.append(waiting[job].popleft())
                room -= size
                if waiting[job]:
                    turns.append(job)
        self._rows = _to_the_end(self._rows, selected)
        self._requests = _to_the_end(self._requests, [owner[row] for row in selected])
        return selected


def _go_on(order: list[T], present: Collection[T]) -> list[T]:
    """The members of an order that are present, and behind them new ones."""
    ordered = set(order)
    return [x for x in order if x in present] + [x for x in present if x not in ordered]


def _to_the_end(order: list[T], moved: Sequence[T]) -> list[T]:
    """An order with some moved behind all others."""
    last = dict.fromkeys(moved)
    return [number for number in order if number not in last] + list(last)
