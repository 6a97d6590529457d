"""What those who run the server rely on: keys, limits, logs, metrics, signals."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx2 as httpx
import pytest

from dlm.cli import main
from dlm.errors import ConfigError, DataError, DLMError
from serve.api.schema import ChatRequest
from serve.app import create_app
from serve.commands.serve import BODY
from serve.config import ServeConfig
from serve.metrics import Metrics
from serve.server import serve
from serve.worker import Worker
from tests.serve.rig import running, stream_of, wait_for
from tests.serve.test_worker import Slow

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}


def test_keys_are_asked_for_and_some_paths_are_open(tiny, tokenizer, tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text("first\n\nsecond\n")
    monkeypatch.setenv("DLM_API_KEY", "dritté")
    with running(tiny, tokenizer, api_key_file=str(keys)) as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic first"},
            {"Authorization": "first"},
        ):
            response = server.client.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for key in ("first", "second", "dritté"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert server.client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json", "/"):
            assert server.client.get(path).status_code == 200, path
        for path in ("/v1/models", "/info", "/api/tags", "/v1/decoders"):
            assert server.client.get(path).status_code == 401, path
        assert server.client.post("/", json={"inputs": "a"}).status_code == 401
        assert server.metric("request_refused_total", reason="invalid_api_key") == 9


def test_files_of_keys_that_hold_none_are_told(tmp_path):
    empty = tmp_path / "none"
    empty.write_text("\n")
    for path, message in ((empty, "holds no key"), (tmp_path / "missing", "cannot be read")):
        with pytest.raises(DataError, match=message):
            ServeConfig(api_key_file=str(path)).keys()
    assert ServeConfig(host="0.0.0.0").public
    assert not ServeConfig(host="::1").public
    assert not ServeConfig(host="localhost").public
    with pytest.raises(DataError, match="a key is empty"):
        ServeConfig(api_key=[" "]).keys()
    assert ServeConfig(api_key=["a\n"]).keys() == ["a"]
    for name, value in (("max_rows", 0), ("port", 70000), ("timeout", -1.0)):
        with pytest.raises(ConfigError, match=name):
            ServeConfig(**{name: value})


def test_long_bodies_are_refused_before_they_are_read(tiny, tokenizer):
    with running(tiny, tokenizer, max_body=5000) as server:
        response = server.post("/v1/completions", prompt="a" * 6000)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_long")

        def pieces():
            yield b'{"prompt": "'
            for _ in range(10):
                yield b"a" * 1000

        response = server.client.post(
            "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
        )
        assert response.status_code == 413
        assert server.post("/v1/completions", prompt="a", max_tokens=2).status_code == 200


def _lines(server, *pieces, pause=0.05, seconds=10):
    """What a server says to pieces of a request that come slowly, until it closes the connection."""
    with socket.create_connection(
        ("127.0.0.1", server.socket.getsockname()[1]), timeout=seconds
    ) as connection:
        heard = b""
        for piece in pieces:
            try:
                connection.sendall(piece)
                time.sleep(pause)
            except OSError:
                break
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(65536):
                heard += data
        return heard


@pytest.mark.parametrize("announced", [True, False])
def test_a_client_that_sends_all_of_a_long_body_reads_its_answer(tiny, tokenizer, announced):
    """Closed with bytes unread, the connection would be reset, and the answer lost."""
    size = 3_000_000
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    if announced:
        body = [head + b"content-length: %d\r\n\r\n" % size, b"a" * size]
    else:
        body = [
            head + b"transfer-encoding: chunked\r\n\r\n",
            b"10000\r\n" + b"a" * 2**16 + b"\r\n",
            b"0\r\n\r\n",
        ]
        body[1:2] = body[1:2] * 40
    with running(tiny, tokenizer, max_body=5000) as server:
        address = ("127.0.0.1", server.socket.getsockname()[1])
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(b"".join(body))  # raises where the server has closed
            heard = b"".join(iter(lambda: connection.recv(65536), b""))
        assert heard.startswith(b"HTTP/1.1 413")
        assert heard.endswith(b"}")
        assert b"body_too_long" in heard


def test_a_head_that_does_not_come_closes_the_connection(server, monkeypatch):
    """Also the second head of a connection, and one of which a byte comes now and then."""
    monkeypatch.setattr("serve.protocol.HEAD_SECONDS", 0.3)
    assert _lines(server) == b""
    drops = [b"GET /health HTTP/1.1\r\n", *[b"x-%d: 1\r\n" % i for i in range(40)]]
    begun = time.monotonic()
    assert _lines(server, *drops) == b""
    assert time.monotonic() - begun < 1.5
    whole = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
    heard = _lines(server, whole, whole, *drops)
    assert heard.count(b"HTTP/1.1 200") == 2
    assert time.monotonic() - begun < 5


def test_a_request_that_is_whole_has_all_the_time_it_needs(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr("serve.protocol.HEAD_SECONDS", 0.2)
    monkeypatch.setattr("serve.middleware.BODY_SECONDS", 0.2)
    with running(Slow(tiny, 0.05), tokenizer) as server:
        response = server.post("/v1/completions", prompt="a", max_tokens=12, rate=1, logit_bias={"0": -100})
        assert response.status_code == 200
        assert response.elapsed.total_seconds() > 0.4


def test_a_body_that_does_not_come_is_a_408(server, monkeypatch):
    """As a whole, however often a piece of it comes."""
    monkeypatch.setattr("serve.middleware.BODY_SECONDS", 0.4)
    refused = server.metric("request_refused_total", reason="body_too_slow")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\n"
    for pieces in ([head], [head, *[b" "] * 40]):
        begun = time.monotonic()
        heard = _lines(server, *pieces)
        assert heard.startswith(b"HTTP/1.1 408")
        assert b"body_too_slow" in heard
        assert time.monotonic() - begun < 3.5
    assert server.metric("request_refused_total", reason="body_too_slow") == refused + 2


def test_limits_of_prompts_and_positions_name_both_numbers(tiny, tokenizer):
    with running(tiny, tokenizer, max_prompt=20, max_positions=60) as server:
        response = server.post("/v1/completions", prompt=[5] * 21, max_tokens=5)
        assert "21 tokens; this server takes 20" in response.json()["error"]["message"]
        response = server.post("/v1/completions", prompt=[5] * 20, max_tokens=50)
        assert "70 tokens; this server holds 60" in response.json()["error"]["message"]
        assert response.json()["error"]["code"] == "context_length_exceeded"


def test_other_origins_are_shut_out_unless_they_are_named(tiny, tokenizer):
    origin = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with running(tiny, tokenizer) as server:
        assert (
            "access-control-allow-origin"
            not in server.client.options("/v1/completions", headers=origin).headers
        )
    with running(tiny, tokenizer, cors=["https://example.org"], api_key=["k"]) as server:
        response = server.client.options("/v1/completions", headers=origin)
        assert response.headers["access-control-allow-origin"] == "https://example.org"


def test_a_line_for_each_request_and_never_its_prompt(tiny, tokenizer, caplog):
    caplog.set_level(logging.INFO, logger="serve.access")
    body = {"prompt": "the secret", "max_tokens": 2}
    with running(tiny, tokenizer, log_format="json") as server:
        response = server.client.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        odd = server.client.post("/v1/completions", json=body, headers={"x-request-id": "a b"})
        assert odd.headers["x-request-id"] not in ("", "a b")
    line = next(json.loads(m) for m in caplog.messages if "mine-1" in m)
    assert (line["status"], line["path"], line["method"]) == (200, "/v1/completions", "POST")
    assert not any("secret" in message for message in caplog.messages)
    with running(tiny, tokenizer, log_prompts=True) as server:
        server.post("/v1/completions", **body)
    assert any("the secret" in message for message in caplog.messages)


def test_a_path_cannot_write_a_line_of_the_log(server, caplog):
    caplog.set_level(logging.INFO, logger="serve.access")
    server.client.get("/nope%0arequest_id=FAKE%20status=200")

    def lines():
        return [
            r.getMessage() for r in caplog.records if r.name == "serve.access" and "FAKE" in r.getMessage()
        ]

    wait_for(lines)
    (line,) = lines()
    assert len(line.splitlines()) == 1
    assert '"/nope' in line


def test_metrics_say_what_clients_saw(tiny, tokenizer):
    with running(tiny, tokenizer, max_rows=4) as server:
        answers = [
            server.post("/v1/completions", prompt="ab", max_tokens=9, seed=i, n=2).json() for i in range(5)
        ]
        assert server.metric("requests_accepted_total") == server.metric("request_success_total") == 5
        assert server.metric("answer_success_total") == 10
        written = sum(answer["usage"]["completion_tokens"] for answer in answers)
        assert server.metric("generation_tokens_total") == written
        assert server.metric("prompt_tokens_total") == sum(a["usage"]["prompt_tokens"] for a in answers)
        assert server.metric("e2e_request_latency_seconds_count") == 5
        assert server.metric("engine_steps_total") == server.metric("engine_step_seconds_count") > 0
        assert server.metric("num_rows_running") == server.metric("num_requests_waiting") == 0
        server.post("/v1/completions", prompt="ab", temperature=-1)
        assert server.metric("request_refused_total") == 1
        text = server.client.get("/metrics").text
        assert 'model_name="tiny"' in text


def test_times_are_counted_once_for_what_they_measure(tiny, tokenizer):
    with running(tiny, tokenizer) as server:
        body = {"prompt": "ab", "max_tokens": 12, "rate": 1, "seed": 1, "logit_bias": {"0": -100}, "n": 2}
        chunks = stream_of(server, "/v1/completions", **body)[:-1]
        whole = server.post("/v1/completions", **body, return_metadata=True).json()
        assert server.metric("time_to_first_token_seconds_count") == 2
        assert 0 < server.metric("inter_token_latency_seconds_count") <= len(chunks) - 2
        assert server.metric("request_queue_time_seconds_count") == 2
        assert server.metric("tokens_per_model_call_count") == 4
        calls = sum(choice["metadata"]["model_calls"] for choice in whole["choices"])
        assert server.metric("row_model_calls_total") == 2 * calls
        assert server.metric("answer_success_total", finished_reason="length") == 4


def test_options_that_belong_in_a_body_are_parameters_there():
    assert set(BODY) <= set(ChatRequest.model_fields)


def test_settings_come_from_a_file_and_from_the_command_line(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("serve.server.serve", lambda config: seen.append(config) or 0)
    file = tmp_path / "serve.yaml"
    file.write_text("model: default\nport: 9000\nmax_rows: 4\nmax_step_positions: 0\n")
    words = ["serve", "--config", str(file), "--port", "9001", "--model-name", "gpt-dlm"]
    assert main(words) == 0
    (config,) = seen
    assert (config.served_name, config.port, config.max_rows) == ("gpt-dlm", 9001, 4)
    assert (config.max_step_positions, ServeConfig().max_step_positions) == (0, None)


@pytest.mark.parametrize(
    ("settings", "warned"),
    [({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_key": ["a"]}, False), ({}, False)],
)
def test_an_open_server_for_all_is_warned_of(monkeypatch, capsys, settings, warned):
    worker = SimpleNamespace(stop=lambda: None)
    monkeypatch.setattr("serve.server.make_backend", lambda config: (worker, None))
    monkeypatch.setattr("serve.server.Server.run", lambda self: None)
    assert serve(ServeConfig(**settings)) == 0
    assert ("can be reached from other machines" in capsys.readouterr().err) == warned
    assert ServeConfig().host == "127.0.0.1"


def test_unknown_paths_and_methods_have_openai_errors(server):
    for response, status in (
        (server.client.get("/v1/nothing"), 404),
        (server.client.get("/v1/completions"), 405),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]
    near = server.client.get("/v1/chat/completion").json()["error"]["message"]
    assert near == "Not Found; did you mean /v1/chat/completions?"
    for path in ("/api/copy", "/api/delete", "/api/pull"):  # of Ollama, and not like another
        assert "did you mean" not in server.client.post(path).text
    far = server.client.get("/nothing").json()["error"]["message"]
    assert far == "Not Found; the paths are listed at /openapi.json"
    assert "/v1/chat/completions" in server.client.get("/openapi.json").json()["paths"]


def test_two_apps_in_one_process_share_nothing():
    apps = [
        create_app(Worker(lambda: None, max_rows=1, max_positions=9, metrics=m), ServeConfig(), m)
        for m in (Metrics("a"), Metrics("b"))
    ]
    assert apps[0].state.service.metrics.text() != apps[1].state.service.metrics.text()


# ---- the process -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny, tokenizer, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Process:
    """`dlm serve` as a process of its own."""

    def __init__(self, *args):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "dlm.cli", "serve", "--port", "0", "--device", "cpu", *args]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        line = self.process.stdout.readline()
        assert line.startswith("dlm serve: ready at http://127.0.0.1:"), self.process.stderr.read()
        self.url = line.split()[-1]

    def end(self):
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


def test_the_first_signal_drains_and_the_process_ends_with_0(folder):
    process = Process("--model", str(folder), "--model_name", "mine")
    assert httpx.get(f"{process.url}/v1/models").json()["data"][0]["id"] == "mine"
    body = {"model": "mine", "prompt": "a", "max_tokens": 400, "rate": 1, "logit_bias": {"0": -100}}
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{process.url}/v1/completions", json=body, timeout=60))
    )
    thread.start()
    wait_for(
        lambda: 'num_requests_running{model_name="mine"} 1.0' in httpx.get(f"{process.url}/metrics").text
    )
    process.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    if process.process.poll() is None:
        try:
            response = httpx.post(f"{process.url}/v1/completions", json={**body, "max_tokens": 2}, timeout=60)
            assert response.status_code == 503
        except httpx.TransportError:
            pass  # it had ended already
    thread.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 400
    status, _, err = process.end()
    assert status == 0
    assert "Traceback" not in err


def test_a_second_signal_tells_those_who_wait(folder):
    process = Process("--model", str(folder), "--grace", "60")
    body = {"prompt": "a", "max_tokens": 2000, "rate": 1, "logit_bias": {"0": -100}}
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{process.url}/v1/completions", json=body, timeout=60))
    )
    thread.start()
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{process.url}/v1/completions", json={**body, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        wait_for(lambda: " 2.0" in httpx.get(f"{process.url}/metrics").text)
        for _ in range(2):
            process.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        rest = [line for line in lines if line]
    thread.join()
    assert rest[-1] == "data: [DONE]"
    assert any('"draining"' in line for line in rest)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "draining"
    status, _, err = process.end()
    assert status == 0
    assert "Traceback" not in err


def test_a_second_signal_stops_at_once(folder):
    process = Process("--model", str(folder), "--grace", "60")
    body = {"prompt": "a", "max_tokens": 2000, "rate": 1, "logit_bias": {"0": -100}, "stream": True}
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{process.url}/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.process.poll() is None  # it still writes
        begun = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        status, _, _ = process.end()
    assert time.monotonic() - begun < 10
    assert status in (0, -signal.SIGTERM)


def test_what_is_wrong_is_said_in_one_line(folder):
    for args, message in (
        (("--model", str(folder / "none")), "none"),
        (("--port", "99999"), "port"),
        (("--prot", "1"), "Did you mean"),
        (("--api_key_file", "/nowhere/keys"), "/nowhere/keys"),
    ):
        command = [sys.executable, "-m", "dlm.cli", "serve", "--port", "0", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode in (1, 2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr("serve.server.make_backend", lambda config: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            DLMError, match=rf"127.0.0.1, port {port} \(Address already in use\): give another --port"
        ):
            serve(ServeConfig(model="default", port=port))
    with pytest.raises(
        DLMError, match=r"cannot listen on 203.0.113.7, port 8000 \(.*\): give another --host"
    ):
        serve(ServeConfig(model="default", host="203.0.113.7", port=8000))
