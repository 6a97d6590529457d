"""`dlm eval judge`: have runs judged by another model; verdicts go into the runs' folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.cli import Command
from dlm.errors import ConfigError, unknown_name
from eval.config import JudgeConfig

if TYPE_CHECKING:
    from eval.judge import Judge
    from eval.run import Results, Verdict
    from eval.tasks import Question

METHODS = ("alpaca_eval", "mt_bench", "mt_bench_pairs", "geval")


@dataclass(frozen=True)
class JudgeCommandConfig:
    """Settings of `dlm eval judge`.

    Args:
        runs: folders of runs (the words that are no options); for mt_bench_pairs the first is compared with
            each of the others.
        method: alpaca_eval (pairwise against references, by the package of that name; for Wiki and
            Arena-Hard too), mt_bench (grades from 1 to 10), mt_bench_pairs (both orders), geval (1 to 5).
        judge: who judges.
        data: local copy of the questions; by default the file that each run was given.
        references: for alpaca_eval the reference outputs, a file in AlpacaEval's format or the folder of a
            run, and by default those of the task; for MT-Bench the reference answers.
        annotator: for alpaca_eval, a config of the package by name, or its folder.
        prompts: for MT-Bench, a local copy of the judge's prompts.
        aspect: for geval: coherence, relevance or fluency.
    """

    runs: list[str] = field(default_factory=list)
    method: str = "alpaca_eval"
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(model="gpt-4-1106-preview"))
    data: str = ""
    references: str = ""
    annotator: str = "weighted_alpaca_eval_gpt4_turbo"
    prompts: str = ""
    aspect: str = "coherence"

    def __post_init__(self) -> None:
        """Check the names."""
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if not self.runs:
            raise ConfigError("name the folders of runs, such as runs/eval/alpaca_eval/*")
        if self.method == "mt_bench_pairs" and len(self.runs) < 2:
            raise ConfigError("mt_bench_pairs compares the first run with others: name at least two")


def run(config: JudgeCommandConfig) -> int:
    """Judge run after run; what was judged before comes from the cache."""
    from dlm.lock import alone_in
    from eval.judge import DryRunError, Judge
    from eval.run import Results

    judge, estimates = Judge(config.judge), []
    results = [Results.load(Path(folder)) for folder in config.runs]
    if config.method == "mt_bench_pairs":
        _check_tasks(results)
    for result in results[1:] if config.method == "mt_bench_pairs" else results:
        try:
            with nullcontext() if config.judge.dry_run else alone_in(result.folder):
                verdict = _judged(config, judge, result, results[0])
                verdict.save(result.folder)
        except DryRunError as stop:
            estimates.append(stop.estimate)
            print(f"{result.card.name}: {stop.estimate}")
            continue
        print(f"{result.card.name}: {_figure_line(verdict.figures)}")
    if estimates:
        calls, dollars = sum(e.calls for e in estimates), sum(e.dollars for e in estimates)
        money = f", ${dollars:.2f}" if dollars else ""
        print(f"in all {calls} requests{money}; nothing was asked")
    return 0


def _check_tasks(results: Sequence[Results]) -> None:
    """Refuse to compare answers to the questions of different tasks, before anything is asked."""
    first = results[0]
    for result in results[1:]:
        if first.card.task != result.card.task:
            raise ConfigError(
                f"{first.folder} answers {first.card.task} and {result.folder} {result.card.task}: "
                "answers are compared with those to the same questions"
            )


def _judged(config: JudgeCommandConfig, judge: Judge, result: Results, first: Results) -> Verdict:
    """Verdict of the judge on a run."""
    from eval.generation import check
    from eval.run import Verdict
    from eval.tasks import load_questions

    questions = load_questions(result.card.task, config.data or _own_data(result))
    check(questions, result.answers, str(result.folder))
    if config.method == "mt_bench_pairs":
        check(questions, first.answers, str(first.folder))
    if config.method == "alpaca_eval":
        return _alpaca(config, judge, result, questions)
    if config.method == "geval":
        from eval.geval import score

        result_scores = score(questions, result.answers, judge, config.aspect)
        by_answer = {f"{question}/0": value for question, value in result_scores.scores.items()}
        figures = _shown_figures(result_scores, "scores")
        setting = _digest(judge.config.url)
        return Verdict("geval", judge.config.model, config.aspect, "score", by_answer, figures, setting)
    return _mt_bench_verdict(config, judge, result, first, questions)


def _own_data(result: Results) -> str:
    """The file of questions that a run was given; empty if it was given none, or does not know where it was.

    Raises:
        ConfigError: when the file is no longer there.
    """
    source = result.card.source
    if source and not Path(source).is_file():
        raise ConfigError(f"{result.folder}: its questions are no longer at {source}; give --data")
    return source


def _mt_bench_verdict(
    config: JudgeCommandConfig, judge: Judge, result: Results, first: Results, questions: list[Question]
) -> Verdict:
    """Grades, or a comparison with the first run."""
    from eval.mt_bench import compare, grade, load_prompts, load_references
    from eval.run import Verdict

    prompts, model = load_prompts(config.prompts), judge.config.model
    questions = load_references(questions, config.references)
    setting = _digest(judge.config.url, prompts, {question.id: question.reference for question in questions})
    if config.method == "mt_bench":
        grades = grade(questions, result.answers, judge, prompts)
        figures = _shown_figures(grades, "grades")
        return Verdict("mt_bench", model, "", "grade", grades.grades, figures, setting)
    pairs = compare(questions, result.answers, first.answers, judge, prompts)
    against = f"{first.card.name} [{_digest(f'{first.card.model} {first.card.fingerprint}')}]"
    figures = _shown_figures(pairs, "by_answer")
    return Verdict("mt_bench_pairs", model, against, "win", pairs.by_answer, figures, setting)


def _digest(*parts: Any) -> str:
    """Six letters by which two opponents, or two settings, of one name differ."""
    text = parts[0] if len(parts) == 1 else json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=3).hexdigest()


def _alpaca(config: JudgeCommandConfig, judge: Judge, result: Results, questions: list[Question]) -> Verdict:
    """Win rates against references."""
    from dlm.data.records import read_records
    from eval.alpaca import win_rate
    from eval.formats import model_outputs, reference_outputs
    from eval.run import Verdict

    asked = [question for question in questions if (question.id, 0) in result.answers]
    if config.references:
        path = Path(config.references)
        references = list(read_records(path / "model_outputs.json" if path.is_dir() else path))
        against = f"{path.name} [{_digest(json.dumps(references, sort_keys=True, default=str))}]"
    else:
        asked = [question for question in asked if question.reference]  # one for each, in the same order
        references, against = reference_outputs(asked), "references"
    outputs = model_outputs(asked, result.answers, result.card.name)
    rate, rows = win_rate(outputs, references, judge, config.annotator, result.card.name)
    ids = [question.id for question in asked]
    won = {f"{ids[row['number']]}/0": row["preference"] - 1 for row in rows if row["preference"] is not None}
    against = f"{against}, {config.annotator}"
    given = references if config.references else reference_outputs(questions)  # however many were answered
    setting = _digest(judge.config.url, given)
    return Verdict("alpaca_eval", judge.config.model, against, "win", won, asdict(rate), setting)


def _shown_figures(tally: Any, omitted: str) -> dict[str, Any]:
    """The figures of a dataclass, without those of single answers."""
    return {name: value for name, value in asdict(tally).items() if name != omitted}


def _figure_line(figures: dict[str, Any]) -> str:
    """One line for people."""
    out = []
    for name, value in figures.items():
        inner = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value, 1)
            if isinstance(value, list)
            else ()
        )
        if isinstance(value, float):
            out.append(f"{name} {value:.2f}")
        elif isinstance(value, int | str):
            out.append(f"{name} {value}")
        elif inner:
            out.append(f"{name} " + " ".join(f"{k}={v:.4g}" for k, v in inner))
    return ", ".join(out)


COMMAND = Command("have runs judged by a model at an endpoint", JudgeCommandConfig, run, positional="runs")
