"""The one thread that owns the model and its engine.

Other threads leave messages; the worker takes them between two steps, so no lock is ever held across a model
call, and whoever goes away is gone before the next step.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from decoding.answer import Output
from decoding.engine import Engine, Update
from decoding.request import Request
from dlm.errors import DLMError
from serve.job import DrainingError, ExpiredError, Job, Notice, Sample, StoppedError
from serve.metrics import Metrics
from serve.queue import Queue, Shares

logger = logging.getLogger("serve")

T = TypeVar("T")

CPU_STEP_POSITIONS = 512
"""Positions of a step on a CPU, where from about 128 on a call's time grows with its positions."""


def _on_cpu(model: Any) -> bool:
    return getattr(getattr(model, "device", None), "type", "cpu") == "cpu"


class Worker:
    """Decodes jobs on a thread of its own.

    Args:
        load: makes the model and its tokenizer; called on the worker's thread.
        max_rows: rows at work at a time.
        max_positions: positions of all rows at work, each at its longest.
        metrics: where to count.
        step_positions: positions of the rows that take a step together; 0 for no limit, None for
            `CPU_STEP_POSITIONS` where the model is on a CPU.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        *,
        max_rows: int,
        max_positions: int,
        metrics: Metrics,
        step_positions: int | None = None,
    ) -> None:
        self.metrics = metrics
        self.max_rows, self.max_positions = max_rows, max_positions
        self._load = load
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._queue: Queue[Job] = Queue(max_rows, max_positions)
        self._step_positions = step_positions
        self._shares: Shares[int, int] = Shares(step_positions or 0)
        self._jobs: dict[int, tuple[Job, int]] = {}  # by ticket
        self._engine: Engine | None = None
        self._stopping = self._ended = False
        self._open: dict[int, Job] = {}  # by number: taken up, and not yet told their end
        self._holds = 0
        self._waiting = 0
        self.draining = False
        self.loaded: Future[tuple[Any, Any]] = Future()
        """The model and its tokenizer, when they are there and warm."""
        self.row_seconds = 1.0
        """Moving average of the time that a row is at work."""
        self._thread = threading.Thread(target=self._run, name="dlm-worker", daemon=True)

    # ---- for other threads ---------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the model, and then to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once the worker has ended, or died."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """True when requests will be answered."""
        done = self.loaded.done() and self.loaded.exception() is None
        return done and self.alive and not self.draining

    @property
    def engine(self) -> Engine:
        """The engine; only its `spec`-like properties may be used by other threads."""
        assert self._engine is not None
        return self._engine

    @property
    def waiting(self) -> int:
        """Requests of which no row has begun, those in the inbox included."""
        return self._waiting + self._inbox.qsize()

    @property
    def beyond_free(self) -> int:
        """Requests that wait for a row: those that cannot begin, and the inbox less the rows that are free.

        Below 0 where there are more free rows.
        """
        free = 0 if self._waiting or self._engine is None else max(0, self.max_rows - self._engine.running)
        return self.waiting - free

    @property
    def idle(self) -> bool:
        """True when no request is at work or waiting."""
        return not self._open and not self._holds and self._inbox.empty()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Count as busy meanwhile; for requests of several jobs; on the event loop alone."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    def submit(self, job: Job) -> None:
        """Take up a job; its news come through `Job.deliver`."""
        self.metrics.accepted.inc()
        self._open[job.number] = job
        self._post(lambda: self._take(job))

    def cancel(self, job: Job) -> None:
        """Forget a job, before the next step; one that has ended already is left alone."""
        self._post(lambda: self._cancel(job))

    def call(self, function: Callable[[Any], T]) -> Future[T]:
        """Call `function(model)` on the worker's thread, between two steps; `StoppedError` after its end."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    if self._ended:
                        raise StoppedError("the server has stopped")
                    future.set_result(function(self.engine.model))
                except Exception as error:
                    future.set_exception(error)

        self._post(run)
        return future

    def drain(self) -> None:
        """Refuse jobs that have not begun; those at work go on."""
        self.draining = True
        self._inbox.put(self._refuse_waiting)

    def stop(self, timeout: float | None = 5.0) -> None:
        """End the thread before its next step; jobs that are not finished are told at once."""
        self.draining = True
        self._tell_end()
        self._inbox.put(self._end)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    # ---- the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            model, tokenizer = self._load()
            self._engine = Engine(model, tokenizer)
            if self._step_positions is None and _on_cpu(model):
                self._shares.budget = CPU_STEP_POSITIONS
            self._warm_up()
        except BaseException as error:
            self.loaded.set_exception(error)
            return
        self.loaded.set_result((model, tokenizer))
        try:
            while self._read_inbox():
                self._expire()
                self._admit()
                if len(self.engine):
                    self._step()
                self._measure()
        finally:
            self.draining = True
            self._end()
            self._ended = True
            self._clear_inbox()
            self._tell_end()

    def _tell_end(self) -> None:
        """Tell all open jobs that they will not be finished; on any thread, without waiting for a step."""
        for number in list(self._open):
            job = self._open.pop(number, None)
            if job is not None:
                self.metrics.failed.inc(label="stopped")
                job.deliver(StoppedError("the server has stopped"))

    def _post(self, message: Callable[[], None]) -> None:
        """Leave a message for the thread; after its end, act on it here, so that nobody waits in vain."""
        self._inbox.put(message)
        if self._ended:
            self._clear_inbox()

    def _clear_inbox(self) -> None:
        """Act on all messages, without waiting for one."""
        with contextlib.suppress(Empty):
            while True:
                self._inbox.get_nowait()()

    def _warm_up(self) -> None:
        """Answer a word, so that the first request does not pay for what is made on first use."""
        engine = self.engine
        engine.submit("a", Request(max_tokens=4).resolve(engine.model))
        while len(engine):
            engine.step()

    def _read_inbox(self) -> bool:
        """Act on all messages; waits for one where there is nothing else to do. False to stop."""
        if not len(self.engine) and not self._queue:
            self._inbox.get()()
        self._clear_inbox()
        return not self._stopping

    def _take(self, job: Job) -> None:
        if self.draining:
            self._fail(job, DrainingError("the server is shutting down"), "draining")
            return
        if job.number not in self._open:
            return
        self._queue.add(job, [sample.positions for sample in job.samples])

    def _cancel(self, job: Job) -> None:
        self._forget(job)
        if self._open.pop(job.number, None) is not None:
            self.metrics.cancelled.inc()

    def _forget(self, job: Job) -> None:
        """Take a job's rows out of the queue and the engine, if they are there."""
        if job not in self._queue:
            return
        self._queue.remove(job)
        for ticket in job.tickets.values():
            del self._jobs[ticket]
            with contextlib.suppress(KeyError):  # finished in this very step
                self.engine.cancel(ticket)
        job.tickets.clear()

    def _fail(self, job: Job, error: Exception, reason: str) -> None:
        """End a job with an error, unless it has been told its end already."""
        self._forget(job)
        if self._open.pop(job.number, None) is not None:
            self.metrics.failed.inc(label=reason)
            job.deliver(error)

    def _refuse_waiting(self) -> None:
        for job in self._queue.waiting_jobs():
            self._fail(job, DrainingError("the server is shutting down"), "draining")

    def _end(self) -> None:
        self._stopping = True
        for job in self._queue.jobs():
            self._fail(job, StoppedError("the server has stopped"), "stopped")

    def _expire(self) -> None:
        time_now = time.monotonic()
        for job in self._queue.jobs():
            if job.deadline is not None and time_now >= job.deadline:
                seconds = job.deadline - job.arrived
                self._fail(
                    job, ExpiredError(f"the request was not finished in {seconds:g} seconds"), "timeout"
                )

    def _admit(self) -> None:
        for job, index in self._queue.admit():
            if job not in self._queue:
                continue  # another of its rows has been refused
            sample: Sample = job.samples[index]
            try:
                ticket = self.engine.submit(sample.row, sample.plan, sample.seed)
            except Exception as error:
                self._fail(job, error, "invalid")
                continue
            if job.begun is None:
                job.begun = time.monotonic()
                self.metrics.queue_time.observe(job.begun - job.arrived)
            job.tickets[index] = ticket
            self._jobs[ticket] = (job, index)

    def _step(self) -> None:
        """One step of all rows, and the news of it."""
        begun = time.perf_counter()
        try:
            updates = self.engine.step(self._chosen())
        except Exception as error:
            self._start_again(error)
            return
        self.metrics.steps.inc()
        news: dict[Job, list[Notice]] = {}
        for update in updates:
            job, index = self._jobs.get(update.ticket, (None, 0))
            if job is None:
                continue  # another of its rows has failed in this step
            try:
                self._follow(job, index, update, news.setdefault(job, []))
            except Exception as error:
                news.pop(job, None)
                if not isinstance(error, DLMError):
                    logger.exception("an answer could not be read")
                self._fail(job, error, "model")
        for job, notices in news.items():
            if notices:
                job.deliver(notices)
        self.metrics.step_time.observe(time.perf_counter() - begun)

    def _chosen(self) -> set[int] | None:
        """Tickets of the rows that take the next step; None for all."""
        if not self._shares.budget:
            return None
        rows: dict[int, dict[int, int]] = {}  # by number of the job, so that none is held in memory
        for ticket, length in self.engine.lengths().items():
            job, index = self._jobs[ticket]
            rows.setdefault(job.number, {})[ticket] = length * (1 + job.samples[index].plan.drafts)
        return set(self._shares.choose(rows))

    def _follow(self, job: Job, index: int, update: Update, notices: list[Notice]) -> None:
        """Note what a step did to a row."""
        if not update.finished:
            if job.watch is not None and (value := job.watch(update)) is not None:
                notices.append(Notice(index, value))
            return
        del self._jobs[update.ticket], job.tickets[index]
        if type(update.error) is DLMError:  # of the model, on this row
            raise update.error
        if (cause := update.error) is not None:
            logger.error("a rule failed", exc_info=cause)
            raise DLMError(f"the model failed: {type(cause).__name__}: {cause}") from cause
        output = update.output
        assert output is not None
        notices.append(Notice(index, output if job.finish is None else job.finish(update), finished=True))
        self._queue.release(job, index)
        job.finished += 1
        self._count(job, output)

    def _count(self, job: Job, output: Output) -> None:
        metrics = self.metrics
        time_now = time.monotonic()
        self.row_seconds += 0.1 * (time_now - (job.begun or time_now) - self.row_seconds)
        metrics.model_calls.inc(output.model_calls)
        if job.counted:
            metrics.generation_tokens.inc(len(output.token_ids))
        metrics.tokens_per_call.observe(len(output.token_ids) / max(1, output.model_calls))
        metrics.answers.inc(label=output.finish_reason)
        if job.finished == len(job.samples):
            self._open.pop(job.number, None)
            metrics.finished.inc()
            metrics.prompt_tokens.inc(job.prompt_tokens)
            metrics.end_to_end.observe(time_now - job.arrived)

    def _start_again(self, error: Exception) -> None:
        """After a step that failed as a whole, go on afresh, without the jobs that fail by themselves too.

        Where none does (memory, a device), all that was at work fails.
        """
        logger.exception("a step failed")
        old = self.engine
        self._engine = Engine(old.model, old.tokenizer)
        jobs = [job for job in self._queue.jobs() if job.tickets]
        errors = [_error_alone(old, job) for job in jobs]
        self._jobs = {}
        for job, own_error in zip(jobs, errors, strict=True):
            tickets = dict(job.tickets)
            job.tickets.clear()
            if own_error is None and any(errors):
                for index, ticket in tickets.items():
                    job.tickets[index] = self.engine.add(old.canvas(ticket), job.samples[index].plan)
                    self._jobs[job.tickets[index]] = (job, index)
                continue
            cause = own_error or error
            self._fail(job, DLMError(f"the model failed: {type(cause).__name__}: {cause}"), "model")

    def _measure(self) -> None:
        queue, metrics = self._queue, self.metrics
        self._waiting = queue.waiting
        metrics.waiting.set(self._waiting)
        metrics.running.set(len(queue) - queue.waiting)
        metrics.rows.set(queue.rows)
        metrics.positions.set(queue.positions)


def _error_alone(engine: Engine, job: Job) -> Exception | None:
    """The error of a step of copies of a job's rows, nothing else beside them; None where it goes well."""
    try:
        alone = Engine(engine.model, engine.tokenizer)
        for index, ticket in job.tickets.items():
            alone.add(engine.canvas(ticket), job.samples[index].plan)
        alone.step()
    except Exception as error:
        return error
    return None
