"""Server-sent events: the one way in which streams are written."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent

from serve.errors import APIError, body_for

Events = AsyncGenerator[ServerSentEvent, None]

SEND_SECONDS = 60
"""Seconds that a client may take for one event."""

PING_SECONDS = 15
"""Seconds between comments that keep an idle connection open."""


_SEPARATORS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""Characters that some clients take for the end of a line."""


def sse_line(data: Any) -> str:
    """JSON on one line, whatever a client takes for the end of one."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_SEPARATORS)


def sse_event(data: Any, name: str | None = None) -> ServerSentEvent:
    """One event whose data is JSON."""
    return ServerSentEvent(sse_line(data), event=name, sep="\n")


def stream(
    events: Events, *, done: bool = True, error_name: str | None = None, path: str = ""
) -> EventSourceResponse:
    """A response that streams events; when the client goes away, the generator is closed.

    Args:
        events: the events; an `APIError` from them becomes the last one.
        done: end with `[DONE]`, as OpenAI does.
        error_name: name of the event of an error.
        path: of the request, whose interface has a form of its own for errors.
    """
    guarded = _with_error(events, done, error_name, path)
    return EventSourceResponse(guarded, ping=PING_SECONDS, sep="\n", send_timeout=SEND_SECONDS)


async def _with_error(events: Events, done: bool, error_name: str | None, path: str) -> Events:
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except APIError as error:
        yield sse_event(body_for(path, error), error_name)
    if done:
        yield ServerSentEvent("[DONE]", sep="\n")
