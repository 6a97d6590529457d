"""The process: uvicorn around the application, with a shutdown that lets running requests finish."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp

from dlm.errors import DLMError
from serve.app import create_app
from serve.config import ServeConfig
from serve.metrics import Metrics
from serve.protocol import TimedProtocol
from serve.worker import Worker

logger = logging.getLogger("serve")


def make_worker(
    config: ServeConfig, metrics: Metrics, load: Callable[[], tuple[Any, Any]] | None = None
) -> Worker:
    """A worker for the model of the settings, or for one that is loaded otherwise; not yet started."""
    load = config.load if load is None else load
    return Worker(
        load,
        max_rows=config.max_rows,
        max_positions=config.max_positions,
        metrics=metrics,
        step_positions=config.max_step_positions,
    )


class Backend(Protocol):
    """The interface of a `Worker` and of a `Cluster` of replicas."""

    loaded: Future[Any]

    @property
    def draining(self) -> bool:
        """True when no further request is taken."""
        ...

    @property
    def ready(self) -> bool:
        """True when requests will be answered."""
        ...

    @property
    def idle(self) -> bool:
        """True when no request is at work or waiting."""
        ...

    def start(self) -> None:
        """Begin to load."""
        ...

    def drain(self) -> None:
        """Refuse requests that have not begun."""
        ...

    def stop(self, timeout: float | None = ...) -> None:
        """Give up all requests and end."""
        ...


def make_backend(config: ServeConfig) -> tuple[Backend, ASGIApp]:
    """A worker or a cluster, not yet started, and the application in front of it."""
    if config.replicas:
        from serve.replicas import Cluster

        cluster = Cluster(config)
        return cluster, cluster.front.app
    metrics = Metrics(config.served_name)
    worker = make_worker(config, metrics)
    return worker, create_app(worker, config, metrics)


class Server(uvicorn.Server):
    """uvicorn's server; the first signal drains, the second ends what runs, the third stops at once.

    Args:
        config: uvicorn's.
        worker: those who answer.
        grace: seconds that running requests have to finish.
    """

    def __init__(self, config: uvicorn.Config, worker: Backend, grace: float) -> None:
        super().__init__(config)
        self.worker, self.grace = worker, grace
        self._drain: asyncio.Task[None] | None = None
        self._hurried = False
        self.failure: BaseException | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at a second signal tell all requests that it is over, at a third stop."""
        del frame
        if self._drain is not None and not self._hurried:
            self._hurried = True
            return
        if self._hurried or self.worker.draining or not self.worker.ready:
            self.should_exit = self.force_exit = True
            return
        logger.info("%s: finishing what runs, %g seconds at most", signal.Signals(sig).name, self.grace)
        self.worker.drain()
        loop = asyncio.get_running_loop()
        self._drain = loop.create_task(self._wait_for_idle())

    async def _wait_for_idle(self) -> None:
        deadline = time.monotonic() + self.grace
        while time.monotonic() < deadline and not self._hurried and not self.worker.idle:
            await asyncio.sleep(0.02)
        self.worker.stop(timeout=0)
        await asyncio.sleep(0.1)  # let the last lines go out
        self.should_exit = True

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        """Listen, and say so when the model is there."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.should_exit:
            return
        self.worker.start()
        asyncio.get_running_loop().create_task(self._announce())

    async def _announce(self) -> None:
        try:
            await asyncio.wrap_future(self.worker.loaded)
        except Exception as error:
            self.failure = error
            self.should_exit = True
            return
        for number in (signal.SIGINT, signal.SIGTERM):  # Ray has set its own meanwhile
            signal.signal(number, self.handle_exit)
        print(f"dlm serve: ready at {self.address}", flush=True)

    @property
    def address(self) -> str:
        """Address at which it listens, as a URL."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_free(host: str, port: int) -> None:
    """Refuse an address at which nothing can listen, before a model is loaded.

    Raises:
        DLMError: saying why.
    """
    try:
        for family, *_, address in socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM):
            socket.create_server(address, family=family).close()
    except OSError as error:
        of_name = isinstance(error, socket.gaierror)  # its number is none of the system's
        reason = error.strerror if of_name or not error.errno else os.strerror(error.errno)
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise DLMError(f"cannot listen on {host}, port {port} ({reason}): give another {other}") from error


def serve(config: ServeConfig) -> int:
    """Run until a signal comes; returns the exit status.

    Raises:
        DLMError: when the model cannot be loaded, or the address is taken.
    """
    check_free(config.host, config.port)
    worker, app = make_backend(config)
    if config.public and not config.keys():
        print(
            f"dlm serve: warning: {config.host} can be reached from other machines and there is no key; "
            "give --api_key_file",
            file=sys.stderr,
        )
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_config=None,
        log_level="warning",
        access_log=False,
        http=TimedProtocol,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=30,
    )
    server = Server(settings, worker, config.grace)
    try:
        server.run()
    except SystemExit as stop:
        raise DLMError(f"cannot listen on {config.host}:{config.port}: give another --port") from stop
    finally:
        worker.stop()
    if server.failure is not None:
        raise server.failure
    return 0
