"""`dlm serve --replicas 2` for real: one server for the module; its replicas are used, killed and drained."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the server is not installed: pip install '.[serve]'")

import psutil
import requests

from dlm.cli import main
from dlm.errors import CheckpointError, ConfigError
from serve.config import ServeConfig
from serve.errors import APIError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within Ray
ROOT = Path(__file__).parents[2]
NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: make test-ray")
SECONDS = 120  # nothing hangs; the machine may be busy


def in_ray(test):
    return pytest.mark.ray(NEEDS_RAY(test))


# ---- settings: nothing is started -------------------------------------------------------------------------


def test_without_ray_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("serve.commands.serve.find_spec", lambda name: None)
    assert main(["serve", "--replicas", "2"]) == 2
    assert capsys.readouterr().err == (
        'dlm: error: dlm serve --replicas needs Ray: pip install ".[ray]" in the folder of dlm\n'
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": -1}, "replicas must not be negative, got -1"),
        ({"max_replicas": 4}, "max_replicas must be at least --replicas"),
        ({"replicas": 3, "max_replicas": 2}, "got 2 and 3"),
        ({"replicas": 2, "device": "cuda:1"}, "give --device cuda, not cuda:1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServeConfig(**settings)


@NEEDS_RAY
@pytest.mark.parametrize(
    ("settings", "nodes", "share"),
    [
        ({"replicas": 2}, [{"CPU": 8}], (4, 0)),
        ({"replicas": 3}, [{"CPU": 8}], (2, 0)),
        ({"replicas": 2, "max_replicas": 4}, [{"CPU": 8}], (2, 0)),
        (
            {"replicas": 3},
            [{"CPU": 3}, {"CPU": 3}],
            (1, 0),
        ),  # two of two CPUs would leave the third no machine
        ({"replicas": 4}, [{"CPU": 2}], (1, 0)),
        ({"replicas": 2}, [{"CPU": 8, "GPU": 2}], (4, 1)),
        ({"replicas": 3, "device": "cpu"}, [{"CPU": 9, "GPU": 2}], (3, 0)),
    ],
)
def test_replicas_share_the_machines(settings, nodes, share):
    from serve import replicas

    assert replicas.placement(ServeConfig(**settings), nodes) == share


@NEEDS_RAY
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_replicas_than_gpus_are_refused(device):
    from serve import replicas

    with pytest.raises(ConfigError, match="--replicas 3 needs as many GPUs, and there are 2"):
        replicas.placement(ServeConfig(replicas=3, device=device), [{"CPU": 8, "GPU": 2}])


@NEEDS_RAY
def test_a_deployment_has_bounds_limits_and_no_keys():
    from serve import replicas

    config = ServeConfig(replicas=2, max_replicas=5, api_key=["secret"], max_rows=8, max_waiting=10, grace=7)
    built = replicas.deployment(config, 3, 1)
    bound = built._bound_deployment
    scaling = bound._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert bound.max_ongoing_requests == 8 + 10 + replicas.PROBES
    assert bound._deployment_config.graceful_shutdown_timeout_s == 7
    assert bound.ray_actor_options["num_cpus"], bound.ray_actor_options["num_gpus"] == (3, 1)
    assert bound.init_args[0].api_key == []


@NEEDS_RAY
def test_the_application_of_a_ray_service_refuses_unknown_settings():
    from serve import replicas

    with pytest.raises(ConfigError, match="replcas"):
        replicas.application({"replcas": 2})
    assert replicas.application({"model": "default"})._bound_deployment.name == "Front"


@NEEDS_RAY
def test_a_replica_whose_worker_died_ends_its_process(monkeypatch):
    from serve import replicas

    ended = []
    monkeypatch.setattr(replicas.os, "_exit", ended.append)
    replica = object.__new__(replicas.Replica)
    for alive, draining in ((True, False), (False, True), (False, False)):
        replica.worker = SimpleNamespace(alive=alive, draining=draining)
        replica.check_health()
    assert ended == [1]


@NEEDS_RAY
@pytest.mark.parametrize("taken", [True, False])
def test_a_request_that_no_replica_takes_is_given_up(taken):
    from serve import replicas

    class Messages:
        cancelled = False

        def __init__(self):
            self.items = self.play()

        async def play(self):
            if not taken:
                await asyncio.Future()
            yield {}
            await asyncio.sleep(0.1)  # longer than a request waits for a replica
            yield {"type": "http.response.start"}

        def __aiter__(self):
            return self

        def __anext__(self):
            return anext(self.items)

        def cancel(self):
            self.cancelled = True

    async def answers():
        return [message async for message in handle.answer({}, b"")]

    messages = Messages()
    stream = SimpleNamespace(answer=SimpleNamespace(remote=lambda scope, body: messages))
    handle = replicas.Handle(SimpleNamespace(options=lambda **_: stream), 0.05)
    if taken:
        assert asyncio.run(answers()) == [{"type": "http.response.start"}]
    else:
        with pytest.raises(APIError, match="no replica"):
            asyncio.run(answers())
    assert messages.cancelled


@NEEDS_RAY
def test_a_model_that_is_not_there_is_refused_before_ray_starts(monkeypatch, tmp_path):
    from serve import replicas

    monkeypatch.delattr(replicas, "start_ray")
    with pytest.raises(CheckpointError, match="no such folder"):
        replicas.deploy(ServeConfig(replicas=2, model=str(tmp_path / "none")))


# ---- one server for what follows --------------------------------------------------------------------------


class Server:
    """A running `dlm serve --replicas 2`."""

    def __init__(self, process, address, end_ids, log):
        self.process, self.address, self.log = process, address, log
        self.bias = {str(i): -100 for i in end_ids}

    def body(self, tokens, seed, **more):
        # one token a call, and no end of the text: so long as is asked for
        return {"prompt": "a", "max_tokens": tokens, "seed": seed, "rate": 1, "logit_bias": self.bias, **more}

    def text(self, tokens, seed):
        answer = requests.post(
            f"{self.address}/v1/completions", json=self.body(tokens, seed), timeout=SECONDS
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def events(self, tokens, seed, begun=None):
        """Data of each event of a stream; sets `begun` at the first."""
        events = []
        body = self.body(tokens, seed, stream=True)
        url = f"{self.address}/v1/completions"
        with requests.post(url, json=body, timeout=SECONDS, stream=True) as answer:
            assert answer.status_code == 200
            answer.encoding = "utf-8"
            for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
                if line.startswith("data: "):
                    events.append(line[6:])
                    if begun is not None:
                        begun.set()
        return events

    def counts(self, name):
        """A number of /metrics for each replica."""
        text = requests.get(f"{self.address}/metrics", timeout=SECONDS).text
        found = re.findall(rf'^dlm:{name}{{.*replica="(\w+)".*}} (\S+)$', text, re.MULTILINE)
        return {replica: float(value) for replica, value in found if replica != "front"}

    def processes(self):
        """Processes of replicas."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "Replica:dlm" in " ".join(child.cmdline())]


