"""Measures that need no judge, for every answer of a run; with intervals for their means."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dlm.repetition import repetition, stutter
from dlm.tokenizer import Message
from eval.answers import Answer
from eval.checks import CHECKS
from eval.statistics import Estimate, estimate, jackknife
from eval.tasks import TASKS, Question


@dataclass(frozen=True)
class Measure:
    """Meaning and layout of a figure.

    Attributes:
        title: for tables.
        better: 1 if more is better, -1 if less is, 0 if neither.
        percent: whether it is a share, shown in per cent.
        digits: behind the point.
    """

    title: str
    better: int = 0
    percent: bool = False
    digits: int = 2

    def show(self, value: float) -> str:
        """The value as tables have it."""
        if math.isnan(value):
            return "–"
        return f"{100 * value:.1f} %" if self.percent else f"{value:.{self.digits}f}"


MEASURES = {
    "right": Measure("right", 1, percent=True),
    "win": Measure("win rate", 1, percent=True),
    "grade": Measure("MT-Bench grade", 1),
    "score": Measure("G-Eval score", 1),
    "nelbo": Measure("NELBO of references, nats/token", -1),
    "nll": Measure("NLL under AR, nats/token", -1),
    "inlier": Measure("inlier rate", 1, percent=True),
    "relevance": Measure("relevance", 1, digits=3),
    "log_prior": Measure("mean log prior"),
    "repetition_1": Measure("repeated 1-grams", -1, percent=True),
    "repetition_2": Measure("repeated 2-grams", -1, percent=True),
    "repetition_3": Measure("repeated 3-grams", -1, percent=True),
    "repetition_4": Measure("repeated 4-grams", -1, percent=True),
    "stutter": Measure("stutter", -1, percent=True),
    "empty": Measure("empty", -1, percent=True),
    "ended": Measure("ended by itself", 1, percent=True),
    "words": Measure("words", 0, digits=0),
    "tokens": Measure("tokens", 0, digits=0),
    "model_calls": Measure("model calls", -1, digits=1),
    "tokens_per_call": Measure("tokens per call", 1),
    "seconds": Measure("seconds", -1),
}
"""Measures of one answer, in the order of the tables."""


def basic(answer: Answer) -> dict[str, float]:
    """Figures that the answer alone gives; NaN for those that it lacks."""
    text, nan = answer.text, float("nan")
    empty = not text.strip()
    return {
        **{f"repetition_{n}": nan if empty else repetition(text, n) for n in range(1, 5)},
        "stutter": nan if empty else stutter(text),
        "empty": float(empty),
        "ended": float(answer.finish_reason == "stop"),
        "words": float(len(text.split())),
        "tokens": float(answer.tokens),
        "model_calls": float(answer.model_calls) if answer.model_calls else nan,
        "tokens_per_call": answer.tokens / answer.model_calls if answer.model_calls else nan,
        "seconds": answer.seconds,
    }


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of a set of texts (distinct-n, arXiv 1510.03055)."""
    return _distinct_share([_grams(text, n) for text in texts])


def distinct_around(texts: Sequence[str], n: int) -> float:
    """Half the width of the 95 % interval of distinct-n, over sets of as many texts; NaN for few of them."""
    grams = [_grams(text, n) for text in texts]
    total, sets = sum(map(len, grams)), [set(text_grams) for text_grams in grams]
    owners = Counter(itertools.chain.from_iterable(sets))
    leave_one_out = [  # distinct-n of the others: what only this text has is missing
        (len(owners) - sum(owners[gram] == 1 for gram in unique)) / (total - len(text_grams))
        for unique, text_grams in zip(sets, grams, strict=True)
        if total > len(text_grams)
    ]
    return jackknife(leave_one_out) if len(leave_one_out) == len(texts) else math.nan


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _distinct_share(grams: Sequence[list[tuple[str, ...]]]) -> float:
    total = sum(map(len, grams))
    return len(set(itertools.chain.from_iterable(grams))) / total if total else float("nan")


@dataclass
class Instruments:
    """Measures that need models; each is left out where it is None.

    Attributes:
        reader: see `eval.fluency.Reader`.
        band: usual perplexities, see `eval.fluency.Band`.
        encoder: see `eval.relevance.Encoder`.
        log_prior: a text -> mean log prior of its tokens.
        nelbo: questions -> NELBO of their references in nats per token, by id.
        marks: fingerprint of the model that takes a measure, by measure.
    """

    reader: Any = None
    band: Any = None
    encoder: Any = None
    log_prior: Callable[[str], float] | None = None
    nelbo: Mapping[str, float] | None = None
    marks: dict[str, str] = field(default_factory=dict)


def measure(
    task: str,
    questions: Sequence[Question],
    by_key: dict[tuple[str, int], Answer],
    instruments: Instruments | None = None,
    label: str = "",
) -> dict[str, dict[str, float]]:
    """The measures of every answer, by "id/turn".

    Args:
        task: its name, which says how right answers are told.
        questions: of the task.
        by_key: the answers.
        instruments: models that measure.
        label: for progress bars.
    """
    from eval.generation import conversation

    tools = instruments or Instruments()
    turns = [(q, turn) for q in questions for turn in range(len(q.turns)) if (q.id, turn) in by_key]
    answers = [by_key[q.id, turn] for q, turn in turns]
    rows = [basic(answer) for answer in answers]
    check = CHECKS.get(TASKS[task].checks)
    if check:
        for row, (question, _), answer in zip(rows, turns, answers, strict=True):
            row["right"] = float(check(question, answer.text))
    texts = [answer.text for answer in answers]
    if tools.reader is not None:
        talks: list[list[Message]] = [conversation(q, turn, by_key) for q, turn in turns]
        for row, nats in zip(rows, tools.reader.read(talks, texts, label), strict=True):
            row["nll"] = nats
            if tools.band is not None:
                row["inlier"] = float(tools.band.holds(nats))
    if tools.encoder is not None:
        references = [q.reference[turn] if turn < len(q.reference) else "" for q, turn in turns]
        if any(references):
            for row, value in zip(rows, tools.encoder.relevance(texts, references), strict=True):
                row["relevance"] = value
    if tools.log_prior is not None:
        for row, text in zip(rows, texts, strict=True):
            row["log_prior"] = tools.log_prior(text)
    for row, (question, turn) in zip(rows, turns, strict=True):
        if tools.nelbo is not None and turn == 0 and question.id in tools.nelbo:
            row["nelbo"] = tools.nelbo[question.id]
    return {f"{a.id}/{a.turn}": row for a, row in zip(answers, rows, strict=True)}


def by_question(measured: Mapping[str, Mapping[str, float]], name: str) -> dict[str, float]:
    """A measure of each question: the mean over its turns, which depend on each other; NaN without any."""
    turns: dict[str, list[float]] = {}
    for key, row in measured.items():
        turns.setdefault(key.rpartition("/")[0], []).append(row.get(name, float("nan")))
    out = {}
    for question, values in turns.items():
        finite = [value for value in values if not math.isnan(value)]
        out[question] = sum(finite) / len(finite) if finite else float("nan")
    return out


def summary(measured: Mapping[str, Mapping[str, float]]) -> dict[str, Estimate]:
    """Mean over answers, and its interval, of every measure that some answer has."""
    questions = [key.rpartition("/")[0] for key in measured]
    estimates = {
        name: estimate([row.get(name, float("nan")) for row in measured.values()], questions, measure.percent)
        for name, measure in MEASURES.items()
    }
    return {name: value for name, value in estimates.items() if value.count}
