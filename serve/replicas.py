"""Replicas of the server with Ray Serve: `dlm serve --replicas N`, and the application of a RayService.

A replica is a process with a model, a worker and the application of `serve.app`. Ray places replicas, sends
each request to the less busy one of two, and replaces those that die. The front (`serve.front`) is this
process, or behind Ray's own proxy a deployment of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import RayServeException
from starlette.types import Message, Scope

from dlm.checkpoint import is_causal_lm
from dlm.errors import ConfigError, DLMError, first_line
from serve.app import create_app
from serve.config import ServeConfig
from serve.errors import APIError
from serve.front import Front, ReplicaLostError
from serve.metrics import Metrics
from serve.server import make_worker

logger = logging.getLogger("serve")

APP_NAME = "dlm"
"""Of the application in Ray Serve."""

LOST = (RayActorError, WorkerCrashedError, RayServeException)
"""Errors of a call whose replica died or was taken away."""

STORE_BYTES = 128 << 20
"""Ray's store of objects on this machine; messages are small."""

PROBES = 64
"""Requests beyond those that work or wait which a replica takes up: probes, the page, refusals."""


class Replica:
    """A model behind the application, as a deployment of Ray Serve.

    Args:
        config: settings of the server.
    """

    def __init__(self, config: ServeConfig) -> None:
        import torch

        resources = ray.get_runtime_context().get_assigned_resources()
        torch.set_num_threads(max(1, int(resources.get("CPU", 1))))
        self.name: str = ray_serve.get_replica_context().replica_id.unique_id
        self._metrics = Metrics(config.served_name)
        self.worker = make_worker(config, self._metrics)
        self._app = create_app(self.worker, config, self._metrics)
        self.worker.start()
        self.worker.loaded.result()  # Ray sends requests once this returns

    def check_health(self) -> None:
        """End this process when its worker has died: others answer its requests, and Ray starts another."""
        if not self.worker.alive and not self.worker.draining:
            os._exit(1)

    async def ping(self) -> None:
        """Show that the replica answers."""

    async def metrics(self) -> tuple[str, str]:
        """Name of the replica, and its numbers as text for Prometheus."""
        return self.name, self._metrics.text().decode()

    async def drain(self) -> None:
        """Refuse what has not begun."""
        self.worker.drain()

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """The ASGI messages of the application's answer to a request, after an empty one at once."""
        self.check_health()
        yield {}
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            return await asyncio.Future()  # a client that goes away cancels the task below

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Handle:
    """The replicas, as the front calls them.

    Args:
        handle: of the deployment.
        timeout: seconds that a request waits for a replica, while all are started anew; 0 for ever.
    """

    def __init__(self, handle: Any, timeout: float) -> None:
        self._handle, self._timeout = handle, timeout
        self._stream = handle.options(stream=True)

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """See `Replicas`."""
        messages = self._stream.answer.remote(scope, body)
        try:
            await asyncio.wait_for(anext(messages), self._timeout or None)  # a replica has it
            async for message in messages:
                yield message
        except TimeoutError as error:
            raise APIError(503, "there is no replica to answer", code="no_replica") from error
        except LOST as error:
            raise ReplicaLostError(first_line(error)) from error
        finally:
            messages.cancel()

    async def ping(self) -> None:
        """See `Replicas`."""
        try:
            await self._handle.ping.remote()
        except LOST as error:
            raise ReplicaLostError(first_line(error)) from error

    async def metrics(self) -> dict[str, str]:
        """See `Replicas`."""
        return {item[0]: item[1] for item in await self._all("metrics") if isinstance(item, tuple)}

    async def drain(self) -> None:
        """Have all replicas refuse what has not begun."""
        with contextlib.suppress(ReplicaLostError):
            await self._all("drain")

    async def _all(self, method: str) -> list[Any]:
        try:
            return list(await self._handle.broadcast(method).results_async(return_exceptions=True))
        except LOST as error:
            raise ReplicaLostError(first_line(error)) from error


class Cluster:
    """The replicas and their front, with the life cycle of a `Worker`.

    Args:
        config: settings of the server.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.front = Front(config)
        self.loaded: Future[None] = Future()
        """Done when all replicas are ready."""
        self._handle: Handle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dlm-replicas", daemon=True)

    @property
    def draining(self) -> bool:
        """True when no further request is taken."""
        return self.front.draining

    @property
    def ready(self) -> bool:
        """True when requests will be answered."""
        return self.loaded.done() and self.loaded.exception() is None and not self.draining

    @property
    def idle(self) -> bool:
        """True when no request is being answered."""
        return self.front.idle

    def start(self) -> None:
        """Begin to start the replicas. To be called on the event loop of the front."""
        self._loop = asyncio.get_running_loop()
        self.loaded.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it
        self._thread.start()

    def drain(self) -> None:
        """Refuse requests that have not begun. To be called on the event loop of the front."""
        self.front.draining = True
        if self._handle is not None:
            self._draining = asyncio.ensure_future(self._handle.drain())

    def stop(self, timeout: float | None = 30.0) -> None:
        """Give up all requests and end the replicas; waits for that `timeout` seconds at most."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.front.abort)
        self._stopping.set()
        if self.loaded.done():  # while they start, they end with this process
            self._thread.join(timeout)

    def _run(self) -> None:
        """Start the replicas, and end them: Ray's processes die with the thread that started them."""
        try:
            handle = deploy(self.config)
        except BaseException as error:
            self.loaded.set_exception(error)
        else:
            self._handle = self.front.replicas = Handle(handle, self.config.timeout)
            self.loaded.set_result(None)
        self._stopping.wait()
        if joins() and ray.is_initialized():  # a cluster of its own ends as a whole
            with contextlib.suppress(Exception):
                ray_serve.delete(APP_NAME)
        ray.shutdown()


