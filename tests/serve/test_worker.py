"""The worker: rows that join and leave, ends of all kinds, and a queue that is fair."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx2 as httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.presets import PRESETS, Preset
from decoding.request import Request
from decoding.reveal import Decision, RevealRule
from decoding.reveal.base import ranked
from decoding.tokens import TokenRule
from decoding.window import Full
from dlm.errors import ConfigError, DLMError
from serve.errors import APIError
from serve.job import DrainingError, ExpiredError, Job, Sample, StoppedError
from serve.metrics import Metrics
from serve.queue import PATIENCE, Queue, Shares
from serve.worker import Worker
from tests.serve.rig import Running, running, stream_of, wait_for

CHAT = {"messages": [{"role": "user", "content": "Sort the words: b a c"}]}


class Slow:
    """A model whose calls take a while, or wait until they are let go.

    Args:
        model: the model.
        seconds: of each call.
    """

    def __init__(self, model, seconds=0.0):
        self.model, self.seconds, self.calls = model, seconds, 0
        self.gate = threading.Event()
        self.gate.set()
        self.broken = None  # None, "raise", or ids of a row that gives NaN

    def __getattr__(self, name):
        return getattr(self.model, name)

    def _wait(self):
        self.calls += 1
        assert self.gate.wait(30)
        time.sleep(self.seconds)
        if self.broken == "raise":
            raise RuntimeError("out of memory")

    def packed_hidden(self, *args, **kwargs):
        self._wait()
        return self.model.packed_hidden(*args, **kwargs)

    def hidden(self, *args, **kwargs):
        self._wait()
        return self.model.hidden(*args, **kwargs)

    def logits(self, hidden):
        logits = self.model.logits(hidden)
        return logits * float("nan") if self.broken == "nan" else logits


def test_texts_do_not_depend_on_the_server_or_on_its_load(tiny, tokenizer):
    """Batches of one and of eight, requests at once and one by one, few or many positions a step."""
    bodies = [{**CHAT, "max_tokens": 10 + 3 * i, "seed": i, "n": 1 + i % 3} for i in range(10)]
    texts = []
    for rows, threads, positions in ((1, 1, None), (8, 10, 0), (3, 5, 0), (8, 10, 1), (8, 10, 70)):
        with running(tiny, tokenizer, max_rows=rows, max_step_positions=positions) as server:
            results = [None] * len(bodies)

            def ask(numbers, server=server, results=results):
                for i in numbers:
                    results[i] = server.post("/v1/chat/completions", **bodies[i]).json()["choices"]

            parts = [threading.Thread(target=ask, args=(range(k, 10, threads),)) for k in range(threads)]
            for part in parts:
                part.start()
            for part in parts:
                part.join()
            texts.append([[c["message"]["content"] for c in choices] for choices in results])
            assert server.rows == 0
    assert all(each == texts[0] for each in texts)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_rows_within_one_step(tiny, tokenizer, streamed):
    model = Slow(tiny, 0.01)  # else the rows may be finished before this thread has seen them
    with running(model, tokenizer, max_rows=8) as server:
        body = {**CHAT, "max_tokens": 200, "n": 3, "stream": streamed, "rate": 1, "logit_bias": {"0": -100}}
        client = httpx.Client(base_url=server.url, timeout=30)
        if streamed:
            context = client.stream("POST", "/v1/chat/completions", json=body)
            response = context.__enter__()
            lines = response.iter_lines()  # kept: a generator that is dropped closes the connection
            next(lines)
            wait_for(lambda: len(server.worker.engine) == 3)
            context.__exit__(None, None, None)
        else:
            thread = threading.Thread(target=lambda: _post_and_fail(client, body))
            thread.start()
            wait_for(lambda: len(server.worker.engine) == 3)
            model.gate.clear()
            client.close()
            thread.join()
        steps = server.metric("engine_steps_total")
        model.gate.set()
        wait_for(lambda: server.rows == 0)
        assert server.metric("engine_steps_total") - steps < 60  # far from the 200 that were asked for
        assert server.metric("request_cancelled_total") == 1
        assert server.metric("num_rows_running") == 0
        assert server.post("/v1/chat/completions", **CHAT, max_tokens=4).status_code == 200


def _post_and_fail(client, body):
    with pytest.raises((httpx.HTTPError, RuntimeError)):
        client.post("/v1/chat/completions", json=body, timeout=0.3)


def test_a_row_that_gives_nan_fails_alone_and_says_so(tiny, tokenizer):
    model = Slow(tiny)
    with running(model, tokenizer) as server:
        model.broken = "nan"
        response = server.post("/v1/chat/completions", **CHAT, n=2)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "model_failure")
        assert "NaN in step" in response.text
        chunks = stream_of(server, "/v1/chat/completions", **CHAT)
        assert "NaN" in chunks[-2]["error"]["message"]
        model.broken = "raise"
        response = server.post("/v1/chat/completions", **CHAT)
        assert (response.status_code, "out of memory" in response.text) == (500, True)
        model.broken = None
        assert server.post("/v1/chat/completions", **CHAT, max_tokens=4).status_code == 200
        assert server.metric("request_failure_total", reason="model") == 3
        assert server.rows == 0
        accepted, finished = server.metric("requests_accepted_total"), server.metric("request_success_total")
        assert accepted == finished + 3


def test_a_request_is_given_up_at_its_deadline(tiny, tokenizer):
    model = Slow(tiny, 0.02)
    with running(model, tokenizer) as server:
        begun = time.monotonic()
        response = server.post("/v1/chat/completions", **CHAT, max_tokens=250, rate=1, timeout=0.3)
        assert time.monotonic() - begun < 5
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        assert response.json()["error"]["param"] == "timeout"
        assert server.rows == 0


def test_a_full_queue_refuses_and_says_when_to_come_again(tiny, tokenizer):
    model = Slow(tiny)
    with running(model, tokenizer, max_rows=1, max_waiting=2) as server:
        model.gate.clear()
        answers = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(
                    httpx.post(
                        f"{server.url}/v1/chat/completions", json={**CHAT, "max_tokens": 3}, timeout=60
                    )
                )
            )
            for _ in range(3)
        ]
        threads[0].start()
        wait_for(lambda: len(server.worker._queue) == 1)
        for thread in threads[1:]:
            thread.start()
        wait_for(lambda: server.worker.waiting >= 2)
        response = server.post("/v1/chat/completions", **CHAT)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        model.gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 3
        assert server.metric("request_refused_total", reason="queue_full") == 1


def test_a_drain_refuses_what_waits_and_finishes_what_runs(tiny, tokenizer):
    model = Slow(tiny)
    server = Running(model, tokenizer, max_rows=1).ready()
    try:
        model.gate.clear()
        answers = {}

        def ask(name):
            url = f"{server.url}/v1/chat/completions"
            answers[name] = httpx.post(url, json={**CHAT, "max_tokens": 6, "seed": 1}, timeout=60)

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("running", "waiting")]
        threads[0].start()
        wait_for(lambda: len(server.worker._jobs) == 1)
        threads[1].start()
        wait_for(lambda: server.worker.waiting == 1)
        server.worker.drain()
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
        response = server.post("/v1/chat/completions", **CHAT)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        model.gate.set()
        for thread in threads:
            thread.join()
        assert answers["running"].status_code == 200
        assert answers["running"].json()["choices"][0]["message"]["content"]
        assert answers["waiting"].status_code == 503
        wait_for(lambda: server.worker.idle)
    finally:
        server.stop()


def test_nothing_is_answered_before_the_model_is_there(tiny, tokenizer):
    gate = threading.Event()

    def load():
        assert gate.wait(30)
        return tiny, tokenizer

    server = Running(load)
    try:
        assert server.client.get("/ready").json() == {"status": "loading"}
        assert server.client.get("/health").status_code == 200
        response = server.post("/v1/chat/completions", **CHAT)
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")
        gate.set()
        server.ready()
        wait_for(lambda: server.client.get("/ready").status_code == 200)
    finally:
        server.stop()


def test_the_worker_tells_why_a_model_could_not_be_loaded():
    def load():
        raise DLMError("no such checkpoint")

    worker = Worker(load, max_rows=1, max_positions=100, metrics=Metrics("x"))
    worker.start()
    assert str(worker.loaded.exception(10)) == "no such checkpoint"
    assert not worker.ready


def test_a_job_cancelled_after_its_end_is_left_alone(tiny, tokenizer):
    metrics = Metrics("x")
    worker = Worker(lambda: (tiny, tokenizer), max_rows=2, max_positions=5000, metrics=metrics)
    worker.start()
    worker.loaded.result(60)
    plan = Request(max_tokens=3).resolve(tiny)
    row = worker.engine.rows.answer_row("a", plan)
    done = threading.Event()
    news = []

    def deliver(item):
        news.append(item)
        done.set()

    job = Job([Sample(row, plan, 0)], deliver)
    worker.submit(job)
    assert done.wait(30)
    worker.cancel(job)
    late = Job([Sample(row, plan, 0)], deliver, deadline=time.monotonic() - 1)
    done.clear()
    worker.submit(late)
    assert done.wait(30)
    assert isinstance(news[-1], ExpiredError)
    worker.stop()
    assert not worker.alive
    assert b'request_cancelled_total{model_name="x"} 0.0' in metrics.text()


def started(model, tokenizer):
    """A worker and a row for it."""
    worker = Worker(lambda: (model, tokenizer), max_rows=4, max_positions=5000, metrics=Metrics("x"))
    worker.start()
    worker.loaded.result(60)
    plan = Request(max_tokens=3).resolve(model)
    return worker, Sample(worker.engine.rows.answer_row("a", plan), plan, 0)


def test_a_job_cancelled_during_a_step_takes_no_other(tiny, tokenizer):
    """With all its rows, also those that wait."""
    model = Slow(tiny)
    worker, sample = started(model, tokenizer)
    before, steps = model.calls, worker.metrics.registry.get_sample_value
    model.gate.clear()
    job = Job([sample] * 6, lambda item: None)
    worker.submit(job)
    wait_for(lambda: model.calls == before + 1)
    assert len(worker.engine) == 4
    worker.cancel(job)
    model.gate.set()
    worker.call(lambda model: None).result(10)
    worker.call(lambda model: None).result(10)  # a step later, if there were one
    assert (len(worker.engine), len(worker._queue), worker._jobs) == (0, 0, {})
    assert model.calls == before + 1
    assert steps("dlm:engine_steps_total", {"model_name": "x"}) == 1
    worker.stop()


def test_a_job_that_comes_after_the_end_is_told(tiny, tokenizer):
    """Else its client would wait for ever, and no counter would say what became of it."""
    worker, sample = started(tiny, tokenizer)
    worker.stop()
    news = []
    worker.submit(Job([sample], news.append))
    assert [type(item) for item in news] == [DrainingError]
    with pytest.raises(StoppedError):
        worker.call(lambda model: 1).result(5)
    text = worker.metrics.text()
    assert b'requests_accepted_total{model_name="x"} 1.0' in text
    assert b'request_failure_total{model_name="x",reason="draining"} 1.0' in text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_tells_those_who_wait(tiny, tokenizer):
    worker, sample = started(tiny, tokenizer)
    news, done = [], threading.Event()

    def broken(*args):
        raise RuntimeError("unforeseen")

    worker._expire = broken

    def deliver(item):
        news.append(item)
        done.set()

    worker.submit(Job([sample], deliver))
    assert done.wait(10)
    wait_for(lambda: not worker.alive)
    assert [type(item) for item in news] == [StoppedError]
    assert not worker.ready
    assert worker.idle


def test_a_refused_row_takes_the_others_of_its_job_along(tiny, tokenizer):
    """The engine refuses the first of three rows: the job has failed once, and nothing of it is at work."""
    worker, sample = started(tiny, tokenizer)
    submit, calls, news, done = worker.engine.submit, [], [], threading.Event()

    def refusing(*args):
        calls.append(args)
        if len(calls) == 1:
            raise DLMError("this row does not fit")
        return submit(*args)

    worker.engine.submit = refusing

    def deliver(item):
        news.append(item)
        done.set()

    worker.submit(Job([sample] * 3, deliver))
    assert done.wait(10)
    worker.call(lambda model: None).result(10)
    worker.stop()
    assert [str(item) for item in news] == ["this row does not fit"]
    assert (len(calls), len(worker.engine), worker._jobs) == (1, 0, {})


# ---- the queue ---------------------------------------------------------------------------------------


def test_a_request_of_many_rows_does_not_starve_others():
    queue = Queue(max_rows=4, max_positions=10**6)
    queue.add("many", [10] * 8)
    assert queue.admit() == [("many", 0), ("many", 1), ("many", 2), ("many", 3)]
    queue.add("one", [10])
    queue.add("two", [10, 10])
    order = []
    for i in range(4):
        queue.release("many", i)
        order += queue.admit()
    assert order == [("one", 0), ("two", 0), ("many", 4), ("many", 5)]
    assert queue.rows == 4


def test_a_long_row_does_not_stall_short_ones_and_comes_to_its_turn():
    queue = Queue(max_rows=100, max_positions=100)
    queue.add("running", [60])
    queue.admit()
    queue.add("long", [90])
    for i in range(2 * PATIENCE):
        queue.add(i, [20])
    passed = queue.admit()
    assert passed == [(0, 0), (1, 0)]
    for i in range(2 * PATIENCE):
        if i not in queue or not queue._entries[i].working:
            break
        queue.release(i, 0)
        passed += queue.admit()
    assert len(passed) == PATIENCE  # then all wait for the long one
    assert queue.positions == 60
    queue.release("running", 0)
    assert queue.admit() == [("long", 0)]
    queue.release("long", 0)
    assert len(queue.admit()) == 5


def test_requests_share_the_positions_of_a_step():
    """Eight long rows of one request, in turn, beside one short row that is in every step."""
    shares = Shares(budget=150)
    rows = {"many": dict.fromkeys(range(8), 100), "one": {8: 50}}
    steps = [shares.choose(rows) for _ in range(16)]
    assert all(sum(rows["one" if row == 8 else "many"][row] for row in step) == 150 for step in steps)
    assert [[row for row in step if row != 8] for step in steps] == [[i % 8] for i in range(16)]
    rows["late"] = {9: 50}
    steps = [shares.choose(rows) for _ in range(3)]
    owners = [{"one" if row == 8 else "late" if row == 9 else "many" for row in step} for step in steps]
    assert owners == [{"many", "one"}, {"late", "many"}, {"one", "late"}]


def test_without_a_limit_and_where_all_fit_everybody_takes_the_step():
    rows = {"a": {0: 50, 1: 60}, "b": {2: 40}}
    assert Shares(0).choose(rows) == Shares(150).choose(rows) == [0, 1, 2]
    assert Shares(1).choose(rows) == [0]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=6), min_size=1, max_size=6),
    budget=st.integers(1, 300),
)
def test_every_row_comes_to_its_turn_and_no_step_is_too_long(sizes, budget):
    """A request waits fewer steps than there are requests, a row fewer turns than its request has rows."""
    shares, numbers = Shares(budget), itertools.count()
    rows = {job: {next(numbers): size for size in each} for job, each in enumerate(sizes)}
    owner = {row: job for job, each in rows.items() for row in each}
    waits = dict.fromkeys(owner, 0)
    for _ in range(100):
        chosen = shares.choose(rows)
        total = sum(rows[owner[row]][row] for row in chosen)
        assert len(set(chosen)) == len(chosen) > 0
        assert len(chosen) == 1 or total <= budget
        waits = {row: 0 if row in chosen else wait + 1 for row, wait in waits.items()}
        assert all(wait < len(rows) * len(rows[owner[row]]) for row, wait in waits.items())
        for each in rows.values():  # nobody who would fit is left out
            if not each.keys() & set(chosen):
                assert total + max(each.values()) > budget


def test_a_request_of_long_rows_does_not_make_every_step_long(tiny, tokenizer):
    """The short request ends in about as many steps as alone, none of which holds all the long rows."""
    model = Slow(tiny, 0.002)
    with running(model, tokenizer, max_rows=16, max_step_positions=150) as server:
        lengths, step = [], server.worker.engine.step

        def counted(tickets):
            sizes = server.worker.engine.lengths()
            lengths.append(sum(sizes[ticket] for ticket in tickets))
            return step(tickets)

        server.worker.engine.step = counted
        body = {**CHAT, "n": 8, "max_tokens": 100, "canvas": "full", "steps": 100}
        many = threading.Thread(target=server.post, args=("/v1/chat/completions",), kwargs=body)
        many.start()
        wait_for(lambda: len(server.worker.engine) == 8)
        before = len(lengths)
        assert server.post("/v1/chat/completions", **CHAT, max_tokens=8, rate=1).status_code == 200
        assert len(lengths) - before < 30
        assert len(server.worker.engine) == 8
        many.join()
        assert max(lengths) <= 150


def test_no_limit_is_ever_passed_and_everything_is_served():
    """Random arrivals, ends and removals: the counts are those of a plain recount, and nothing is left."""
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return int(torch.randint(n, (1,), generator=generator))

    queue, working, served, removed = Queue(5, 60), [], set(), set()
    for step in range(3000):
        if step < 2000 and draw(3) == 0:
            queue.add(step, [1 + draw(50) for _ in range(1 + draw(4))])
        for job, index in queue.admit():
            working.append((job, index))
        assert queue.rows == len(working) <= 5
        assert queue.positions == sum(queue._sizes[job][i] for job, i in working) <= 60
        if working and draw(2):
            job, index = working.pop(draw(len(working)))
            queue.release(job, index)
            served.add(job) if job not in queue else None
        if draw(20) == 0 and queue.jobs():
            job = queue.jobs()[draw(len(queue))]
            queue.remove(job)
            removed.add(job)
            working = [pair for pair in working if pair[0] != job]
    while working or len(queue):
        working += queue.admit()
        queue.release(*working.pop())
    assert (queue.rows, queue.positions, len(queue)) == (0, 0, 0)
    assert len(served) > 300
    assert removed


def test_errors_carry_what_openai_clients_read():
    error = APIError(429, "later", code="queue_full", retry_after=3)
    assert error.body == {
        "error": {"message": "later", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }
    assert error.headers == {"Retry-After": "3"}


def test_open_jobs_are_told_at_once_when_the_server_stops(tiny, tokenizer):
    model = Slow(tiny)
    server = Running(model, tokenizer).ready()
    answers = []
    try:
        model.gate.clear()  # the step that is under way does not end
        url = f"{server.url}/v1/chat/completions"
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url, json=CHAT, timeout=60)))
        thread.start()
        wait_for(lambda: len(server.worker._jobs) == 1 and model.calls > 0)
        begun = time.monotonic()
        server.worker.stop(timeout=0)
        thread.join(10)
        assert time.monotonic() - begun < 5
        assert (answers[0].status_code, answers[0].json()["error"]["message"]) == (
            503,
            "the server has stopped",
        )
    finally:
        model.gate.set()
        server.stop()


def test_requests_of_many_rows_are_refused_before_any_is_made(server):
    response = server.post("/v1/completions", prompt=[[5]] * 300, max_tokens=1)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "too_many_rows")
    assert "300 rows" in response.text
    gaps = server.post("/v1/canvas", text="a <mask:1-20> b <mask:1-20>")
    assert gaps.json()["error"]["code"] == "too_many_rows"
    assert server.post("/v1/chat/completions", **CHAT, rate=1e20).json()["error"]["param"] == "rate"


def test_the_metrics_count_each_prompt_and_only_the_length_that_is_taken(tiny, tokenizer):
    with running(tiny, tokenizer) as server:
        usage = server.post("/v1/completions", prompt=["ab", "Sort the words:"], n=2, max_tokens=4).json()[
            "usage"
        ]
        assert server.metric("prompt_tokens_total") == usage["prompt_tokens"]
        assert server.metric("generation_tokens_total") == usage["completion_tokens"]
        filled = server.post("/v1/canvas", text="a <mask:1-3> b").json()["usage"]
        assert server.metric("prompt_tokens_total") == usage["prompt_tokens"] + filled["prompt_tokens"]
        total = usage["completion_tokens"] + filled["completion_tokens"]
        assert server.metric("generation_tokens_total") == total


@dataclass(frozen=True)
class Broken(RevealRule):
    """A rule that writes one token a step, and fails at its third."""

    error: Exception
    paced = False

    def decide(self, view):
        if int(view.step.max()) >= 2:
            raise self.error
        return Decision(view.open & (ranked(view.score, view.weight, view.masked) == 0))


@pytest.mark.parametrize("kind", [OverflowError, ConfigError])
def test_a_step_that_fails_takes_the_request_that_is_to_blame_alone(
    tiny, tokenizer, monkeypatch, caplog, kind
):
    error = kind("the rule is to blame")  # made here: its traceback holds the jobs of this test
    rule = Broken(error)
    monkeypatch.setitem(PRESETS, "broken", Preset("fails", "a test", lambda: (Full(), rule), TokenRule()))
    model, body = Slow(tiny), {**CHAT, "max_tokens": 40, "seed": 5, "rate": 1}
    with running(model, tokenizer) as server, ThreadPoolExecutor(3) as pool:
        alone = server.post("/v1/chat/completions", **body).json()["choices"]
        model.gate.clear()
        good = [pool.submit(server.post, "/v1/chat/completions", **body, n=n) for n in (1, 2)]
        bad = pool.submit(server.post, "/v1/chat/completions", **CHAT, decoder="broken", max_tokens=9)
        wait_for(lambda: server.rows >= 3)
        model.gate.set()
        assert bad.result().status_code == 500, "the client is not to blame"
        assert bad.result().json()["error"]["message"] == f"the model failed: {type(error).__name__}: {error}"
        assert [r.message for r in caplog.records if r.levelname == "ERROR"] == ["a rule failed"]
        assert [x.result().status_code for x in good] == [200, 200]
        for response in good:
            assert response.result().json()["choices"][0] == alone[0]
        assert server.metric("request_failure_total", reason="model") == 1
        wait_for(lambda: server.rows == 0)
