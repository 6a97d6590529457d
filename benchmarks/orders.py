"""Learnt orders compared: the decoder dprm with its table, its controls, and the order of confidence.

A setting is a model, its questions and a reward. Its table learns online from one part of the questions; then
every way of ordering answers the other part under the same seeds, at the same pace. What is reported is the
reward that the table learnt from, and what it was not told of: closeness to the reference, repetition,
length. Differences from the order of confidence, and of an order with a table from the same order without
it (`CONTROLS`), are paired by question.

    python -m benchmarks.orders --minutes 120 --demo demo/r2ft --model full --alpaca alpaca_data.json

Settings: `rules` (--demo, the small model of `make demo`; right answers told by a program), `parallel`
(--parallel, a model that can do the tasks of `dlm eval parallel`), and `alpaca` and `alpaca-conv` (--model
and --alpaca, held-out instructions on the whole canvas and under a kernel; likelihood under the base).

Tables and answers are kept in the output folder as they come, and the same command goes on where it was. A
part of --minutes goes to learning (--learning), the rest to answers: a batch of questions by all ways in
turn, so that all have the same questions when the time is over. --report writes the page from what is in the
output folder, and loads no model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from decoding.presets import Decoder
from decoding.request import Request
from decoding.reveal.order_table import OrderTable
from decoding.sampler import Sampler
from dlm.checkpoint import load_model
from dlm.data.rows import load_rows
from dlm.data.rules import make_examples
from dlm.origin import autoregressive_origin
from dlm.repetition import repetition
from eval.orders import learn_online
from eval.parallel import examples
from eval.relevance import Encoder
from eval.statistics import estimate, paired_test
from eval.task_rewards import TaskReward, task_reward
from eval.tasks import Question
from examples.demo import WINDOW

HELD_OUT = 1000
"""Rows at the end of the Alpaca file that the default model was not trained on."""

DRAWS = 4
"""Candidates of soft best-of-N while a table learns."""

WAYS: dict[str, dict[str, Any]] = {
    "confidence": {},
    "DPRM": {},
    "DPRM, normalised": {"normalise": True},
    "DPRM, soft best-of-16": {"draws": 16},
    "drawn by confidence": {"control": "gate", "draws": 1},
    "gate only": {"control": "gate"},
    "counts only": {"control": "counts"},
    "shuffled cells": {"control": "shuffled"},
    "entropy": {"control": "entropy"},
}
"""Ways of ordering, and the options of dprm; the first is what the others are compared with."""

CONTROLS = {
    "DPRM": "gate only",
    "DPRM, normalised": "gate only",
    "DPRM, soft best-of-16": "drawn by confidence",
}
"""Orders with a table, each with the one that differs from it by the table alone."""

COLUMNS = ("reward", "relevance", "repetition", "tokens", "calls")
"""Means that are reported, as far as answers have them; `calls` are model calls per answer."""


@dataclass(frozen=True)
class Setting:
    """A setting for which a table is learnt.

    Attributes:
        name: of its files.
        model: folder or name.
        request: canvas and pace.
        kernel_size: of the convolution; 0 for none.
        reward: "check", or "likelihood" under the base.
        task: of that reward.
        questions: all there are; the first half is learnt from, the second answered.
    """

    name: str
    model: str
    request: Request
    kernel_size: int
    reward: str
    task: str
    questions: Callable[[], list[Question]]


def rules() -> list[Question]:
    """Instructions of the demo: those of the validation split, then as many of the test split."""
    made = [make_examples(600, seed=31, split=split) for split in ("validation", "test")]
    return [
        Question(f"{split}-{i}", (each.instruction,), (each.answer,), each.task)
        for split, rows in zip(("validation", "test"), made, strict=True)
        for i, each in enumerate(rows)
    ]


def parallel() -> list[Question]:
    """Tasks of `eval.parallel`, of which the second half has another seed."""
    return [
        Question(f"{seed}-{i}", (instruction,), (answer,), task)
        for seed in (1, 0)
        for i, (task, instruction, answer) in enumerate(examples(420, seed))
    ]


def alpaca(file: str) -> list[Question]:
    """Held-out instructions whose answers are short enough for the canvas."""
    rows = load_rows(file)
    rows = rows.select(range(max(0, len(rows) - HELD_OUT), len(rows)))
    pairs = [(row["prompt"][-1]["content"], row["answer"]) for row in rows if len(row["answer"]) < 200]
    return [
        Question(str(i), (prompt,), (answer,))
        for i, (prompt, answer) in enumerate(pairs)
        if len(prompt) < 300
    ]


def settings(options: argparse.Namespace) -> list[Setting]:
    """The settings whose material is given."""
    out = []
    if options.demo:
        small = Request(window=WINDOW, steps=WINDOW // 4)
        out.append(Setting("rules", options.demo, small, 0, "check", "rules", rules))
    if options.parallel:
        short = Request(canvas="full", max_tokens=48, steps=24)
        out.append(Setting("parallel", options.parallel, short, 0, "check", "parallel", parallel))
    if options.model and options.alpaca:
        short = Request(canvas="full", max_tokens=options.tokens, steps=options.tokens // 2)
        held_out = partial(alpaca, options.alpaca)
        for name, kernel in (("alpaca", 0), ("alpaca-conv", options.kernel)):
            out.append(Setting(name, options.model, short, kernel, "likelihood", "file", held_out))
    return [each for each in out if not options.only or each.name in options.only]


def decoder_of(way: str, setting: Setting, table: OrderTable) -> Decoder:
    """The decoder of a way of ordering."""
    if way == "confidence":
        return (
            Decoder.named("llada-conv", kernel_size=setting.kernel_size)
            if setting.kernel_size
            else Decoder.named("llada")
        )
    return Decoder.named("dprm", table=table, kernel_size=setting.kernel_size, **WAYS[way])


class Files:
    """Tables and answers of one setting.

    Args:
        folder: of all settings.
        name: of the setting.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.table_file, self.state = folder / f"{name}.json", folder / f"{name}-learning.jsonl"
        self.answers = folder / f"{name}-answers.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def table(self) -> OrderTable:
        """The table so far."""
        return OrderTable.load(self.table_file) if self.table_file.exists() else OrderTable.empty()

    def lines(self, file: Path) -> list[dict[str, Any]]:
        """The records of a file of lines."""
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def add(self, file: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Write lines behind those that are there."""
        with file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)


def learn(
    setting: Setting,
    sampler: Sampler,
    reward: TaskReward,
    files: Files,
    options: argparse.Namespace,
    end: float,
) -> None:
    """Learn as many batches as the rounds have, or the time allows."""
    questions = setting.questions()
    size = max(1, options.batch // options.samples)
    half = questions[: len(questions) // 2]
    batches = [half[i : i + size] for i in range(0, len(half), size)]
    table, done = files.table(), len(files.lines(files.state))
    how = {"kernel_size": setting.kernel_size, "draws": DRAWS}
    while done < options.rounds * len(batches) and time.monotonic() < end:
        (progress,) = learn_online(
            sampler, batches[done % len(batches)], reward, table, setting.request, options=how,
            samples=options.samples, seed=done // len(batches) * options.samples, batch_size=options.batch,
        )  # fmt: skip
        table, done = progress.table, done + 1
        table.save(files.table_file)
        files.add(files.state, [{"rewards": progress.rewards}])


def answer(
    setting: Setting, sampler: Sampler, measures: dict[str, TaskReward], files: Files, batch: int, seeds: int,
    end: float,
) -> None:  # fmt: skip
    """Have the second half answered by all ways, as far as the time allows."""
    questions = setting.questions()
    half, table = questions[len(questions) // 2 :], files.table()
    done = {(row["way"], row["seed"], row["id"]) for row in files.lines(files.answers)}
    for seed, first in ((s, i) for i in range(0, len(half), batch) for s in range(seeds)):
        for way in WAYS:
            if time.monotonic() > end:
                return
            due = [q for q in half[first : first + batch] if (way, seed, q.id) not in done]
            if not due:
                continue
            how = {**vars(setting.request), "decoder": decoder_of(way, setting, table)}
            outs = sampler.iter_generate(
                [q.opening for q in due], request=Request(**how), seed=seed, batch_size=batch
            )
            rows = [
                {"way": way, "seed": seed, "id": q.id, "tokens": len(out.token_ids), "calls": out.model_calls,
                 "repetition": repetition(out.text), "text": out.text,
                 **{name: measure(q, out.text) for name, measure in measures.items()}}
                for q, out in zip(due, outs, strict=True)
            ]  # fmt: skip
            files.add(files.answers, rows)


def complete(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the questions that every way has answered under the same seeds."""
    by_key: dict[tuple[int, str], set[str]] = {}
    for row in rows:
        by_key.setdefault((row["seed"], row["id"]), set()).add(row["way"])
    return [row for row in rows if by_key[row["seed"], row["id"]] == set(WAYS)]


def report(setting: Setting, files: Files) -> Iterator[str]:
    """Lines of Markdown: each way with its means, and its differences from the first and from its control."""
    rows, learning = complete(files.lines(files.answers)), files.lines(files.state)
    table, rewards = files.table(), [sum(line["rewards"]) / len(line["rewards"]) for line in learning]
    yield f"## {setting.name}\n"
    yield f"`{Path(setting.model).name}`, {_pace(setting)}; {len({row['id'] for row in rows})} questions, "
    seeds = len({row["seed"] for row in rows})
    yield f"{seeds} seeds. Learnt from {table.tokens} tokens of {len(learning)} batches"
    if len(rewards) > 1:
        fifth = max(1, len(rewards) // 5)
        early, late = (sum(part) / len(part) for part in (rewards[:fifth], rewards[-fifth:]))
        yield f", whose mean reward went from {early:.3f} (first fifth) to {late:.3f} (last)"
    yield ".\n\n"
    if rows:
        yield from compared(rows)
    else:
        yield "No question has been answered in every order yet: give more minutes.\n\n"


def compared(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: what is compared with what, and the table of answers that every way has given."""
    first, names = next(iter(WAYS)), [name for name in COLUMNS if name in rows[0]]
    pairs = "; ".join(f"{way}: {control}" for way, control in CONTROLS.items())
    count = len(WAYS) - 1 + len(CONTROLS)
    yield (
        f"Controls: {pairs}. Differences are in reward, paired by question. Each p is one of {count} "
        f"comparisons, uncorrected; Bonferroni's bound for 0.05 is p below {0.05 / count:.4f}."
        "\n\n"
    )
    heads = ["order", *names, f"difference from {first}", "p", "difference from its control", "p"]
    yield f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n"
    for way in WAYS:
        own = [row for row in rows if row["way"] == way]
        others = ("" if way == first else first, CONTROLS.get(way, ""))
        differences = [cell for other in others for cell in _against(rows, way, other)]
        yield f"| {' | '.join([way, *(_mean(own, name) for name in names), *differences])} |\n"
    yield "\n"


def _pace(setting: Setting) -> str:
    r = setting.request
    kernel = f", kernel of {setting.kernel_size}" if setting.kernel_size else ""
    return f"{r.window or r.max_tokens} positions, {r.steps} steps{kernel}"


def _mean(rows: Sequence[dict[str, Any]], name: str) -> str:
    found = estimate([row[name] for row in rows], [row["id"] for row in rows])
    half = found.high - found.mean
    return f"{found.mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def _by_question(rows: Sequence[dict[str, Any]], way: str, name: str) -> dict[str, float]:
    """Mean over seeds, by question."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["way"] == way:
            found.setdefault(row["id"], []).append(row[name])
    return {key: sum(values) / len(values) for key, values in found.items()}


def _against(rows: Sequence[dict[str, Any]], way: str, other: str) -> list[str]:
    """Difference in reward from another way with its interval, and the p-value of the paired test."""
    if not other:
        return ["", ""]
    first, own = _by_question(rows, other, "reward"), _by_question(rows, way, "reward")
    difference = estimate([own[key] - first[key] for key in own])
    _, p = paired_test([first[key] for key in own], [own[key] for key in own])
    half = difference.high - difference.mean
    shown = f"{difference.mean:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
    return [shown, "< 0.001" if p < 0.001 else f"{p:.3f}"]


def measured(setting: Setting, options: argparse.Namespace) -> dict[str, TaskReward]:
    """The reward first, then what is measured beside it."""
    name = setting.reward
    if name == "likelihood":
        name += f"={options.reader or autoregressive_origin(setting.model)}"
    out = {"reward": task_reward(name, setting.task)}
    if setting.reward != "check" and not options.without_encoder:
        encoder = Encoder()
        out["relevance"] = lambda question, text: encoder.relevance([text], [question.reference[0]])[0]
    return out


def run(setting: Setting, options: argparse.Namespace, minutes: float) -> str:
    """Learn, answer and report one setting within some minutes."""
    begun, files = time.monotonic(), Files(options.output, setting.name)
    if options.report:
        return "".join(report(setting, files))
    measures = measured(setting, options)
    sampler = Sampler(*load_model(setting.model, options.device, "auto"))
    ends = [begun + 60 * minutes * part for part in (options.learning, 1.0)]
    learn(setting, sampler, measures["reward"], files, options, ends[0])
    answer(setting, sampler, measures, files, options.batch, options.seeds, ends[1])
    return "".join(report(setting, files))


def main() -> None:
    """Measure, and print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, default=Path("runs/orders"))
    parser.add_argument("--minutes", type=float, default=60, help="of all settings together")
    parser.add_argument(
        "--learning", type=float, default=0.4, help="part of the minutes that goes to learning"
    )
    parser.add_argument("--demo", default="", help="a model of make demo")
    parser.add_argument("--parallel", default="", help="a model that was trained on tasks of eval.parallel")
    parser.add_argument("--model", default="", help="a masked diffusion model, such as full")
    parser.add_argument("--alpaca", default="", help="file of instructions")
    parser.add_argument("--reader", default="", help="autoregressive model; the base of the model if empty")
    parser.add_argument("--only", nargs="*", default=[], help="names of settings")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer of --model")
    parser.add_argument("--kernel", type=int, default=33, help="of alpaca-conv")
    parser.add_argument("--rounds", type=int, default=20, help="times that the first half is learnt from")
    parser.add_argument("--samples", type=int, default=4, help="answers to a question in a round of learning")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--without-encoder", action="store_true")
    parser.add_argument("--report", action="store_true", help="write the page of the answers that are there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = settings(options)
    if not chosen:
        parser.error("give --demo DIR, --parallel DIR, or --model and --alpaca")
    pages = []
    for setting in chosen:
        pages.append(run(setting, options, options.minutes / len(chosen)))
        print(pages[-1], flush=True)
    (options.output / "orders.md").write_text("# Learnt orders\n\n" + "".join(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
