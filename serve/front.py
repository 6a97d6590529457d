"""One address in front of several replicas of the application.

A request goes to one replica, which answers with ASGI messages. Its body is read first, so that it can be
sent again: a replica that is lost before the first byte of its answer is replaced by another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Message, Receive, Scope, Send

from dlm.version import __version__
from serve.config import ServeConfig
from serve.errors import TGI_PATHS, APIError, body_for
from serve.metrics import CONTENT_TYPE, Metrics
from serve.middleware import BodyLimit, Failures, Keys, RequestLog

logger = logging.getLogger("serve")

ATTEMPTS = 3
"""Replicas that a request may lose before it is given up; one that kills them must not kill all."""

PROBE_SECONDS = 2.0
"""Longest wait for a replica that is asked how it does."""

HTTP_KEYS = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
             "headers", "client", "server")  # fmt: skip
"""Parts of a request that a replica learns; the rest of the scope belongs to this process."""


class ReplicaLostError(Exception):
    """Raised by a call whose replica went away before it had answered."""


class Replicas(Protocol):
    """The interface of the replicas behind the front."""

    def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """The ASGI messages with which a replica answers; closing the generator cancels the request.

        Raises:
            ReplicaLostError: when the replica has gone away.
            APIError: when there is none.
        """
        ...

    async def ping(self) -> None:
        """Return once a replica has answered."""
        ...

    async def metrics(self) -> dict[str, str]:
        """Text for Prometheus of each replica, by its name."""
        ...


class Front:
    """The application in front of the replicas.

    Args:
        config: limits of bodies, keys, and how requests are logged.
        replicas: those behind it; None until they are there.
    """

    def __init__(self, config: ServeConfig, replicas: Replicas | None = None) -> None:
        self.replicas = replicas
        self.draining = False
        self._counts = Metrics(config.served_name)
        self._tasks: set[asyncio.Task[None]] = set()
        app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Mount("", app=self._forward),
            ]
        )
        app.add_middleware(Failures)
        app.add_middleware(BodyLimit, limit=config.max_body, metrics=self._counts)
        app.add_middleware(Keys, keys=config.keys(), metrics=self._counts)
        app.add_middleware(RequestLog, json_lines=config.log_format == "json", bodies=config.log_prompts)
        self.app = app

    @property
    def idle(self) -> bool:
        """True when no request is being answered."""
        return not self._tasks

    def abort(self) -> None:
        """Give up all requests; their clients are told. To be called on the event loop."""
        self.draining = True
        for task in self._tasks:
            task.cancel()

    # ---- its own paths -------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive", "version": __version__})

    async def _ready(self, request: Request) -> Response:
        if self.draining or self.replicas is None:
            return JSONResponse({"status": "draining" if self.draining else "loading"}, 503)
        try:
            await asyncio.wait_for(self.replicas.ping(), PROBE_SECONDS)
        except (TimeoutError, ReplicaLostError):
            return JSONResponse({"status": "loading"}, 503)
        return JSONResponse({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        texts = {"front": self._counts.text().decode()}
        if self.replicas is not None:
            with contextlib.suppress(TimeoutError, ReplicaLostError):
                texts |= await asyncio.wait_for(self.replicas.metrics(), PROBE_SECONDS)
        return Response(merge_metrics(texts), media_type=CONTENT_TYPE)

    # ---- all others ----------------------------------------------------------------------------------

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000})
            return
        body = await _body(receive)
        if body is None:
            return
        exchange = _Exchange(send, scope["path"])
        task = asyncio.ensure_future(self._answer(_plain(scope), body, exchange))
        disconnected = asyncio.ensure_future(_disconnect(receive))
        self._tasks.add(task)
        try:
            await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if task.cancelled():
                await exchange.fail(APIError(503, "the server has stopped", code="draining"))
            elif task.done():
                task.result()
        finally:
            for future in (task, disconnected):
                future.cancel()
            await asyncio.gather(task, disconnected, return_exceptions=True)
            self._tasks.discard(task)

    async def _answer(self, scope: Scope, body: bytes, exchange: _Exchange) -> None:
        """Ask one replica after the other until one has answered."""
        for attempt in range(1, ATTEMPTS + 1):
            if self.draining or self.replicas is None:
                await exchange.fail(self._refusal())
                return
            exchange.reset()
            try:
                async with aclosing(self.replicas.answer(scope, body)) as messages:
                    async for message in messages:
                        await exchange.take(message)
                return
            except ReplicaLostError as error:
                logger.warning("a replica was lost (attempt %d of %d): %s", attempt, ATTEMPTS, error)
                if exchange.started:
                    break
            except APIError as error:
                await exchange.fail(error)
                return
            except Exception:
                logger.exception("a request failed")
                await exchange.fail(APIError(500, "the server failed", code="internal_error"))
                return
        self._counts.failed.inc(label="replica_lost")
        await exchange.fail(APIError(503, "the replica that answered was lost", code="replica_lost"))

    def _refusal(self) -> APIError:
        if self.draining:
            return APIError(503, "the server is shutting down", code="draining")
        return APIError(503, "the model is being loaded", code="loading", retry_after=2)


class _Exchange:
    """The answer to one request: its head is held back until the first byte of its body is there.

    Args:
        send: ASGI's.
        path: of the request, whose interface has a form of its own for errors.
    """

    def __init__(self, send: Send, path: str) -> None:
        self._send, self._path = send, path
        self._head: Message | None = None
        self._stream = False
        self.started = False

    def reset(self) -> None:
        """Forget a head that has not been sent."""
        self._head = None

    async def take(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self._head = message
            return
        if not self.started and (message.get("body") or not message.get("more_body")):
            await self._begin()
        if self.started:
            await self._send(message)

    async def _begin(self) -> None:
        assert self._head is not None
        self.started = True
        kind = Headers(raw=list(self._head["headers"])).get("content-type", "")
        self._stream = kind.startswith("text/event-stream")
        await self._send(self._head)

    async def fail(self, error: APIError) -> None:
        """End with an error: its status, or the last event of a stream; other answers are cut off."""
        if not self.started:
            headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
            headers.append((b"content-type", b"application/json"))
            self._head = {"type": "http.response.start", "status": error.status, "headers": headers}
            await self._begin()
            body = json.dumps(body_for(self._path, error)).encode()
            await self._send({"type": "http.response.body", "body": body})
        elif self._stream:
            name = "" if self._path in TGI_PATHS else "event: error\n"
            text = f"{name}data: {json.dumps(body_for(self._path, error))}\n\n"
            await self._send({"type": "http.response.body", "body": text.encode()})


async def _body(receive: Receive) -> bytes | None:
    """The whole body of a request; None when the client went away."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _disconnect(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _plain(scope: Scope) -> Scope:
    """The part of a scope that can travel, with the id under which this process logs the request."""
    plain: dict[str, Any] = {key: scope[key] for key in HTTP_KEYS if key in scope}
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"] if name != b"x-request-id"]
    request_id = scope.get("state", {}).get("request_id", "")
    plain["headers"] = [*headers, (b"x-request-id", request_id.encode())]
    return plain


def merge_metrics(texts: dict[str, str]) -> bytes:
    """Texts for Prometheus as one, each sample with the label `replica`: the name of where it was counted."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                merged.samples.append(sample._replace(labels=labels))
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)


class _Families(Collector):
    """Numbers that are there already, for a registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        return iter(self._families)
