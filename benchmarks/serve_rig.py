"""A server in a thread of this process, and the faults that its model can be given.

The model's worker and the event loop share the interpreter as they do under `dlm serve`; the clients have a
process of their own (`benchmarks.serve_load`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn

from decoding.engine import Engine, Update
from serve.app import create_app
from serve.config import ServeConfig
from serve.job import Job
from serve.metrics import Metrics
from serve.protocol import TimedProtocol
from serve.server import make_worker
from serve.worker import Worker

logger = logging.getLogger("serve")

ROOT = Path(__file__).resolve().parents[1]


class Standing:
    """A server that stands until it is stopped, and writes no log: injected faults would fill it.

    Args:
        model: served.
        tokenizer: the model's.
        **settings: of `ServeConfig`.
    """

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        self.config = ServeConfig(**{"model": "benchmark", "port": 0, **settings})
        self.metrics = Metrics(self.config.served_name)
        self.worker: Worker = make_worker(self.config, self.metrics, lambda: (model, tokenizer))
        app = create_app(self.worker, self.config, self.metrics)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        quiet: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False}
        config = uvicorn.Config(app, http=TimedProtocol, timeout_graceful_shutdown=5, **quiet)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self.socket],), daemon=True)

    def __enter__(self) -> Standing:
        """Start it; returns when it is ready."""
        logger.disabled = True
        self._thread.start()
        self.worker.start()
        self.worker.loaded.result(300)
        wait_until(lambda: self._server.started, 60)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self._server.should_exit = True
        self.worker.stop()
        self._thread.join(10)
        logger.disabled = False

    def total(self, name: str) -> dict[str, int]:
        """Values of a counter by its label, "" for a counter without one."""
        for family in self.metrics.registry.collect():
            if family.name == f"dlm:{name}":
                return {
                    "".join(v for k, v in s.labels.items() if k != "model_name"): int(s.value)
                    for s in family.samples
                    if s.name.endswith("_total")
                }
        raise KeyError(name)

    def remains(self) -> dict[str, float]:
        """Sizes of the engine, the queue and memory; all 0 when no request is at work."""
        value = self.metrics.registry.get_sample_value
        labels = {"model_name": self.config.served_name}
        gauges = ("num_rows_running", "num_positions_running", "num_requests_running", "num_requests_waiting")
        gc.collect()
        return {
            "rows in the engine": len(self.worker.engine),
            "jobs in memory": sum(type(each) is Job for each in gc.get_objects()),
            **{name: value(f"dlm:{name}", labels) or 0.0 for name in gauges},
        }


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, for so many seconds at most; returns it."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return value


def load_process(task: dict[str, Any], seconds: float = 3600.0) -> dict[str, Any]:
    """The result of a task of `benchmarks.serve_load`, from a process that ends within these seconds."""
    command = [sys.executable, "-m", "benchmarks.serve_load"]
    done = subprocess.run(
        command,
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        timeout=seconds,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class StepTimes:
    """Times of all steps of engines, taken while it is entered as a context.

    Attributes:
        rows: rows of each step.
        spans: begin and end of each step, in seconds.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.spans: list[tuple[float, float]] = []
        self._full: list[bool] = []

    def __enter__(self) -> StepTimes:
        """Begin to take times."""
        self._step = Engine.step

        def step(engine: Engine, *chosen: Any) -> list[Update]:
            begun = time.perf_counter()
            updates = self._step(engine, *chosen)
            self.spans.append((begun, time.perf_counter()))
            self.rows.append(len(updates))
            self._full.append(len(engine) > 0)
            return updates

        Engine.step = step  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the engines as they were."""
        Engine.step = self._step  # type: ignore[method-assign]

    def durations(self) -> list[float]:
        """Seconds of each step."""
        return [end - begin for begin, end in self.spans]

    def gaps(self) -> list[float]:
        """Seconds from each step to the next, where rows remained, so that nobody waited for a request."""
        pairs = zip(self.spans, self.spans[1:], self._full, strict=False)
        return [after[0] - before[1] for before, after, full in pairs if full]


class Faulty:
    """A model that fails at random: NaN in one row, an exception, or a slow call.

    Args:
        model: the model.
        rates: probability of each fault in a call, by name: "nan", "exception", "slow".
        seed: of the faults.
    """

    def __init__(self, model: Any, rates: dict[str, float], seed: int = 0) -> None:
        self.model, self.rates = model, rates
        self.injected: Counter[str] = Counter()
        self._rng = random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def _draw(self) -> bool:
        """Draw the faults of a call; True for NaN."""
        drawn = [name for name, rate in self.rates.items() if self._rng.random() < rate]
        self.injected.update(drawn)
        if "slow" in drawn:
            time.sleep(self._rng.uniform(0.02, 0.1))
        if "exception" in drawn:
            raise RuntimeError("a fault was injected")
        return "nan" in drawn

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L] -> [B, L, D]."""
        nan = self._draw()
        hidden: torch.Tensor = self.model.hidden(input_ids, attention_mask)
        if nan:
            hidden[self._rng.randrange(len(hidden))] = torch.nan
        return hidden

    def packed_hidden(self, input_ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """[N] -> [N, D]."""
        nan = self._draw()
        hidden: torch.Tensor = self.model.packed_hidden(input_ids, lengths)
        if nan:
            row = self._rng.randrange(len(lengths))
            begin = sum(lengths[:row])
            hidden[begin : begin + lengths[row]] = torch.nan
        return hidden


@contextlib.contextmanager
def sampled(read: Callable[[], float], every: float) -> Iterator[list[float]]:
    """Values of a function, read now and then by a thread while the context lasts."""
    values: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(every):
            values.append(read())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield values
    finally:
        over.set()
        thread.join()