def joined(events):
    return "".join(json.loads(data)["choices"][0]["text"] for data in events if data != "[DONE]")


def wait_for(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer):
    from dlm.backbone import from_scratch
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("replicas")
    from_scratch(TINY, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = [
        "--model",
        str(folder),
        "--replicas",
        "2",
        "--port",
        "0",
        "--max_rows",
        "4",
        "--device",
        "cpu",
        "--grace",
        "90",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "dlm.cli", "serve", *words, "--page", "false"],
        cwd=ROOT, env={**os.environ, "HOME": str(folder)}, text=True,
        stdout=subprocess.PIPE, stderr=(folder / "log").open("w"),
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("dlm serve: ready at http://127.0.0.1:"), (folder / "log").read_text()
        assert not (folder / ".ray").exists()
        yield Server(process, line.split()[-1], [tokenizer.eos_token_id], folder / "log")
    finally:
        process.kill()
        process.wait()


@in_ray
def test_equal_seeds_give_equal_texts_from_both_replicas(server):
    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda seed: (seed, server.text(48, seed)), [1, 2] * 6))
    assert len(set(texts)) == 2
    assert len({text for _, text in texts}) == 2
    counts = server.counts("request_success_total")
    assert sum(counts.values()) == 12
    assert len(counts) == 2
    assert min(counts.values()) >= 2, f"one replica had nearly nothing to do: {counts}"


