"""Tables, once for all the places where they are shown: terminal, Markdown, HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from dlm.errors import DataError
from eval.metrics import MEASURES, by_question, summary
from eval.parallel import Point, accuracy_under_parallelism
from eval.run import Results, Verdict
from eval.statistics import Estimate, paired_test


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column is words, the others are numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """In GitHub's Markdown."""
        lines = [self.head, ["---", *(["---:"] * (len(self.head) - 1))], *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)

    def html(self) -> str:
        """The same as an HTML element."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def rich(self) -> Any:
        """For a terminal."""
        from rich.table import Table as Rich

        table = Rich(title=self.title, title_justify="left")
        for i, cell in enumerate(self.head):
            table.add_column(cell, justify="right" if i else "left", overflow="ellipsis" if i else "fold")
        for row in self.rows:
            table.add_row(*row)
        return table


def _cell(name: str, value: Estimate | None) -> str:
    """A mean, and half the width of its interval if it has one; both ends of one that is lopsided."""
    if value is None or math.isnan(value.mean):
        return "–"
    measure = MEASURES[name]
    half = max(value.high - value.mean, value.mean - value.low)
    if math.isnan(half):
        return measure.show(value.mean)
    if min(value.high - value.mean, value.mean - value.low) < 0.7 * half:
        low, high = (measure.show(end).removesuffix(" %") for end in (value.low, value.high))
        mean = measure.show(value.mean).removesuffix(" %")
        return f"{mean} ({low}–{high}){' %' if measure.percent else ''}"
    around = f"{100 * half:.1f}" if measure.percent else f"{half:.{max(measure.digits, 1)}f}"
    return f"{measure.show(value.mean).removesuffix(' %')} ± {around}{' %' if measure.percent else ''}"


TOLD = (
    *("win", "grade", "score", "right", "nelbo", "nll", "inlier", "relevance", "log_prior"),
    *("repetition_4", "stutter", "empty", "ended", "tokens", "words", "model_calls"),
)


def quality(runs: Sequence[Results]) -> Table:
    """Table of measures of the answers, with half the width of the 95 % interval of each mean."""
    names = [name for name in TOLD if any(name in run.means for run in runs)]
    counted = any(answer.tokens for run in runs for answer in run.answers.values())
    names = [name for name in names if name != ("words" if counted else "tokens")]
    sizes = sorted({len(run.measured) for run in runs})
    differ = len(sizes) > 1
    head = ["", *(["answers"] if differ else []), *(MEASURES[name].title for name in names), "distinct-2"]
    rows = [
        [
            run.card.name,
            *([str(len(run.measured))] if differ else []),
            *(_cell(name, run.means.get(name)) for name in names),
            _distinct_cell(run, 2),
        ]
        for run in runs
    ]
    count = f"{sizes[0]} to {sizes[-1]} answers, the first questions" if differ else f"{sizes[0]} answers"
    return Table(f"{runs[0].card.task}: {count}", head, rows)


def _distinct_cell(run: Results, n: int) -> str:
    value, around = (run.whole.get(name, math.nan) for name in (f"distinct_{n}", f"distinct_{n}_around"))
    if math.isnan(value) or math.isnan(around):
        return "–" if math.isnan(value) else f"{value:.3f}"
    return f"{value:.3f} ± {around:.3f}"


def repetitions(runs: Sequence[Results]) -> Table:
    """Repeated n-grams, and distinct ones."""
    head = ["", *(f"repeated {n}-grams" for n in range(1, 5)), *(f"distinct-{n}" for n in (1, 2, 3))]
    rows = [
        [
            run.card.name,
            *(_cell(f"repetition_{n}", run.means.get(f"repetition_{n}")) for n in range(1, 5)),
            *(_distinct_cell(run, n) for n in (1, 2, 3)),
        ]
        for run in runs
    ]
    return Table("Repetition", head, rows)


def speed(runs: Sequence[Results]) -> Table:
    """Calls and time."""
    head = ["", "model calls", "tokens per call", "seconds per answer", "tokens/s"]
    rows = []
    for run in runs:
        tokens = sum(answer.tokens for answer in run.answers.values())
        calls = sum(answer.model_calls for answer in run.answers.values())
        seconds = run.whole["seconds"]
        rows.append(
            [
                run.card.name,
                _cell("model_calls", run.means.get("model_calls")),
                f"{tokens / calls:.2f}" if calls else "–",
                f"{seconds / max(len(run.answers), 1):.2f}",
                f"{tokens / seconds:.1f}" if seconds and tokens else "–",
            ]
        )
    return Table("Speed", head, rows)


def under_parallelism(runs: Sequence[Results]) -> Table | None:
    """Accuracy under parallelism of each decoder that was run at several paces; None where none was.

    See `eval.parallel.accuracy_under_parallelism`; y_max is the best accuracy of all runs. A seed at one pace
    has no area; over several seeds that have one it is their mean ± standard deviation, and accuracies are
    means.
    """
    lines: dict[tuple[Any, ...], dict[Any, list[tuple[Results, Point]]]] = {}
    for run in runs:
        right, rate = run.means.get("right"), _tokens_per_call(run)
        if right is not None and rate is not None:
            free = {"rate", "steps", "seconds", "seed"}
            setting = tuple(sorted((k, repr(v)) for k, v in run.card.settings.items() if k not in free))
            model = run.card.system, run.card.fingerprint
            seeds = lines.setdefault((*model, run.card.decoder, setting), {})
            point = Point(rate, 100 * right.mean)
            seeds.setdefault(run.card.settings.get("seed"), []).append((run, point))
    points = [point for seeds in lines.values() for line in seeds.values() for _, point in line]
    best = max((point.accuracy for point in points), default=0.0)
    swept = [{seed: line for seed, line in seeds.items() if len(line) > 1} for seeds in lines.values()]
    lines_of_paces = [seeds for seeds in swept if seeds]
    head = ["slowest run of each decoder", "AUP", "right, at tokens per call"]
    rows = [_area(seeds, best) for seeds in lines_of_paces]
    return Table("Accuracy under parallelism", head, rows) if rows else None


def _area(seeds: Mapping[Any, list[tuple[Results, Point]]], best: float) -> list[str]:
    """The row of a decoder: runs with their points, by seed."""
    areas = [accuracy_under_parallelism([point for _, point in line], best) for line in seeds.values()]
    paces: dict[tuple[Any, ...], list[tuple[Results, Point]]] = {}
    for run, point in (pair for line in seeds.values() for pair in line):
        paces.setdefault(_pace(run), []).append((run, point))
    means = [
        (mean(p.tokens_per_call for _, p in pairs), mean(p.accuracy for _, p in pairs), pairs[0][0].card.name)
        for pairs in paces.values()
    ]
    means.sort()
    area = f"{mean(areas):.1f}" + (f" ± {stdev(areas):.1f}" if len(areas) > 1 else "")
    return [means[0][2], area, ", ".join(f"{right:.1f} % at {rate:.2f}" for rate, right, _ in means)]


def _tokens_per_call(run: Results) -> float | None:
    """Tokens per model call over all answers; None where they are not known."""
    calls = sum(answer.model_calls for answer in run.answers.values())
    return sum(answer.tokens for answer in run.answers.values()) / calls if calls else None


def paired(runs: Sequence[Results], name: str, against: Sequence[str] = ()) -> Table:
    """Differences between runs on the questions that both have: mean, and p of a permutation test.

    Each run is compared with the first one of its system and pace, and with the first one of its label, so
    that one thing differs: the decoder, or the system.

    Args:
        runs: on one task.
        name: of the measure.
        against: decoders and systems with which everything is compared in place of the first: with that
            decoder's run of the same system and pace, and with that system's run of the same label, or its
            only one.
    """
    measure, rows = MEASURES[name], []
    for i, run in enumerate(runs):
        for first in _partners(run, runs[:i], runs, against):
            first_values, second_values = (by_question(r.measured, name) for r in (first, run))
            keys = [
                key
                for key in first_values
                if not math.isnan(first_values[key] + second_values.get(key, math.nan))
            ]
            if not keys:
                continue
            difference, p = paired_test(
                [first_values[key] for key in keys], [second_values[key] for key in keys]
            )
            shown = measure.show(difference)
            shown = shown if shown.startswith(("-", "–")) else f"+{shown}"
            p_text = "< 0.001" if p < 0.001 else f"{p:.3f}"
            rows.append([run.card.name, first.card.name, str(len(keys)), shown, p_text])
    head = ["", "against", "questions", "difference", "p"]
    return Table(f"{measure.title}: differences", head, rows)


def _partners(
    run: Results, earlier: Sequence[Results], runs: Sequence[Results], against: Sequence[str]
) -> list[Results]:
    """The runs that a run is compared with."""

    def decoders(candidate: Results) -> bool:
        return (candidate.card.system, _pace(candidate)) == (run.card.system, _pace(run))

    def systems(candidate: Results) -> bool:
        return candidate.card.label == run.card.label

    if not against:
        partners = [
            next((candidate for candidate in earlier if matches(candidate)), None)
            for matches in (decoders, systems)
        ]
        return [candidate for candidate in partners if candidate is not None]
    return [
        candidate
        for candidate in runs
        if (
            candidate.card.decoder in against
            and candidate.card.label != run.card.label
            and decoders(candidate)
        )
        or (
            candidate.card.system in against
            and candidate.card.system != run.card.system
            and (systems(candidate) or sum(each.card.system == candidate.card.system for each in runs) == 1)
        )
    ]


def _pace(run: Results) -> tuple[Any, ...]:
    return tuple(run.card.settings.get(name) for name in ("window", "steps", "max_tokens", "rate"))


def judged(runs: Sequence[Results]) -> Table | None:
    """Table of the judges' verdicts; None where there are none.

    Raises:
        DataError: for a verdict whose file does not hold the figures of its method.
    """
    rows = [
        [run.card.name, verdict.judge, verdict.method, verdict.against, figure, value]
        for run in runs
        for verdict in run.verdicts
        for figure, value in _told_by(run, verdict)
    ]
    return Table("Judges", ["", "judge", "method", "against", "figure", "value"], rows) if rows else None


def _told_by(run: Results, verdict: Verdict) -> list[tuple[str, str]]:
    try:
        return _figures(verdict)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{run.folder / 'verdicts'}: the verdict of {verdict.judge} ({verdict.method}) lacks figures "
            f"({error!r})"
        ) from error


def _figures(verdict: Verdict) -> list[tuple[str, str]]:
    """The figures of a verdict, and their values with half of the 95 % interval."""
    figures = verdict.figures
    if verdict.method == "alpaca_eval":
        rates = [("win rate", f"{_rate(verdict)} of {figures['count']}")]
        if figures["lc_win_rate"] is not None:
            value = _around(figures["lc_win_rate"], figures["lc_standard_error"], 1)
            rates.append((f"LC win rate ({figures['lc_kind']})", f"{value} %"))
        return rates
    if verdict.method == "mt_bench":
        turns = [
            (f"grade, turn {i}", "–" if grade is None or math.isnan(grade) else f"{grade:.2f}")
            for i, grade in enumerate(figures["by_turn"], start=1)
        ]
        return [*turns, ("grade", _interval(figures["overall"]))]
    if verdict.method == "mt_bench_pairs":
        return [("win rate, ties as halves", _rate(verdict))]
    return [(verdict.measure, _interval(figures["mean"]))]


def _rate(verdict: Verdict) -> str:
    """The win rate with half of its interval, which has a width also where every answer wins."""
    answers = {key: {verdict.measure: value} for key, value in verdict.by_answer.items()}
    return _cell(verdict.measure, summary(answers).get(verdict.measure))


def _around(value: float, error: float | None, digits: int) -> str:
    """A figure with half of its 95 % interval, from its standard error where that is known."""
    has_error = error is not None and not math.isnan(error)
    half = f" ± {1.96 * error:.{digits}f}" if has_error and error is not None else ""
    return f"{value:.{digits}f}{half}"


def _interval(figures: Mapping[str, float | None]) -> str:
    """A mean with half of its interval, as a verdict's file has it."""
    mean, low, high = (figures.get(name) for name in ("mean", "low", "high"))
    if mean is None:
        return "–"
    half = "" if low is None or high is None else f" ± {max(high - mean, mean - low):.2f}"
    return f"{mean:.2f}{half}"
