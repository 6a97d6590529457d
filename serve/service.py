"""Between HTTP and the worker: jobs as something to await.

Prompts are encoded on two threads, one for short and one for long ones, so that a long one stalls neither the
event loop, nor a step, nor a short prompt.
"""

from __future__ import annotations

import asyncio
import copy
import math
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request as HTTPRequest

from decoding.engine import Update
from decoding.row_maker import RowMaker
from dlm.errors import ConfigError, DLMError
from dlm.spec import ModelSpec
from serve.config import ServeConfig
from serve.errors import APIError
from serve.job import DrainingError, ExpiredError, Job, Notice, Sample, StoppedError
from serve.metrics import Metrics
from serve.worker import Worker

T = TypeVar("T")


NAMELESS = ("dummy", "tgi")
"""Names that clients of TGI send because the interface has none: they mean the model that is there."""


LONG_BODY = 1 << 15
"""Bytes of a body from which on its prompt is encoded among the long ones: about 25 ms of work."""

MOST_UNREAD = 4096
"""Steps that a client may be behind before its request is given up."""


class Service:
    """A worker, as handlers of requests use it.

    Args:
        worker: owns the model.
        config: the limits.
        metrics: where to count.
    """

    def __init__(self, worker: Worker, config: ServeConfig, metrics: Metrics) -> None:
        self.worker, self.config, self.metrics = worker, config, metrics
        self.created = int(time.time())
        self._short, self._long = (ThreadPoolExecutor(1, f"dlm-encode-{name}") for name in ("short", "long"))
        self._of_thread = threading.local()
        self._preparing = 0
        worker.loaded.add_done_callback(self._make_rows)

    # ---- the model -----------------------------------------------------------------------------------

    def check_ready(self) -> None:
        """Refuse what cannot be answered now.

        Raises:
            APIError: 503 while the model is loaded or the server shuts down; 429 when too many wait.
        """
        self.check_loaded()
        if self.worker.draining:
            raise self._refused(503, "the server is shutting down", "draining")
        if not self.worker.ready:
            raise self._refused(503, "the model is not there", "dead")
        requests = self.worker.beyond_free + self._preparing
        if requests >= self.config.max_waiting:
            seconds = math.ceil(self.worker.row_seconds * requests / self.config.max_rows)
            waiting = self.config.max_waiting
            message = f"{waiting} requests wait already; try again later"
            raise self._refused(429, message, "queue_full", retry_after=max(1, seconds))

    def check_loaded(self) -> None:
        """Refuse what needs the model before it is there.

        Raises:
            APIError: 503.
        """
        if not self.worker.loaded.done():
            raise self._refused(503, "the model is being loaded", "loading", retry_after=2)

    def _refused(self, status: int, message: str, code: str, retry_after: int | None = None) -> APIError:
        self.metrics.refused.inc(label=code)
        return APIError(status, message, code=code, retry_after=retry_after)

    @property
    def spec(self) -> ModelSpec:
        """The model's."""
        return ModelSpec.of(self.worker.engine.model)

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.worker.engine.tokenizer

    @property
    def rows(self) -> RowMaker:
        """Makes rows of prompts; each thread has its own, as a call changes settings of its tokenizer."""
        if not hasattr(self._of_thread, "rows"):
            limit = min(self.spec.positions, self.config.max_positions)
            self._of_thread.rows = RowMaker(copy.deepcopy(self.tokenizer), self.spec, limit)
        rows: RowMaker = self._of_thread.rows
        return rows

    def _make_rows(self, loaded: Future[Any]) -> None:
        """Have both threads make their tokenizers, so that the first request does not pay for it."""
        if loaded.exception() is None:
            for thread in (self._short, self._long):
                thread.submit(lambda: self.rows)

    def check_model(self, name: str | None) -> None:
        """Refuse the name of another model.

        Raises:
            APIError: 404.
        """
        served = self.config.served_name
        if name is not None and name != served and name not in NAMELESS:
            self.metrics.refused.inc(label="model_not_found")
            message = f"the model {name!r} does not exist; this server has {served!r}"
            raise APIError(404, message, param="model", code="model_not_found")

    # ---- jobs ----------------------------------------------------------------------------------------

    async def prepare(self, http: HTTPRequest, function: Callable[[], T]) -> T:
        """Call a function that encodes the prompts of a request, on a thread for that.

        One that has not begun when its client goes away is dropped.
        """
        thread = self._long if len(await http.body()) > LONG_BODY else self._short
        self._preparing += 1
        try:
            return await self.unless_gone(http, asyncio.wrap_future(thread.submit(function)))
        finally:
            self._preparing -= 1

    def check_samples(self, samples: Sequence[Sample]) -> None:
        """Refuse rows that the server could never hold.

        Raises:
            APIError: 400, naming both numbers.
        """
        for sample in samples:
            if self.config.max_prompt and sample.row.answer_start > self.config.max_prompt:
                raise APIError(
                    400,
                    f"the prompt has {sample.row.answer_start} tokens; "
                    f"this server takes {self.config.max_prompt}",
                    code="context_length_exceeded",
                )
            if sample.positions > self.config.max_positions:
                drafts = sample.plan.drafts
                with_drafts = f", and as many for each of {drafts} drafts" if drafts else ""
                raise APIError(
                    400,
                    f"prompt and answer have {len(sample.row.ids)} tokens{with_drafts}; this server holds "
                    f"{self.config.max_positions}",
                    code="context_length_exceeded",
                )

    async def notices(
        self,
        samples: Sequence[Sample],
        *,
        watch: Callable[[Update], Any] | None = None,
        finish: Callable[[Update], Any] | None = None,
        timeout: float | None = None,
        prompt_tokens: int | None = None,
        counted: bool = True,
    ) -> AsyncGenerator[Notice, None]:
        """Decode rows; yields news of them until the last is finished. Leaving early frees the rows.

        Args:
            samples: the rows.
            watch: what is made of each step.
            finish: what is made of the end of a row; by default its output.
            timeout: seconds until they are given up; the server's by default.
            prompt_tokens: tokens of the prompts, for the metrics; by default those of the first row.
            counted: count the tokens that are written.

        Raises:
            APIError: when the rows could not be finished.
        """
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[list[Notice] | Exception] = asyncio.Queue()

        def deliver(item: list[Notice] | Exception) -> None:
            if news.qsize() > MOST_UNREAD:
                item = APIError(503, "the client reads too slowly", code="slow_client")
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(news.put_nowait, item)

        seconds = self.config.timeout if timeout is None else timeout
        deadline = time.monotonic() + seconds if seconds else None
        remaining = len(samples)
        if not remaining:
            return
        if prompt_tokens is None:
            prompt_tokens = samples[0].row.answer_start
        job = Job(samples, deliver, watch, finish, deadline, prompt_tokens, counted)
        self.worker.submit(job)
        try:
            while remaining:
                item = await news.get()
                if isinstance(item, Exception):
                    raise as_api_error(item)
                for notice in item:
                    remaining -= notice.finished
                    yield notice
        finally:
            if remaining:
                self.worker.cancel(job)

    async def results(
        self,
        samples: Sequence[Sample],
        *,
        finish: Callable[[Update], Any] | None = None,
        timeout: float | None = None,
        prompt_tokens: int | None = None,
    ) -> list[Any]:
        """The ends of all rows, in order; see `notices`."""
        results: dict[int, Any] = {}
        stream = self.notices(samples, finish=finish, timeout=timeout, prompt_tokens=prompt_tokens)
        async with aclosing(stream) as notices:
            async for notice in notices:
                results[notice.index] = notice.value
        return [results[i] for i in range(len(samples))]

    async def call(self, function: Callable[[Any], T]) -> T:
        """Call `function(model)` on the worker's thread."""
        return await asyncio.wrap_future(self.worker.call(function))

    async def unless_gone(self, http: HTTPRequest, work: Awaitable[T]) -> T:
        """Await `work`, which is cancelled when the client goes away.

        Raises:
            APIError: 499 then, which nobody will read.
        """
        task = asyncio.ensure_future(work)
        disconnected = asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise APIError(499, "the client has closed the connection", code="cancelled")
        finally:
            for future in (task, disconnected):
                future.cancel()
            await asyncio.gather(task, disconnected, return_exceptions=True)


async def _gone(http: HTTPRequest) -> None:
    """Return when the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def as_api_error(error: Exception) -> APIError:
    """The error with which a request ends, for one that its job had."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, ExpiredError):
        return APIError(504, str(error), param="timeout", code="timeout")
    if isinstance(error, DrainingError | StoppedError):
        return APIError(503, str(error), code="draining")
    if isinstance(error, ConfigError):
        return APIError(400, str(error), code="invalid_value")
    if isinstance(error, DLMError):
        return APIError(500, str(error), code="model_failure")
    return APIError(500, f"{type(error).__name__}: {error}", code="internal_error")
