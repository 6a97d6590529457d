"""`dlm eval judge`: have runs judged by another model; verdicts go into the runs' folders."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dlm.cli import Command
from dlm.errors import ConfigError, unknown_name
from eval.judge import JudgeConfig

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
        data: local copy of the questions.
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
    from eval.formats import write_json
    from eval.judge import DryRunError, Judge
    from eval.run import Results

    judge, estimates = Judge(config.judge), []
    results = [Results.load(Path(folder)) for folder in config.runs]
    others = results[1:] if config.method == "mt_bench_pairs" else results
    for result in others:
        try:
            name, found = _judged(config, judge, result, results[0])
        except DryRunError as stop:
            estimates.append(stop.estimate)
            print(f"{result.card.name}: {stop.estimate}")
            continue
        write_json(
            result.folder / f"{name}.json", {"judge": config.judge.model, "url": config.judge.url, **found}
        )
        print(f"{result.card.name}: {_line(found)}")
    if estimates:
        calls, dollars = sum(e.calls for e in estimates), sum(e.dollars for e in estimates)
        print(f"in all {calls} requests, ${dollars:.2f}; nothing was asked")
    return 0


def _judged(config: JudgeCommandConfig, judge: Any, result: Any, first: Any) -> tuple[str, dict[str, Any]]:
    """The verdict's file name and its contents."""
    from eval.tasks import load_questions, with_references

    questions = load_questions(result.card.task, config.data)
    if config.method == "alpaca_eval":
        return _alpaca(config, judge, result, questions)
    if config.method == "geval":
        from eval.geval import score

        return f"geval_{config.aspect}", asdict(score(questions, result.answers, judge, config.aspect))
    from eval.mt_bench import compare, grade, load_prompts

    prompts = load_prompts(config.prompts)
    if config.references:
        questions = with_references(questions, config.references)
    if config.method == "mt_bench":
        return "mt_bench", asdict(grade(questions, result.answers, judge, prompts))
    pairs = compare(questions, first.answers, result.answers, judge, prompts)
    return "mt_bench_pairs", {"first": first.card.name, **asdict(pairs)}


def _alpaca(
    config: JudgeCommandConfig, judge: Any, result: Any, questions: Any
) -> tuple[str, dict[str, Any]]:
    from dlm.data.records import read_records
    from eval.alpaca import win_rate
    from eval.formats import model_outputs, reference_outputs

    if config.references:
        path = Path(config.references)
        references = list(read_records(path / "model_outputs.json" if path.is_dir() else path))
    else:
        references = reference_outputs(questions)
    outputs = model_outputs(questions, result.answers, result.card.name)
    rate, annotations = win_rate(outputs, references, judge, config.annotator, result.card.name)
    verdicts = [{"instruction": row["instruction"], "preference": row["preference"]} for row in annotations]
    return "alpaca_eval", {"annotator": config.annotator, **asdict(rate), "verdicts": verdicts}


def _line(found: dict[str, Any]) -> str:
    """One line for people: the figures, without the verdicts one by one."""
    out = []
    for name, value in found.items():
        if isinstance(value, float):
            out.append(f"{name} {value:.2f}")
        elif isinstance(value, int) or (isinstance(value, str) and value):
            out.append(f"{name} {value}")
        elif name in ("by_turn", "mean", "overall", "tally"):
            inner = value.items() if isinstance(value, dict) else enumerate(value, start=1)
            out.append(f"{name} " + " ".join(f"{k}={v:.4g}" for k, v in inner))
    return ", ".join(out)


COMMAND = Command("have runs judged by a model at an endpoint", JudgeCommandConfig, run, positional="runs")
