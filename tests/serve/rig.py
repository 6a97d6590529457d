"""A real server on a real port, in a thread of the test."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import httpx2 as httpx
import uvicorn

from serve.app import create_app
from serve.config import ServeConfig
from serve.metrics import Metrics
from serve.protocol import TimedProtocol
from serve.server import make_worker


class Running:
    """A server that runs until `stop`.

    Args:
        model: or a function that loads one, (model, tokenizer).
        tokenizer: the model's.
        **settings: of `ServeConfig`.
    """

    def __init__(self, model, tokenizer=None, **settings):
        self.config = ServeConfig(**{"model": "tiny", "port": 0, **settings})
        self.metrics = Metrics(self.config.served_name)
        load = model if tokenizer is None else lambda: (model, tokenizer)
        self.worker = make_worker(self.config, self.metrics, load)
        self.app = create_app(self.worker, self.config, self.metrics)
        self.socket = socket.create_server(("127.0.0.1", self.config.port))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        quiet = {"log_config": None, "log_level": "error", "access_log": False}
        settings = uvicorn.Config(self.app, http=TimedProtocol, **quiet)
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        self.worker.start()
        self.client = httpx.Client(base_url=self.url, timeout=60)
        wait_for(lambda: self.server.started)

    def ready(self):
        """This server, once its model is there."""
        self.worker.loaded.result(60)
        return self

    def post(self, path, **body):
        """A response."""
        return self.client.post(path, json=body)

    def metric(self, name, **labels):
        """The value of one number of /metrics, 0 where it has not counted; without labels, the sum."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(f"dlm:{name}{{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    @property
    def rows(self):
        """Rows in the engine and in the queue."""
        return len(self.worker.engine) + len(self.worker._queue) + len(self.worker._jobs)

    def stop(self):
        """End the server and its worker."""
        self.server.should_exit = True
        self.worker.stop()
        self.thread.join(10)
        self.client.close()


def wait_for(true, seconds=30.0):
    """Wait until `true()` is."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def running(*args, **settings):
    """A server for a while."""
    server = Running(*args, **settings).ready()
    try:
        yield server
    finally:
        server.stop()


def events(response):
    """Data of the events of a stream, as (name, JSON or text)."""
    import json

    out, name = [], None
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            data = line[6:]
            out.append((name, data if data == "[DONE]" else json.loads(data)))
            name = None
    return out


def stream_of(server, path, **body):
    """The data of the events of a streamed response."""
    with server.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return [data for _, data in events(response)]
