"""The judge against a scripted endpoint: verdicts, faults, cache, money."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlm.errors import ConfigError, DLMError
from eval.config import JudgeConfig
from eval.judge import DryRunError, Judge, JudgeRequest, Tally
from eval.systems import Endpoint
from tests.eval.endpoint import serving


def request(text, **options):
    return JudgeRequest([{"role": "user", "content": text}], {"max_tokens": 8, **options})


def judge(endpoint, tmp_path, **settings):
    return Judge(JudgeConfig(endpoint.url, "judge", cache=str(tmp_path / "cache"), **settings))


def echo(body):
    return f"[[{body['messages'][-1]['content']}]]"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("eval.judge.PAUSES", (0.01, 0.01))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize("fault", [429, 500, 503, "garbage", "partial", "no choices", "slow"])
def test_a_fault_that_passes_is_tried_again(fault, tmp_path):
    with serving(echo, [fault]) as endpoint:
        (choice,) = judge(endpoint, tmp_path, timeout=0.4 if fault == "slow" else 20.0).ask([request("5")])
        assert choice["message"]["content"] == "[[5]]"
        assert len(endpoint.seen) == 2


def reasoning(body):
    """As the endpoints of reasoning models: each refusal names one setting."""
    if "max_tokens" in body:
        return 400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    if body.get("temperature") == 0:
        return 400, "Unsupported value: 'temperature' does not support 0 with this model."
    return "[[5]]"


def test_what_an_endpoint_refuses_is_learnt_from_the_first_request(tmp_path, caplog):
    with serving(reasoning) as endpoint:
        one = judge(endpoint, tmp_path, concurrency=8)
        found = one.ask([request(str(i), temperature=0.0) for i in range(20)])
        assert [choice["message"]["content"] for choice in found] == ["[[5]]"] * 20
        assert len(endpoint.seen) == 22
        assert {body.get("max_completion_tokens") for body in endpoint.seen[2:]} == {8}
        assert "max_completion_tokens in place of max_tokens" in caplog.text
        assert "refuses temperature" in caplog.text
        assert one.ask([request("1", temperature=0.0)]) == found[1:2], "kept under what was asked"
        assert len(endpoint.seen) == 22


def test_a_setting_that_later_requests_have_is_learnt_by_all_of_them(tmp_path):
    with serving(reasoning) as endpoint:
        endpoint.pause = 0.05  # so that several are refused before the first of them has learnt
        asked = [JudgeRequest([{"role": "user", "content": "first"}], {})]
        asked += [request(str(i), temperature=0.0) for i in range(8)]
        found = judge(endpoint, tmp_path, concurrency=8).ask(asked)
        assert [choice["message"]["content"] for choice in found] == ["[[5]]"] * 9


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "http://no-such-host.invalid/v1"])
def test_an_endpoint_that_cannot_be_reached_is_told_at_once(url, tmp_path):
    one = Judge(JudgeConfig(url, "judge", cache=str(tmp_path), concurrency=4))
    started = time.monotonic()
    with pytest.raises(DLMError, match=rf"{url}/ cannot be reached \("):
        one.ask([request(str(i)) for i in range(20)])
    assert time.monotonic() - started < 10
    with pytest.raises(DLMError, match="cannot be reached"):
        next(Endpoint(url, "model", 8).replies([[{"role": "user", "content": "x"}]]))


def test_other_refusals_are_what_they_are(tmp_path):
    with serving(lambda body: (400, "the text is too long")) as endpoint:
        with pytest.raises(DLMError, match="too long"):
            judge(endpoint, tmp_path).ask([request("1", temperature=0.0)])
        assert len(endpoint.seen) == 1


def test_requests_are_no_lines_of_the_log(tmp_path, caplog):
    caplog.set_level("INFO")
    with serving(echo) as endpoint:
        judge(endpoint, tmp_path).ask([request("5")])
    assert "HTTP" not in caplog.text


def test_one_that_never_answers_is_counted_and_the_others_go_on(tmp_path):
    def moody(body):
        return (
            {"message": {"role": "assistant", "content": None}} if "2" in str(body["messages"]) else "[[1]]"
        )

    with serving(moody) as endpoint:
        one = judge(endpoint, tmp_path, concurrency=1)
        found = one.ask([request("1"), request("2"), request("3")])
        assert [choice is None for choice in found] == [False, True, False]
        tally = Tally()
        assert tally.read(found, lambda text: 1 if "1" in text else None) == [1, None, 1]
        assert (tally.judged, tally.malformed, tally.unanswered) == (2, 0, 1)
        with pytest.raises(DLMError, match="answered none of 1"):
            one.ask([request("2")])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_for_good_stops_at_once(status, tmp_path):
    with serving(echo, [status] * 50) as endpoint:
        with pytest.raises(DLMError, match=f"scripted {status}"):
            judge(endpoint, tmp_path, concurrency=1).ask([request(str(i)) for i in range(40)])
        assert len(endpoint.seen) < 5


def test_a_request_that_is_refused_does_not_stop_the_others(tmp_path):
    with serving(echo, [400]) as endpoint:
        found = judge(endpoint, tmp_path, concurrency=1).ask([request(str(i)) for i in range(5)])
        assert [choice is None for choice in found] == [True, False, False, False, False]
        assert len(endpoint.seen) == 5


def test_equal_requests_are_asked_once_also_at_the_same_time(tmp_path):
    with serving(echo) as endpoint:
        endpoint.pause = 0.02
        one = judge(endpoint, tmp_path)
        assert one.estimate([request("7")] * 40 + [request("8")]).calls == 2
        found = one.ask([request("7")] * 40 + [request("8")])
        assert [choice["message"]["content"] for choice in found] == ["[[7]]"] * 40 + ["[[8]]"]
        assert len(endpoint.seen) == 2


def test_nothing_is_asked_twice(tmp_path):
    with serving(echo) as endpoint:
        first = judge(endpoint, tmp_path).ask([request(str(i)) for i in range(9)])
        again = judge(endpoint, tmp_path).ask([request(str(i)) for i in range(12)])
        assert again[:9] == first
        assert len(endpoint.seen) == 12
        judge(endpoint, tmp_path).ask([request("1", temperature=0.5)])
        assert len(endpoint.seen) == 13


def test_no_more_requests_at_a_time_than_allowed(tmp_path):
    with serving(echo) as endpoint:
        endpoint.pause = 0.03
        judge(endpoint, tmp_path, concurrency=3).ask([request(str(i)) for i in range(12)])
        assert endpoint.most_busy == 3


def test_a_dry_run_asks_nothing_and_tells_the_price(tmp_path):
    with serving(echo) as endpoint:
        judge(endpoint, tmp_path).ask([request("known")])
        dry = judge(endpoint, tmp_path, dry_run=True, price_in=10.0, price_out=30.0)
        with pytest.raises(DryRunError) as stop:
            dry.ask([request("known"), request("x" * 4000), request("y" * 4000, max_tokens=100)])
        estimate = stop.value.estimate
        assert (estimate.calls, estimate.tokens_in, estimate.tokens_out) == (2, 2000, 108)
        assert estimate.dollars == pytest.approx((2000 * 10 + 108 * 30) / 1e6)
        assert len(endpoint.seen) == 1


def test_the_key_comes_from_the_environment_and_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serving(echo) as endpoint:
        judge(endpoint, tmp_path).ask([request("1")])
        assert endpoint.keys == ["Bearer sk-very-secret"]
    for file in tmp_path.rglob("*"):
        assert "very-secret" not in str(file)
        assert not file.is_file() or "very-secret" not in file.read_text()


def test_without_a_key_openai_itself_is_not_asked(tmp_path):
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        Judge(JudgeConfig("", "gpt", cache=str(tmp_path))).ask([request("1")])


def test_the_arguments_of_a_function_are_an_answer(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "rank", "arguments": '{"best": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    with serving(lambda body: {"message": message}) as endpoint:
        (choice,) = judge(endpoint, tmp_path).ask([request("1")])
        assert choice["message"]["content"] == '{"best": 1}'


SCRIPT = """
import sys
from eval.config import JudgeConfig
from eval.judge import Judge, JudgeRequest
requests = [JudgeRequest([{"role": "user", "content": str(i)}], {"max_tokens": 8}) for i in range(30)]
Judge(JudgeConfig(sys.argv[1], "judge", concurrency=2, cache=sys.argv[2])).ask(requests)
"""


def test_after_a_kill_nothing_is_judged_twice(tmp_path):
    with serving(echo) as endpoint:
        endpoint.pause = 0.05
        words = [sys.executable, "-c", SCRIPT, endpoint.url, str(tmp_path / "cache")]
        running = subprocess.Popen(words, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
        kept = tmp_path / "cache"
        while len(list(kept.rglob("*.json"))) < 8:
            assert running.poll() is None
            time.sleep(0.01)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        time.sleep(0.2)
        done = len(list(kept.rglob("*.json")))
        assert 8 <= done < 30
        before = len(endpoint.seen)
        assert before <= done + 2  # two were under way
        subprocess.run(words, cwd=Path(__file__).parents[2], check=True, stderr=subprocess.DEVNULL)
        assert len(endpoint.seen) - before == 30 - done
        assert all(json.loads(file.read_text())["message"] for file in kept.rglob("*.json"))


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="judge.model"):
        JudgeConfig()
    for wrong in ({"concurrency": 0}, {"timeout": 0.0}, {"price_in": -1.0}):
        with pytest.raises(ConfigError):
            JudgeConfig(model="m", **wrong)
