"""Middleware of every request: an id, a line in the log, a limit of its body, a key.

Plain ASGI, so that streams and disconnections pass through untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import APIError, body_for
from serve.metrics import Metrics

logger = logging.getLogger("serve.access")
failures = logging.getLogger("serve")

BODY_SECONDS = 60.0
"""Seconds that a client may take for its whole body."""

DRAINED_BYTES, DRAINED_SECONDS = 2**24, 2.0
"""Bounds of what is read of a body that is refused: closing a connection with bytes unread resets it, and the
client would lose the answer."""

OPEN = re.compile(r"/(health|ready|metrics|openapi\.json|docs(/[\w.-]+)?|page/[\w.]+)?")
"""Paths that need no key; / for GET alone."""

ID = re.compile(r"[\w.:-]{1,128}")
"""Ids that a client may give to its request."""


class _Sending:
    """Sends messages on, and notes that the response has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.begun = send, False

    async def __call__(self, message: Message) -> None:
        self.begun = True
        await self.send(message)


class Failures:
    """Answers what nobody expected to fail with a 500; the error is in the log.

    It is a middleware, and no handler of the application, whose answers would have neither an id nor CORS.

    Args:
        app: what comes behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        sending = _Sending(send)
        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            if sending.begun or scope["type"] != "http":
                raise
            failures.exception("a request failed", exc_info=error)
            failure = APIError(500, "the server failed", code="internal_error")
            await JSONResponse(body_for(scope["path"], failure), 500)(scope, receive, send)


class OllamaBodies:
    """Takes bodies of Ollama's paths as JSON, whatever they call themselves: curl says nothing of it.

    Args:
        app: what comes behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        if scope["type"] == "http" and scope["path"].startswith("/api/"):
            MutableHeaders(scope=scope)["content-type"] = "application/json"
        await self.app(scope, receive, send)


class RequestLog:
    """Gives each request an id (`x-request-id`) and writes a line about it; never its body.

    Args:
        app: what comes behind.
        json_lines: write JSON.
        bodies: write the beginning of each body too.
    """

    def __init__(self, app: ASGIApp, json_lines: bool, bodies: bool) -> None:
        self.app, self.json_lines, self.bodies = app, json_lines, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client_id = Headers(scope=scope).get("x-request-id", "")
        request_id = client_id if ID.fullmatch(client_id) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        if scope["method"] == "HEAD":  # the server leaves the body out
            scope = {**scope, "method": "GET"}
        begun, status, body = time.monotonic(), 0, bytearray()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        async def receiving() -> Message:
            message = await receive()
            if self.bodies and len(body) < 10_000:
                body.extend(message.get("body", b""))
            return message

        try:
            await self.app(scope, receiving, sending)
        finally:
            client = scope.get("client") or ("", 0)
            line = {
                "request_id": request_id,
                "client": client[0],
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.monotonic() - begun, 4),
            }
            if self.bodies:
                line["body"] = bytes(body).decode(errors="replace")
            self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self.json_lines:
            logger.info(json.dumps({"time": time.time(), **line}))
        else:
            logger.info(" ".join(f"{name}={_quoted(value)}" for name, value in line.items()))


def _quoted(value: Any) -> str:
    """A value on one line, in quotes where it could be taken for something else."""
    text = str(value)
    return text if text.isprintable() and " " not in text and '"' not in text else json.dumps(text)


class BodyLimit:
    """Refuses bodies that are too long, before they are read whole, and those that take too long.

    Args:
        app: what comes behind.
        limit: bytes.
        metrics: where to count.
    """

    def __init__(self, app: ASGIApp, limit: int, metrics: Metrics) -> None:
        self.app, self.limit, self.metrics = app, limit, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > self.limit:
            if "expect" not in Headers(scope=scope):  # else it waits with the body
                await _drain(receive)
            await self._refuse(self._too_long(), scope, receive, send)
            return
        read, complete = 0, False
        deadline = time.monotonic() + BODY_SECONDS

        async def receiving() -> Message:
            nonlocal read, complete
            try:
                message = await asyncio.wait_for(receive(), None if complete else deadline - time.monotonic())
            except TimeoutError:
                words = f"the body was not there within {BODY_SECONDS:g} seconds"
                raise _Refused(APIError(408, words, code="body_too_slow")) from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > self.limit:
                if not complete:
                    await _drain(receive)
                raise _Refused(self._too_long())
            return message

        sending = _Sending(send)
        try:
            await self.app(scope, receiving, sending)
        except _Refused as refused:
            if not sending.begun:
                await self._refuse(refused.error, scope, receive, send)

    def _too_long(self) -> APIError:
        return APIError(413, f"a body may have {self.limit} bytes at most", code="body_too_long")

    async def _refuse(self, error: APIError, scope: Scope, receive: Receive, send: Send) -> None:
        self.metrics.refused.inc(label=str(error.code))
        headers = {"Connection": "close"}
        await JSONResponse(body_for(scope["path"], error), error.status, headers)(scope, receive, send)


async def _drain(receive: Receive) -> None:
    """Read what a client is still sending, and forget it; up to `DRAINED_BYTES` and `DRAINED_SECONDS`."""
    read = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAINED_SECONDS):
            while read < DRAINED_BYTES:
                message = await receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


class _Refused(BaseException):
    """Raised through the application, past its handlers of exceptions."""

    def __init__(self, error: APIError) -> None:
        super().__init__(error.message)
        self.error = error


class Keys:
    """Lets those pass who send a key, `Authorization: Bearer …`; some paths are open to all.

    Args:
        app: what comes behind.
        keys: those that are accepted; none for an open server.
        metrics: where to count.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.keys = [key.encode("utf-8", "surrogateescape") for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI application."""
        if scope["type"] != "http" or not self.keys or self._is_open(scope) or self._has_key(scope):
            await self.app(scope, receive, send)
            return
        self.metrics.refused.inc(label="invalid_api_key")
        message = "this server needs a key, sent as 'Authorization: Bearer KEY'"
        error = APIError(401, message, code="invalid_api_key")
        body = body_for(scope["path"], error)
        await JSONResponse(body, error.status, error.headers)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS":
            return True
        return scope["method"] in ("GET", "HEAD") and OPEN.fullmatch(scope["path"]) is not None

    def _has_key(self, scope: Scope) -> bool:
        header = Headers(scope=scope).get("authorization", "").encode("latin-1")  # as it came
        kind, _, key = header.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), valid) for valid in self.keys]  # all, in equal time
        return kind.lower() == b"bearer" and any(matches)
