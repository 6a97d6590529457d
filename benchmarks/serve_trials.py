"""Soak and faults: whether a server loses, forgets or miscounts anything under clients that behave badly.

Every finished answer is compared with the text that the same request has offline, and the server's counters
with the outcomes that the clients saw.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil

from benchmarks.serve_load import FINISHED, LEFT, STUCK
from benchmarks.serve_rig import Faulty, Standing, load_process, sampled, wait_until
from decoding.engine import Engine
from decoding.request import Request
from dlm.data.rules import make_examples

SOAK = {
    "whole": 20, "streamed": 20, "several": 6, "left": 10, "stream left": 10, "hasty": 5, "malformed": 12,
    "too long": 4, "too large": 3, "raw": 5, "looking": 5,
}  # fmt: skip
"""Behaviours of the clients of a soak, with their weights."""
FAULTS = {"whole": 60, "streamed": 20, "several": 5, "left": 8, "stream left": 5, "hasty": 2}
RATES = {"nan": 0.03, "exception": 0.01, "slow": 0.01}
"""Probability of each fault in a call of the model."""
FLAT = 0.05
"""Growth of the resident memory after warm-up that counts as none."""
FAILURES = {"500 model_failure": "model", "504 timeout": "timeout"}
"""Reasons of the server's counter of failures, by what a client sees."""

Outcomes = Mapping[str, Mapping[str, int]]


