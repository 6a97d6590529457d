"""The front with replicas that die on cue: which requests are asked again, and how the others end."""

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="the server is not installed: pip install '.[serve]'")

from prometheus_client.parser import text_string_to_metric_families

from serve.config import ServeConfig
from serve.errors import APIError
from serve.front import ATTEMPTS, Front, ReplicaLostError, merge_metrics
from serve.metrics import Metrics

SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]


def start(headers=JSON, status=200):
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data, more=False):
    return {"type": "http.response.body", "body": data, "more_body": more}


class Scripted:
    """Replicas of which each call plays the next script: messages, an exception, or a pause without end."""

    def __init__(self, *scripts):
        self.scripts, self.calls, self.cancelled = list(scripts), [], 0

    async def answer(self, scope, body):
        self.calls.append((scope, body))
        script = self.scripts.pop(0)
        try:
            for item in script:
                if isinstance(item, Exception):
                    raise item
                if item is ...:
                    await asyncio.Future()
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    async def ping(self):
        await self._play()

    async def metrics(self):
        await self._play()
        return {"a": "x_total 1\n", "b": "x_total 2\n"}

    async def _play(self):
        for item in self.scripts[0] if self.scripts else ():
            if isinstance(item, Exception):
                raise item
            if item is ...:
                await asyncio.Future()


LOST = ReplicaLostError("gone")


def ask(
    replicas, path="/v1/completions", *, data=b'{"seed":1}', headers=(), method="POST", leave=None, **settings
):
    """The messages that a client gets; it leaves when `leave(messages)` says so."""

    async def run():
        front = Front(ServeConfig(**settings), replicas)
        sent, left = [], asyncio.Event()
        parts = [data[:4], data[4:]]

        async def receive():
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if leave == len(sent):
                left.set()

        if leave == 0:
            asyncio.get_running_loop().call_later(0.05, left.set)
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": list(headers), "client": ("10.0.0.9", 1), "server": ("h", 1), "scheme": "http",
            "http_version": "1.1", "root_path": "",
        }  # fmt: skip
        await asyncio.wait_for(front.app(scope, receive, send), 10)
        assert front.idle
        return sent

    return asyncio.run(run())


def content(sent):
    return b"".join(message.get("body", b"") for message in sent)


def error_of(sent):
    return json.loads(content(sent))["error"]


def test_an_answer_passes_and_the_replica_sees_the_request_as_it_was():
    replicas = Scripted([start(), body(b"{}")])
    sent = ask(
        replicas, "/v1/chat/completions", headers=[(b"authorization", b"Bearer k"), (b"x-request-id", b"r1")]
    )
    scope, data = replicas.calls[0]
    assert (sent[0]["status"], content(sent)) == (200, b"{}")
    assert data == b'{"seed":1}'
    assert scope["path"] == "/v1/chat/completions"
    assert (b"authorization", b"Bearer k") in scope["headers"]
    assert [value for name, value in scope["headers"] if name == b"x-request-id"] == [b"r1"]
    assert "app" not in scope


def test_chunks_pass_one_by_one():
    sent = ask(Scripted([start(SSE), body(b"a", True), body(b"b", True), body(b"")]))
    assert [message.get("body") for message in sent] == [None, b"a", b"b", b""]


@pytest.mark.parametrize("script", [[LOST], [start(SSE), LOST], [start(SSE), body(b"", True), LOST]])
def test_a_replica_lost_before_the_first_byte_is_replaced_by_another(script):
    replicas = Scripted(script, [start(), body(b"done")])
    sent = ask(replicas)
    assert content(sent) == b"done"
    assert [message["type"] for message in sent].count("http.response.start") == 1
    assert sent[0]["headers"][0] == JSON[0]
    assert replicas.calls[0] == replicas.calls[1]


def test_a_request_that_loses_every_replica_is_given_up():
    replicas = Scripted(*[[LOST]] * (ATTEMPTS + 1))
    sent = ask(replicas)
    assert (sent[0]["status"], error_of(sent)["code"]) == (503, "replica_lost")
    assert len(replicas.calls) == ATTEMPTS


