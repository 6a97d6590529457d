"""Prompts on their way to the worker: too long ones, long ones beside short ones, clients that go away."""

import threading

import httpx2 as httpx
import pytest

from decoding.row_maker import RowMaker
from dlm.backbone import from_scratch
from tests.serve.conftest import SIZES
from tests.serve.rig import running, wait_for

SHORT = {"prompt": "a b c", "max_tokens": 2}
LONG = {"prompt": "a b c " * 20_000, "max_tokens": 2}


class Gate:
    """Lets no long text be encoded until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.begun = threading.Event(), 0
        check = RowMaker.check_length

        def checked(rows, text):
            if len(text) > 10_000:
                self.begun += 1
                assert self.opened.wait(30)
            check(rows, text)

        monkeypatch.setattr(RowMaker, "check_length", checked)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def _ask(server, statuses, body):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        statuses.append(client.post("/v1/completions", json=body).status_code)


def test_a_short_prompt_does_not_wait_for_long_ones(tiny, tokenizer, gate):
    with running(tiny, tokenizer) as server:
        statuses = []
        threads = [threading.Thread(target=_ask, args=(server, statuses, LONG)) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: gate.begun == 1 and server.app.state.service._preparing == 3)
        assert server.post("/v1/completions", **SHORT).status_code == 200
        assert statuses == []
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert statuses == [400] * 3


def test_a_client_that_goes_away_while_its_prompt_waits_is_dropped(tiny, tokenizer, gate):
    with running(tiny, tokenizer) as server:
        service, statuses = server.app.state.service, []
        first = threading.Thread(target=_ask, args=(server, statuses, LONG))
        first.start()
        wait_for(lambda: gate.begun == 1)
        with httpx.Client(base_url=server.url, timeout=30) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=LONG, timeout=0.3)
        wait_for(lambda: service._preparing == 1)
        gate.opened.set()
        first.join()
        wait_for(lambda: service._preparing == 0)
        assert gate.begun == 1
        assert server.metric("requests_accepted_total") == 0


def test_prompts_that_are_being_encoded_count_among_those_that_wait(tiny, tokenizer, gate):
    """But for as many as there are free rows, which wait for nothing."""
    with running(tiny, tokenizer, max_rows=1, max_waiting=1) as server:
        statuses = []
        threads = [threading.Thread(target=_ask, args=(server, statuses, LONG)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: gate.begun == 1 and server.app.state.service._preparing == 2)
        response = server.post("/v1/completions", **SHORT)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert server.post("/v1/completions", **SHORT).status_code == 200


@pytest.mark.parametrize("waiting", [0, 2])
def test_as_many_requests_as_there_are_rows_wait_for_nothing(tiny, tokenizer, waiting):
    with running(tiny, tokenizer, max_rows=6, max_waiting=waiting) as server:
        statuses = []
        threads = [threading.Thread(target=_ask, args=(server, statuses, SHORT)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 6


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "{}"}),
        ("/v1/completions", {"prompt": "{}", "suffix": "."}),
        ("/v1/completions", {"prompt": ["a", "{}"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "{}"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "<|mask|>{}"}]}),
        ("/v1/canvas", {"text": "{}<mask:2>"}),
        ("/v1/canvas", {"prompt": "{}"}),
        ("/v1/canvas", {"prompt": "a", "begin": "{}"}),
        ("/v1/edit/completions", {"text": "xyz {}", "span": "xyz"}),
        ("/generate", {"inputs": "{}"}),
        ("/api/generate", {"model": "tiny", "prompt": "{}", "raw": True}),
        ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "{}"}]}),
    ],
)
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    server, tiny, tokenizer, monkeypatch, path, body
):
    """No text with more characters than positions times the longest token has room."""
    most = tiny.spec.positions * max(map(len, tokenizer.get_vocab()))
    text = "a" * (most + 1)
    encode = type(tokenizer)._encode_plus

    def encoded(self, text, *args, **kwargs):
        assert len(text) <= most
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", encoded)
    response = server.client.post(path, json=_filled(body, text))
    error = response.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert response.status_code == 400, message
    assert str(most) in message
    assert "characters" in message
    assert "context_length_exceeded" in response.text


def _filled(value, text):
    """The JSON with `text` in the place of {}."""
    if isinstance(value, str):
        return value.replace("{}", text)
    if isinstance(value, list):
        return [_filled(each, text) for each in value]
    return {name: _filled(each, text) for name, each in value.items()} if isinstance(value, dict) else value


def test_a_prompt_that_is_cut_may_be_of_any_length(server, tiny, tokenizer):
    most = tiny.spec.positions * max(map(len, tokenizer.get_vocab()))
    parameters = {"truncate": 5, "max_new_tokens": 2}
    response = server.post("/generate", inputs="a " * most, parameters=parameters)
    assert response.status_code == 200


def test_each_thread_has_a_tokenizer_of_its_own(tokenizer):
    """A call changes settings of a tokenizer, which another thread may be using."""
    with running(from_scratch(SIZES, tokenizer).eval(), tokenizer) as server:
        service = server.app.state.service
        used = [
            thread.submit(lambda: service.rows.tokenizer).result()
            for thread in (service._short, service._long)
        ]
        assert len({id(each) for each in (*used, tokenizer)}) == 3
