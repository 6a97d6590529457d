"""Every mode of the server's benchmark in miniature, and its accounting on numbers made by hand."""

import json

import pytest

from benchmarks import serve
from benchmarks.serve_trials import FAULTS, SOAK, miscounts, run_trial


@pytest.fixture(scope="module")
def bench():
    return serve.Bench("tiny", rounds=1, answers=8, max_tokens=6, minutes=0.02, requests=120, quiet=True)


def test_throughput_compares_equal_texts(bench):
    measured = serve.throughput(bench)
    assert measured.numbers["differing"] == 0
    assert len(set(bench.offline()[0])) > 4  # else equal texts say nothing
    assert all(ratio > 0 for ratio in measured.numbers["ratios"])


def test_a_text_that_differs_is_seen(bench, monkeypatch):
    monkeypatch.setattr(bench.sampler, "iter_generate", lambda *a, **k: iter(_Texts() for _ in range(8)))
    measured = serve.throughput(bench)
    assert (measured.numbers["differing"], measured.passed) == (8, False)


class _Texts:
    text, token_ids = "no such text", (1,)


def test_overhead_and_first_text_have_numbers_for_every_way(bench, monkeypatch):
    monkeypatch.setattr(serve, "SETTLE", 0.1)
    overhead, first = serve.overhead(bench), serve.first(bench)
    for name in ("whole answers", "streams"):
        assert 0 < overhead.numbers[name]["gap"] < 5
        assert overhead.numbers[name]["rows"] <= serve.CLIENTS
    assert all(first.numbers[name] for name in ("alone", "beside 31 clients"))
    assert first.numbers["engine"] > 0


def test_soak_and_faults_lose_nothing(bench, tmp_path):
    results = [serve.soaking(bench), serve.faulting(bench)]
    for measured in results:
        assert measured.numbers["faults"] == []
        assert measured.numbers["outcomes"]["finished"] > 10
    assert results[1].numbers["requests"] == 120
    serve.write(tmp_path / "serve.md", results)
    assert "| remaining rows and jobs | 0 |" in (tmp_path / "serve.md").read_text("utf-8")
    assert len(json.loads((tmp_path / "serve.json").read_text("utf-8"))) == 2


def test_every_fault_of_the_model_is_seen_by_a_client(bench):
    rates = {"nan": 0.5, "exception": 0.1}
    trial = run_trial(
        "faults", bench.model, bench.tokenizer, {"whole": 1}, max_tokens=4, clients=8, seconds=60.0,
        requests=60, rates=rates, quiet=True,
    )  # fmt: skip
    assert trial.faults() == []
    assert trial.injected["nan"] > 0
    failed = trial.outcomes["500 model_failure"]
    assert failed == trial.counters["request_failure"]["model"] >= trial.injected["nan"] / 2
    assert trial.outcomes["finished"] == 60 - failed == trial.counters["request_success"][""]


def test_a_restart_is_timed(bench, monkeypatch):
    monkeypatch.setattr(serve, "_loaded_after", lambda path: 0.5)  # another process that imports torch
    measured = serve.restart(bench)
    assert 0.5 < measured.numbers["ready"][0] < 120
    assert measured.numbers["bare"] == [0.5]


def counters(accepted, success, failed, cancelled, refused=()):
    return {
        "requests_accepted": {"": accepted},
        "request_success": {"": success},
        "request_failure": dict(failed),
        "request_cancelled": {"": cancelled},
        "request_refused": dict(refused),
    }


def test_counters_that_add_up():
    seen = {"finished": 5, "500 model_failure": 1, "left": 3, "429 queue_full": 2, "raw": 9}
    # of the three that went away, one was answered all the same, one was cancelled, one was never read
    assert miscounts(seen, counters(8, 6, {"model": 1}, 1, {"queue_full": 2})) == []


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (counters(9, 6, {"model": 1}, 1, {"queue_full": 2}), "9 accepted, but 6 answered + 1 failed + 1"),
        (counters(6, 4, {"model": 1}, 1, {"queue_full": 2}), "answered: 1 more seen than counted"),
        (counters(7, 6, {}, 1, {"queue_full": 2}), "failed, model: 1 more seen than counted"),
        (counters(8, 6, {"model": 1}, 1), "refused, queue_full: 2 more seen than counted"),
        (counters(11, 6, {"model": 1}, 4, {"queue_full": 2}), "only 3 clients went away"),
    ],
)
def test_counters_that_do_not_add_up(numbers, message):
    seen = {"finished": 5, "500 model_failure": 1, "left": 3, "429 queue_full": 2}
    assert message in "; ".join(miscounts(seen, numbers))


def test_behaviours_have_names_that_the_clients_know():
    from benchmarks.serve_load import BEHAVIOURS

    assert set(SOAK) == set(BEHAVIOURS)
    assert set(FAULTS) < set(BEHAVIOURS)