@in_ray
def test_a_stream_passes_through_chunk_by_chunk(server):
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(server.events, 300, 5, begun)
        assert begun.wait(SECONDS)
        assert sum(server.counts("num_rows_running").values()) == 1, "the stream came in one piece"
        events = stream.result(SECONDS)
    assert events[-1] == "[DONE]"
    assert len(events) >= 5
    assert joined(events) == server.text(300, 5)


@in_ray
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(server, stream):
    def cancelled():
        return sum(server.counts("request_cancelled_total").values())

    before = cancelled()
    url, body = f"{server.address}/v1/completions", server.body(2000, 7, stream=stream)
    if stream:
        with requests.post(url, json=body, timeout=SECONDS, stream=True) as answer:
            next(answer.iter_lines(chunk_size=1))
    else:
        with pytest.raises(requests.ReadTimeout):
            requests.post(url, json=body, timeout=0.5)
    wait_for(lambda: cancelled() == before + 1)
    wait_for(lambda: not any(server.counts("num_rows_running").values()))


@in_ray
def test_a_replica_killed_under_load_loses_no_request_that_had_not_begun_to_stream(server):
    def accepted():
        return sum(server.counts("requests_accepted_total").values())

    long, short = 400, 80
    streamed, whole = server.text(long, 9), {seed: server.text(short, seed) for seed in range(4)}
    first, names = server.processes(), set(server.counts("engine_steps_total"))
    assert len(first) == len(names) == 2
    begun, before = [threading.Event() for _ in range(6)], accepted()
    with ThreadPoolExecutor(30) as pool:
        streams = [pool.submit(server.events, long, 9, event) for event in begun]
        for event in begun:
            assert event.wait(SECONDS)
        texts = [pool.submit(server.text, short, i % 4) for i in range(16)]
        wait_for(lambda: accepted() == before + len(streams) + len(texts))
        first[0].send_signal(signal.SIGKILL)
        for i, future in enumerate(texts):
            assert future.result(SECONDS) == whole[i % 4]
        ends = [future.result(SECONDS) for future in streams]
    cut = 0
    for events in ends:
        last = events[-1]
        if last == "[DONE]":
            assert joined(events) == streamed
            continue
        assert json.loads(last)["error"]["code"] == "replica_lost"
        assert streamed.startswith(joined(events[:-1]))
        cut += 1
    assert 1 <= cut < 6, f"{cut} of 6 streams were cut"
    lost = server.log.read_text().count("a replica was lost")
    assert lost > cut, "no request that had not begun was on the replica that was killed"
    wait_for(lambda: len(set(server.counts("engine_steps_total")) - names) == 1)
    assert server.text(short, 3) == whole[3]


@in_ray
def test_sigterm_lets_running_requests_finish_and_ends_ray(server):
    whole = server.text(300, 1)
    children = psutil.Process(server.process.pid).children(recursive=True)
    begun = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(server.events, 300, 1, begun)
        text = pool.submit(server.text, 300, 1)
        assert begun.wait(SECONDS)
        wait_for(lambda: sum(server.counts("num_rows_running").values()) == 2)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: requests.get(f"{server.address}/ready", timeout=SECONDS).status_code == 503)
        refused = requests.post(f"{server.address}/v1/completions", json=server.body(4, 1), timeout=SECONDS)
        assert refused.json()["error"]["code"] == "draining"
        assert joined(stream.result(SECONDS)) == text.result(SECONDS) == whole
    assert server.process.wait(SECONDS) == 0
    wait_for(lambda: not any(alive(child) for child in children))


def alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
