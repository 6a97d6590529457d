"""Streams of lines, for interfaces that use no server-sent events."""

from __future__ import annotations

from anyio import create_task_group
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class LinesResponse(StreamingResponse):
    """A stream that ends as soon as its client goes away, also while it has nothing to send."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        del scope
        async with create_task_group() as group:

            async def listen() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(listen)
            await self.stream_response(send)
            group.cancel_scope.cancel()
