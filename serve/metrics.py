"""Numbers for Prometheus; named as vLLM's where they mean the same, with the prefix `dlm:`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The numbers of one server, in a registry of its own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self.running = self._gauge("num_requests_running", "Requests of which a row is at work.")
        self.waiting = self._gauge("num_requests_waiting", "Requests of which no row has begun.")
        self.rows = self._gauge("num_rows_running", "Rows at work.")
        self.positions = self._gauge(
            "num_positions_running", "Positions of the rows at work, at their longest."
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of the prompts of finished requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens written for finished requests.")
        self.model_calls = self._counter("row_model_calls", "Model calls, counted once for each row in them.")
        self.steps = self._counter("engine_steps", "Denoising steps of the engine.")
        self.step_time = self._histogram("engine_step_seconds", "Time of one step of all rows.", SECONDS)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Time until text of a streamed answer was confirmed.", SECONDS
        )
        self.between = self._histogram(
            "inter_token_latency_seconds", "Time between two deltas of a streamed answer, a token.", SECONDS
        )
        self.end_to_end = self._histogram(
            "e2e_request_latency_seconds", "Time from arrival to the last answer of a request.", SECONDS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "Time until the first row of a request began.", SECONDS
        )
        self.tokens_per_call = self._histogram(
            "tokens_per_model_call", "Tokens written for each call of the model, by answer.",
            (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32),
        )  # fmt: skip
        self.accepted = self._counter("requests_accepted", "Requests handed to the worker.")
        self.answers = self._counter("answer_success", "Answers finished, by reason.", "finished_reason")
        self.finished = self._counter("request_success", "Requests of which every answer was finished.")
        self.failed = self._counter("request_failure", "Requests that ended with an error.", "reason")
        self.cancelled = self._counter("request_cancelled", "Requests whose client went away.")
        self.refused = self._counter("request_refused", "Requests refused before any work.", "reason")

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"dlm:{name}", text, ["model_name"], registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"dlm:{name}", text, ["model_name"], registry=self.registry, buckets=buckets)
        return histogram.labels(**self._labels)

    def _counter(self, name: str, text: str, label: str = "") -> Labelled:
        names = ["model_name", *filter(None, [label])]
        return Labelled(Counter(f"dlm:{name}", text, names, registry=self.registry), self._labels, label)


class Labelled:
    """A counter whose only open label is given as it counts."""

    def __init__(self, counter: Counter, labels: dict[str, str], label: str) -> None:
        self._counter, self._labels, self._label = counter, labels, label
        if not label:
            counter.labels(**labels)  # so that it is there before it counts

    def inc(self, amount: float = 1, label: str = "") -> None:
        """Count."""
        extra = {self._label: label} if self._label else {}
        self._counter.labels(**self._labels, **extra).inc(amount)