def test_a_stream_that_had_begun_ends_with_an_error_event_and_is_not_asked_again():
    replicas = Scripted([start(SSE), body(b"data: 1\n\n", True), LOST])
    sent = ask(replicas)
    first, last = content(sent).decode().split("\n\n", 1)
    assert first == "data: 1"
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.split("data: ")[1])["error"]["code"] == "replica_lost"
    assert not sent[-1].get("more_body")
    assert len(replicas.calls) == 1


def test_another_answer_that_had_begun_is_cut_off():
    sent = ask(Scripted([start(), body(b'{"half', True), LOST]))
    assert sent[-1]["more_body"]  # the server closes the connection then


def test_a_replica_that_fails_in_another_way_is_an_error_of_the_server():
    sent = ask(Scripted([RuntimeError("a secret")]))
    assert (sent[0]["status"], error_of(sent)["code"]) == (500, "internal_error")
    assert b"secret" not in content(sent)


def test_without_a_replica_that_takes_it_a_request_is_refused_once():
    replicas = Scripted([APIError(503, "there is none", code="no_replica")])
    sent = ask(replicas)
    assert (sent[0]["status"], error_of(sent)["code"]) == (503, "no_replica")


@pytest.mark.parametrize("leave", [0, 2])
def test_a_client_that_goes_away_cancels_its_request(leave):
    script = [...] if leave == 0 else [start(SSE), body(b"a", True), ...]
    replicas = Scripted(script)
    ask(replicas, leave=leave)
    assert replicas.cancelled == 1


def test_without_replicas_the_model_is_being_loaded():
    sent = ask(None)
    assert (sent[0]["status"], error_of(sent)["code"]) == (503, "loading")
    assert ask(None, "/ready", method="GET")[0]["status"] == 503
    assert ask(None, "/health", method="GET")[0]["status"] == 200


def test_ready_means_that_a_replica_answers(monkeypatch):
    monkeypatch.setattr("serve.front.PROBE_SECONDS", 0.05)
    assert ask(Scripted(), "/ready", method="GET")[0]["status"] == 200
    assert ask(Scripted([LOST]), "/ready", method="GET")[0]["status"] == 503
    assert ask(Scripted([...]), "/ready", method="GET")[0]["status"] == 503


def test_the_front_refuses_what_is_too_long_or_has_no_key():
    replicas = Scripted()
    assert ask(replicas, max_body=4)[0]["status"] == 413
    assert ask(replicas, api_key=["secret"])[0]["status"] == 401
    assert replicas.calls == []


def test_stopping_tells_those_who_wait_and_those_who_read():
    async def run(script, wait_for):
        front, sent = Front(ServeConfig(), Scripted(script)), []

        async def receive(first=[True]):  # noqa: B006
            if first.pop() if first else False:
                return {"type": "http.request", "body": b"", "more_body": False}
            return await asyncio.Future()

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/x", "headers": [], "query_string": b""}
        task = asyncio.ensure_future(front.app(scope, receive, send))
        while len(sent) < wait_for or front.idle:
            await asyncio.sleep(0.001)
        front.abort()
        await asyncio.wait_for(task, 5)
        return sent

    waited = asyncio.run(run([...], 0))
    assert (waited[0]["status"], error_of(waited)["code"]) == (503, "draining")
    read = asyncio.run(run([start(SSE), body(b"data: 1\n\n", True), ...], 2))
    assert b"event: error" in content(read)


def test_metrics_of_all_replicas_keep_their_values_under_the_name_of_each():
    counts = {}
    for name, amount in (("a", 2), ("b", 5)):
        metrics = Metrics("m")
        metrics.accepted.inc(amount)
        metrics.failed.inc(label="model")
        metrics.step_time.observe(0.02)
        counts[name] = metrics.text().decode()
    merged = merge_metrics(counts).decode()
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert families["dlm:requests_accepted"].type == "counter"
    assert families["dlm:engine_step_seconds"].type == "histogram"
    samples = {
        (sample.name, sample.labels["replica"]): sample.value
        for family in families.values()
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert samples["dlm:requests_accepted_total", "a"] == 2
    assert samples["dlm:requests_accepted_total", "b"] == 5
    assert samples["dlm:request_failure_total", "b"] == 1
    assert samples["dlm:engine_step_seconds_count", "a"] == 1
    for name, text in counts.items():  # nothing is lost
        alone = [line for line in text.splitlines() if not line.startswith("#")]
        assert merged.count(f'replica="{name}"') == len(alone)