@dataclass
class Trial:
    """The result of a soak, or of a run with faults."""

    outcomes: Counter[str]
    """What the clients saw, over all behaviours."""
    counters: dict[str, dict[str, int]]
    """The server's, by name and label."""
    remains: dict[str, float]
    """What was left behind."""
    resident: list[float]
    """Resident memory in MB, from begin to end."""
    injected: dict[str, int]
    """Faults of the model, by kind."""
    max_rows: int
    """Rows at work at a time."""

    @property
    def growth(self) -> float:
        """Growth of the resident memory, its last quarter over the second, as a share."""
        quarter = len(self.resident) // 4
        if not quarter:
            return 0.0
        return median(self.resident[-quarter:]) / median(self.resident[quarter : 2 * quarter]) - 1

    def faults(self) -> list[str]:
        """Everything that should not be so."""
        out = [
            f"{count} × {name}" for name, count in self.outcomes.items() if name.startswith(("broken", STUCK))
        ]
        out += [f"{name}: {value:g} remain" for name, value in self.remains.items() if value]
        failed = self.counters["request_failure"].get("model", 0)
        most = self.injected.get("nan", 0) + self.max_rows * self.injected.get("exception", 0)
        if failed > most:  # NaN fails a row, an exception those at work
            out.append(f"{failed} requests failed, but the faults of the model explain {most}")
        return out + miscounts(self.outcomes, self.counters)

    def summary(self) -> dict[str, Any]:
        """Numbers for a report."""
        return {
            "requests": self.outcomes.total(),
            "outcomes": dict(self.outcomes.most_common()),
            "counters": self.counters,
            "injected": self.injected,
            "resident MB": [round(value, 1) for value in self.resident[:: max(1, len(self.resident) // 60)]],
            "growth": round(self.growth, 4),
            "remains": self.remains,
            "faults": self.faults(),
        }


def miscounts(outcomes: Mapping[str, int], counters: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Differences between the server's counters and the outcomes that clients saw.

    A request whose client went away may have any fate, or none where the server never read it. So the
    counters may exceed what was seen by as many as went away, all together, and never fall short of it.
    """
    out = []
    success, cancelled = counters["request_success"].get("", 0), counters["request_cancelled"].get("", 0)
    accepted = counters["requests_accepted"].get("", 0)
    failures = sum(counters["request_failure"].values())
    if accepted != success + failures + cancelled:
        out.append(f"{accepted} accepted, but {success} answered + {failures} failed + {cancelled} cancelled")
    surplus = {"answered": success - outcomes.get(FINISHED, 0), "cancelled": cancelled}
    for seen, reason in FAILURES.items():
        surplus[f"failed, {reason}"] = counters["request_failure"].get(reason, 0) - outcomes.get(seen, 0)
    refusals = {
        seen.split(" ", 1)[1]: count
        for seen, count in outcomes.items()
        if seen.partition(" ")[0] in ("400", "404", "413", "429", "503")
    }
    for reason in refusals.keys() | counters["request_refused"].keys():
        surplus[f"refused, {reason}"] = counters["request_refused"].get(reason, 0) - refusals.get(reason, 0)
    out += [f"{name}: {-count} more seen than counted" for name, count in surplus.items() if count < 0]
    if sum(surplus.values()) > outcomes.get(LEFT, 0):
        named = ", ".join(f"{name} {count}" for name, count in surplus.items() if count)
        out.append(f"only {outcomes.get(LEFT, 0)} clients went away, but counted and not seen: {named}")
    return out


def requests_with_texts(
    model: Any, tokenizer: Any, max_tokens: int, size: int = 48
) -> tuple[list[dict[str, Any]], list[str]]:
    """Bodies of chat completions of different lengths, and the texts that they have offline."""
    engine, bodies, texts = Engine(model, tokenizer), [], {}
    for seed, example in enumerate(make_examples(size, seed=11)):
        tokens = 1 + (seed * 7) % max_tokens
        messages = [{"role": "user", "content": example.instruction}]
        bodies.append({"messages": messages, "max_tokens": tokens, "seed": seed})
        engine.submit(example.instruction, Request(max_tokens=tokens).resolve(model), seed)
    while len(engine):
        texts.update({each.ticket: each.output.text for each in engine.step() if each.output is not None})
    return bodies, [texts[ticket] for ticket in sorted(texts)]


def run_trial(
    name: str,
    model: Any,
    tokenizer: Any,
    behaviours: Mapping[str, int],
    *,
    max_tokens: int,
    clients: int,
    seconds: float,
    requests: int = 0,
    rates: Mapping[str, float] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Trial:
    """Let clients behave at random, and count.

    Args:
        name: of the progress bar.
        model: a model without faults.
        tokenizer: the model's.
        behaviours: weights of the behaviours of clients (`serve_load.BEHAVIOURS`).
        max_tokens: longest answer.
        clients: at a time.
        seconds: after which no request begins.
        requests: so many and no more; 0 for as many as there is time for.
        rates: of the model's faults; none by default.
        quiet: no progress bar.
        **settings: of the server.
    """
    bodies, texts = requests_with_texts(model, tokenizer, max_tokens)
    faulty = Faulty(model, {})
    process = psutil.Process(os.getpid())

    def resident() -> float:
        return float(process.memory_info().rss) / 1e6

    with Standing(faulty, tokenizer, **settings) as server:
        faulty.rates = dict(rates or {})
        task = {
            "kind": "storm", "name": name, "url": server.url, "seed": 0, "clients": clients,
            "seconds": seconds, "requests": requests, "behaviours": dict(behaviours), "quiet": quiet,
            "bodies": bodies, "texts": texts, "limit": server.config.max_body,
            "long": "count " * model.spec.positions,
        }  # fmt: skip
        with sampled(resident, min(1.0, seconds / 200)) as memory:
            outcomes: Outcomes = load_process(task, seconds + 300)["outcomes"]
        wait_until(lambda: not any(server.remains().values()), 30)
        total: Counter[str] = Counter()
        for counts in outcomes.values():
            total.update(counts)
        names = (
            "requests_accepted",
            "request_success",
            "request_failure",
            "request_cancelled",
            "request_refused",
        )
        counters = {each: server.total(each) for each in names}
        injected = dict(faulty.injected)
        return Trial(total, counters, server.remains(), memory, injected, server.config.max_rows)


def soak(model: Any, tokenizer: Any, minutes: float, clients: int = 24, **rest: Any) -> Trial:
    """Minutes of clients that come, go and send nonsense."""
    settings = {"max_waiting": 12, "max_rows": 8, "max_tokens": 32, **rest}
    return run_trial("soak", model, tokenizer, SOAK, clients=clients, seconds=60 * minutes, **settings)


def faults(model: Any, tokenizer: Any, requests: int, clients: int = 32, **rest: Any) -> Trial:
    """So many short requests to a model that fails now and then; an hour at most."""
    settings = {"max_tokens": 6, "rates": RATES, "seconds": 3600.0, **rest}
    return run_trial("faults", model, tokenizer, FAULTS, requests=requests, clients=clients, **settings)