def joins() -> bool:
    """True when the replicas go to a Ray cluster that is there, that of RAY_ADDRESS."""
    return bool(os.environ.get("RAY_ADDRESS"))


def deploy(config: ServeConfig) -> Any:
    """Start the replicas; returns the handle of their deployment when all are ready.

    Raises:
        CheckpointError: when there is no such model.
        ConfigError: when the machines have too few GPUs.
        DLMError: when the replicas do not start.
    """
    is_causal_lm(config.model)
    start_ray(config)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = placement(config, nodes)
    try:
        return ray_serve.run(deployment(config, cpus, gpus), name=APP_NAME, route_prefix=None)
    except (RayError, RayServeException, RuntimeError) as error:
        raise DLMError(f"the replicas did not start: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """The last line of an error that Ray reports with the traceback of another process."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def start_ray(config: ServeConfig) -> None:
    """Join the cluster of RAY_ADDRESS, or start one here, for this process alone, with a token of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray gives its processes little of a busy machine
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not joins():
        if not any(name.startswith("RAY_AUTH_") for name in os.environ):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # otherwise Ray writes one to the home
        limit = max(config.replicas, config.max_replicas)
        cores = max(len(os.sched_getaffinity(0)), limit)
        settings |= {
            "address": "local",
            "num_cpus": cores,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
        }
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ray.init(**settings)
    ray_serve.start(proxy_location="Disabled")


def placement(config: ServeConfig, nodes: Sequence[dict[str, float]]) -> tuple[int, int]:
    """CPUs and GPUs of one replica: one GPU where there are any, and an equal part of the CPUs.

    Args:
        config: how many replicas, and their device.
        nodes: resources of the machines, by Ray's names.

    Raises:
        ConfigError: when there are too few GPUs.
    """
    limit = max(config.replicas, config.max_replicas)
    devices = int(sum(node.get("GPU", 0) for node in nodes))
    gpus = int(config.device == "cuda" or (config.device == "auto" and devices > 0))
    if gpus and devices < config.replicas:
        raise ConfigError(
            f"--replicas {config.replicas} needs as many GPUs, and there are {devices}: "
            f"give fewer replicas, or --device cpu"
        )
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    fitting = (n for n in range(max(cpus, default=1), 0, -1) if sum(c // n for c in cpus) >= limit)
    return next(fitting, 1), gpus


def deployment(config: ServeConfig, cpus: int, gpus: int) -> Any:
    """The replicas as an application of Ray Serve, not yet running.

    Args:
        config: settings of the server. Keys stay with the front.
        cpus: of each replica; as many threads compute.
        gpus: of each replica.
    """
    inner = replace(config, api_key=[], api_key_file="", log_prompts=False)
    settings: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas > config.replicas:
        settings = {
            "autoscaling_config": {
                "min_replicas": config.replicas,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": max(1, config.max_rows // 2),
            }
        }
    return ray_serve.deployment(
        Replica,
        name="Replica",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=config.max_rows + config.max_waiting + PROBES,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=config.grace,
        max_constructor_retry_count=1,
        **settings,
    ).bind(inner)


class Ingress:
    """The front as a deployment, behind Ray's own proxy.

    Args:
        handle: of the replicas.
        config: settings of the server.
    """

    def __init__(self, handle: Any, config: ServeConfig) -> None:
        self._front = Front(config, Handle(handle, config.timeout))

    def __serve_build_asgi_app__(self) -> Any:
        """The ASGI application; called by Ray."""
        return self._front.app


def application(settings: dict[str, Any]) -> Any:
    """The application that a RayService names: `import_path: serve.replicas:application`.

    Args:
        settings: of the server, as in a file for `--config`; host and port are Ray's.

    Raises:
        ConfigError: for a setting that does not exist or cannot work.
    """
    try:
        config = ServeConfig(**{"replicas": 1, **settings})
    except TypeError as error:
        raise ConfigError(str(error)) from error
    replicas = deployment(config, cpus=1, gpus=int(config.device.startswith("cuda")))
    ingress = ray_serve.deployment(ray_serve.ingress()(Ingress), name="Front", max_ongoing_requests=10_000)
    return ingress.bind(replicas, config)
