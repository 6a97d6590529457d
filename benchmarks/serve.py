"""The text-generation server, measured over loopback, against what the same model does without a server.

    python -m benchmarks.serve [throughput|overhead|first|soak|faults|restart|all] [--model default|tiny]
        [--rounds 3] [--minutes 10] [--requests 100000] [--output FILE.md]

- `throughput`: answers per second for 32 clients, over those of the offline batch (`Sampler.iter_generate`)
  with the same prompts, seeds, plan and batch size, in turns. Equal seeds must give equal texts.
- `overhead`: time from one step of the engine to the next while rows are at work, over the step's; and the
  server's step over the offline one (the event loop shares the interpreter).
- `first`: time to the first confirmed text of a stream, over that of the engine alone; alone and under load.
- `soak`: minutes of clients that connect, leave, cancel and send nonsense. Nothing may remain, memory must
  be flat, and the counters must add up to what clients saw.
- `faults`: requests to a model with NaN, exceptions and slow calls. None may be lost, stuck or wrong.
- `restart`: time from `dlm serve` to /ready, over that of loading the model in a bare process.

The clients run in a process of their own. With `--output`, the tables are written as Markdown, and all
numbers as JSON beside them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks.models import tiny
from benchmarks.serve_load import FINISHED
from benchmarks.serve_rig import ROOT, Standing, StepTimes, load_process
from benchmarks.serve_trials import FLAT, Trial, faults, soak
from decoding.engine import Engine
from decoding.request import Request
from decoding.sampler import Sampler
from dlm.checkpoint import load_model
from dlm.data.rules import make_examples

CLIENTS = 32
GOAL_THROUGHPUT, GOAL_RESTART = 0.9, 10.0
SETTLE = 1.0
"""Seconds of load before the first text is timed."""


@dataclass
class Measured:
    """Result of one mode.

    Attributes:
        title: of the table.
        rows: name and value of each line, as text.
        numbers: the same and more, for programs.
        passed: False where a goal is missed.
    """

    title: str
    rows: list[tuple[str, str]]
    numbers: dict[str, Any] = field(default_factory=dict)
    passed: bool = True

    def markdown(self) -> str:
        """A section with a table."""
        lines = [f"## {self.title}", "", "| | |", "|---|---|"]
        return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in self.rows)]) + "\n"


@dataclass
class Bench:
    """The model, and how long to measure.

    Attributes:
        name: "default" or "tiny".
        rounds: repetitions; medians are printed.
        answers: requests of a round.
        max_tokens: longest answer.
        minutes: of a soak.
        requests: of a run with faults.
        quiet: no progress bars.
    """

    name: str
    rounds: int = 3
    answers: int = 96
    max_tokens: int = 64
    minutes: float = 10.0
    requests: int = 100_000
    quiet: bool = False

    def __post_init__(self) -> None:
        """Load the model."""
        self.model, self.tokenizer = tiny() if self.name == "tiny" else load_model(self.name)
        self.sampler = Sampler(self.model, self.tokenizer)

    def prompts(self) -> list[str]:
        """Prompts of one to six instructions, so that their lengths differ."""
        texts = [example.instruction for example in make_examples(6 * self.answers, seed=3)]
        return [" ".join(texts[6 * i : 6 * i + 1 + i % 6]) for i in range(self.answers)]

    def bodies(self, **extra: Any) -> list[dict[str, Any]]:
        """A chat completion for each prompt; the i-th has the seed i."""
        return [
            {"messages": [{"role": "user", "content": p}], "max_tokens": self.max_tokens, "seed": i, **extra}
            for i, p in enumerate(self.prompts())
        ]

    def offline(self) -> tuple[list[str], int, float]:
        """Texts of the offline batch, their tokens, and its seconds."""
        begun = time.perf_counter()
        outs = list(
            self.sampler.iter_generate(
                self.prompts(), max_tokens=self.max_tokens, seed=range(self.answers), batch_size=CLIENTS
            )
        )
        seconds = time.perf_counter() - begun
        return [out.text for out in outs], sum(len(out.token_ids) for out in outs), seconds

    def served(self, server: Standing, **extra: Any) -> tuple[list[str], float]:
        """Texts of the same answers from a server, and the seconds of its clients.

        Raises:
            RuntimeError: when a request is not answered.
        """
        task = {"kind": "answers", "url": server.url, "clients": CLIENTS, "quiet": self.quiet}
        result = load_process({**task, "bodies": self.bodies(**extra)})
        failed = [reply["outcome"] for reply in result["replies"] if reply["outcome"] != FINISHED]
        if failed:
            raise RuntimeError(f"{len(failed)} of {self.answers} requests failed: {failed[0]}")
        return [reply["text"] for reply in result["replies"]], result["seconds"]

    def server(self) -> Standing:
        """A server of the model, as many rows at work as there are clients."""
        return Standing(self.model, self.tokenizer, max_rows=CLIENTS)


def throughput(bench: Bench) -> Measured:
    """Answers per second of the server and of the offline batch, in turns."""
    ratios, offline, served, differing = [], [], [], 0
    turns = bench.rounds + (bench.rounds > 1)  # the first of several warms up
    with bench.server() as server:
        for i in range(turns):
            texts, tokens, seconds = bench.offline()
            answers, load_seconds = bench.served(server)
            differing += sum(a != b for a, b in zip(texts, answers, strict=True))
            if i or turns == 1:
                ratios.append(seconds / load_seconds)
                offline.append(tokens / seconds)
                served.append(tokens / load_seconds)
    total = bench.answers * turns
    ratio = median(ratios)
    rows = [
        ("offline batch", f"{median(offline):.1f} tokens/s"),
        (f"server, {CLIENTS} clients", f"{median(served):.1f} tokens/s"),
        (f"ratio (goal ≥ {GOAL_THROUGHPUT})", f"{ratio:.2f} (of {', '.join(f'{r:.2f}' for r in ratios)})"),
        ("texts that differ under one seed", f"{differing} of {total}"),
    ]
    numbers = {
        "ratios": ratios,
        "offline": offline,
        "served": served,
        "differing": differing,
    }
    passed = ratio >= GOAL_THROUGHPUT and not differing
    return Measured(f"Throughput, {bench.name} model, {bench.answers} answers", rows, numbers, passed)


def overhead(bench: Bench) -> Measured:
    """Time that the server adds to a step: that between two, and slower steps."""
    bench.offline()
    with StepTimes() as alone:
        bench.offline()
    rows = [("step, offline", f"{1e3 * mean(alone.durations()):.2f} ms")]
    numbers: dict[str, Any] = {"step offline": mean(alone.durations())}
    for name, extra in (("whole answers", {}), ("streams", {"stream": True})):
        with bench.server() as server:
            if bench.rounds > 1:  # warms up
                bench.served(server, **extra)
            with StepTimes() as served:
                bench.served(server, **extra)
        step, gap = mean(served.durations()), mean(served.gaps() or [0.0])
        share = f"{100 * gap / step:.1f} % of the step"
        slower = _per_row(served) / _per_row(alone)
        rows += [
            (f"between two steps, {name}", f"{1e3 * gap:.2f} ms, {share}; {mean(served.rows):.1f} rows"),
            (f"step a row, {name}, over offline", f"{slower:.2f} ×"),
        ]
        numbers[name] = {"gap": gap, "step": step, "rows": mean(served.rows), "step a row": slower}
    return Measured(f"Overhead of a step, {bench.name} model, {CLIENTS} clients", rows, numbers)


def _per_row(times: StepTimes) -> float:
    """Seconds of a step, divided by the rows in it, over all steps."""
    return sum(times.durations()) / sum(times.rows)


def first(bench: Bench) -> Measured:
    """Time to the first confirmed text of a stream."""
    probes, background = bench.bodies()[: 4 * bench.rounds], bench.bodies()
    engine = median(_first_of_engine(bench, i) for i in range(len(probes)))
    rows = [("engine, no server", f"{1e3 * engine:.1f} ms")]
    numbers: dict[str, Any] = {"engine": engine}
    with bench.server() as server:
        for name, others in (
            ("alone", []),
            (f"beside {CLIENTS - 1} clients", background),
        ):
            task = {"kind": "probe", "url": server.url, "clients": CLIENTS - 1, "quiet": bench.quiet}
            result = load_process(
                {**task, "bodies": probes, "background": others, "settle": SETTLE if others else 0}
            )
            times = [reply["first"] for reply in result["replies"] if reply["first"] is not None]
            value = median(times)
            rows.append((f"server, {name}", f"{1e3 * value:.1f} ms, {value / engine:.2f} × the engine"))
            numbers[name] = times
    return Measured(f"First confirmed text, {bench.name} model, medians", rows, numbers)


def _first_of_engine(bench: Bench, i: int) -> float:
    """Seconds to the first confirmed text of the i-th prompt, in an engine of its own."""
    begun = time.perf_counter()
    engine = Engine(bench.model, bench.tokenizer)
    engine.submit(bench.prompts()[i], Request(max_tokens=bench.max_tokens).resolve(bench.model), seed=i)
    while len(engine):
        if any(update.confirmed for update in engine.step()):
            break
    return time.perf_counter() - begun


def trial_rows(trial: Trial) -> list[tuple[str, str]]:
    """Lines of the table of a soak, or of a run with faults."""
    counters = trial.counters
    failed = ", ".join(f"{reason} {count}" for reason, count in sorted(counters["request_failure"].items()))
    seen = ", ".join(f"{name} {count}" for name, count in trial.outcomes.most_common())
    return [
        ("requests", str(trial.outcomes.total())),
        ("seen by clients", seen),
        ("accepted", str(counters["requests_accepted"][""])),
        ("= answered", str(counters["request_success"][""])),
        ("+ failed", failed or "0"),
        ("+ cancelled", str(counters["request_cancelled"][""])),
        ("faults injected", ", ".join(f"{n} {c}" for n, c in trial.injected.items()) or "none"),
        ("remaining rows and jobs", f"{sum(trial.remains.values()):g}"),
        ("resident memory, last quarter over second", f"{100 * trial.growth:+.1f} %"),
        ("wrong", "; ".join(trial.faults()) or "nothing"),
    ]


def soaking(bench: Bench) -> Measured:
    """The soak."""
    trial = soak(bench.model, bench.tokenizer, bench.minutes, quiet=bench.quiet)
    passed = not trial.faults() and trial.growth <= FLAT
    title = f"Soak, {bench.name} model, {bench.minutes:g} minutes"
    return Measured(title, trial_rows(trial), trial.summary(), passed)


def faulting(bench: Bench) -> Measured:
    """The run with faults."""
    trial = faults(bench.model, bench.tokenizer, bench.requests, quiet=bench.quiet)
    title = f"Faults, {bench.name} model, {bench.requests} requests"
    return Measured(title, trial_rows(trial), trial.summary(), not trial.faults())


def restart(bench: Bench) -> Measured:
    """Time from the command to /ready, and of a bare process that only loads the model."""
    with tempfile.TemporaryDirectory() as folder:
        path = bench.name
        if bench.name == "tiny":
            path = folder
            bench.model.save_pretrained(folder)
            bench.tokenizer.save_pretrained(folder)
        ready = [_ready_after(path) for _ in range(bench.rounds)]
        bare = [_loaded_after(path) for _ in range(bench.rounds)]
    value, base = median(ready), median(bare)
    rows = [
        ("a process that loads the model", f"{base:.1f} s"),
        (f"dlm serve to /ready (goal ≤ {GOAL_RESTART:g} s)", f"{value:.1f} s, {value / base:.2f} ×"),
    ]
    return Measured(
        f"Restart, {bench.name} model", rows, {"ready": ready, "bare": bare}, value <= GOAL_RESTART
    )


def _loaded_after(path: str) -> float:
    """Seconds of a process that only loads the model."""
    code = f"from dlm import load_model; load_model({path!r})"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - begun


def _ready_after(path: str) -> float:
    """Seconds from starting `dlm serve` to the first 200 of /ready."""
    command = [sys.executable, "-m", "dlm.cli", "serve", "--model", path, "--port", "0"]
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "ready at " not in line:
            raise RuntimeError(f"dlm serve did not start; its first line: {line!r}")
        with urllib.request.urlopen(line.split()[-1] + "/ready", timeout=30):
            return time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait(30)


MODES: dict[str, Callable[[Bench], Measured]] = {
    "throughput": throughput,
    "overhead": overhead,
    "first": first,
    "soak": soaking,
    "faults": faulting,
    "restart": restart,
}
"""What can be measured, by name."""


def write(path: Path, results: Sequence[Measured]) -> None:
    """Write tables as Markdown, and all numbers as JSON beside them."""
    threads = f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    head = f"Measured by `python -m benchmarks.serve`; {threads}.\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *(each.markdown() for each in results)]), encoding="utf-8")
    numbers = {each.title: {**each.numbers, "passed": each.passed} for each in results}
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit status is 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("mode", nargs="?", default="all", choices=[*MODES, "all"])
    parser.add_argument("--model", default="default", help="default, tiny, or a folder")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions")
    parser.add_argument("--answers", type=int, default=96, help="requests of a round")
    parser.add_argument("--max_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--minutes", type=float, default=10.0, help="of a soak")
    parser.add_argument("--requests", type=int, default=100_000, help="of a run with faults")
    parser.add_argument("--output", type=Path, help="file for the tables; the numbers go beside it")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    bench = Bench(
        options.model, options.rounds, options.answers, options.max_tokens, options.minutes, options.requests,
        options.quiet,
    )  # fmt: skip
    results = []
    for name in MODES if options.mode == "all" else [options.mode]:
        results.append(MODES[name](bench))
        print(results[-1].markdown(), flush=True)
        if options.output is not None:
            write(options.output, results)
    return int(not all(each.passed for each in results))


if __name__ == "__main__":
    sys.exit(main())
