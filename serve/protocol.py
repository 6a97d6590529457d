"""HTTP with a bound on the time that a client takes for the head of a request; uvicorn has none."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS = 20.0
"""Seconds from the first byte of a request, or from the connection, until its head must be there."""


class TimedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol; it closes connections on which a head takes too long.

    Bodies have a bound of their own, see `serve.middleware.BodyLimit`.
    """

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take up a connection."""
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; those behind an answer begin the next request."""
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self._clock is None:
            self._start()
        previous = self.cycle
        super().data_received(data)
        if self.cycle is not previous:
            self._stop()

    def _start(self) -> None:
        self._clock = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
