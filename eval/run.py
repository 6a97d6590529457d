"""A run: one system on one task, in a folder of its own, from questions to measures.

<output>/<task>/<label>/run.json             what was asked of whom, and how
                        answers.jsonl        one line per answer
                        part-<i>.jsonl       answers of process i, until they are merged
                        model_outputs.json   the same for AlpacaEval's tools
                        model_answer/        the same for MT-Bench's
                        metrics.json         measures of every answer
                        verdicts/            what judges said
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dlm.errors import ConfigError, DataError
from dlm.json_files import read_object
from eval.answers import Answer, AnswerFile
from eval.formats import model_answers, model_outputs, without_nan, write_json, write_lines
from eval.generation import check, generate
from eval.metrics import Instruments, distinct, distinct_around, measure, summary
from eval.statistics import Estimate
from eval.systems import System
from eval.tasks import Question

logger = logging.getLogger(__name__)

BAND = ("usual_mean", "usual_deviation")
"""Figures of a run that say which perplexities are usual, see `eval.fluency.Band`."""


MOST_LETTERS = 180
"""Of a name in that of its file or folder."""


def _shortened(plain: str, name: str) -> str:
    """A file's name, ended by a digest of the whole name where it is too long."""
    if len(plain.encode()) <= MOST_LETTERS:
        return plain
    short = plain.encode()[:MOST_LETTERS].decode(errors="ignore")
    return f"{short}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True)
class Card:
    """Task, system and settings of a run; written to run.json.

    Attributes:
        task: its name.
        data: the file of questions; empty for the original.
        system: the model's name for tables.
        model: path, hub id or URL.
        fingerprint: see `dlm.origin.fingerprint`.
        label: the variant.
        decoder: name of the decoder; empty for the checkpoint's own, and for systems that have none.
        settings: everything else that decides what comes out.
        source: where the file of questions was.
        stands_for: the decoder that the checkpoint's own was, with its options; empty where one is named.
    """

    task: str
    data: str
    system: str
    model: str
    fingerprint: str
    label: str
    decoder: str
    settings: dict[str, Any]
    source: str = ""
    stands_for: str = ""

    @property
    def name(self) -> str:
        """The system and the variant."""
        return f"{self.system}, {self.label}" if self.label else self.system

    def folder(self, output: str | Path) -> Path:
        """Folder of the run: in `output`, whatever its name."""
        name = re.sub(r"[^\w.=,-]+|^\.+", "_", self.name.replace(", ", "+"))
        return Path(output) / self.task / (_shortened(name, self.name) or "_")


@dataclass(frozen=True)
class Results:
    """A run that is there."""

    folder: Path
    card: Card
    answers: dict[tuple[str, int], Answer]
    measured: dict[str, dict[str, float]]
    """Measures of every answer, by "id/turn"."""
    means: dict[str, Estimate]
    whole: dict[str, float]
    """Figures of the run as a whole: distinct-n (and half of its interval), wall time, usual perplexity."""
    verdicts: list[Verdict] = field(default_factory=list)
    marks: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the model that took a measure; empty in runs of earlier versions."""

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read a run's folder.

        Raises:
            DataError: when it is none, or was not finished.
        """
        if not (folder / "run.json").is_file():
            raise DataError(f"{folder}: no run of `dlm eval` (no run.json in it); name the folder of one run")
        if not (folder / "metrics.json").is_file():
            raise DataError(f"{folder}: not a finished run of `dlm eval` (no metrics.json in it)")
        try:
            card = Card(**json.loads((folder / "run.json").read_text(encoding="utf-8")))
            dict(card.settings)
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            measured = {key: _nan_for_none(row) for key, row in metrics["answers"].items()}
            overall = _nan_for_none(metrics["whole"])
            marks = dict(metrics.get("marks", {}))
            overall["seconds"] = float(overall["seconds"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{folder}: not a finished run of `dlm eval` ({error!r})") from error
        verdicts = load_verdicts(folder)
        measured = _with_verdicts(measured, verdicts, _prevailing([verdicts]))
        stored = AnswerFile(folder / "answers.jsonl").read()
        answers = {key: answer for key, answer in stored.items() if f"{key[0]}/{key[1]}" in measured}
        if len(answers) < len(measured) or not measured:
            raise DataError(
                f"{folder}: answers.jsonl has {len(answers)} of the {len(measured)} answers in metrics.json; "
                "give the command of the run again"
            )
        return cls(folder.resolve(), card, answers, measured, summary(measured), overall, verdicts, marks)

    def without(self, names: Sequence[str]) -> Results:
        """The run without some measures."""
        if not names:
            return self
        measured = {
            key: {name: value for name, value in row.items() if name not in names}
            for key, row in self.measured.items()
        }
        means = {name: value for name, value in self.means.items() if name not in names}
        return replace(self, measured=measured, means=means)


def comparable(runs: Sequence[Results]) -> list[Results]:
    """The runs of one task with figures that mean the same.

    Verdicts of a measure are those of one judge, by one method, against one thing: of the most frequent kind
    among the runs. So are likelihoods those under one reader, and relevance that of one encoder. Inlier rates
    go by the usual perplexities of the run with most answers: a run takes them from the references of its own
    questions, unless `--usual` names rows; so runs of fewer questions had others. Where no run has recorded
    them, rates that may differ in meaning are left out.
    """
    runs = _of_equal_marks(_of_equal_kinds(runs))
    judged = [run for run in runs if "inlier" in run.means]
    if len({_band(run) for run in judged}) < 2:
        return list(runs)
    recorded = [run for run in judged if "usual_mean" in run.whole]
    longest = max(recorded, key=lambda run: len(run.measured)) if recorded else None
    return [_rejudged(run, longest) if "inlier" in run.means else run for run in runs]


VerdictKind = tuple[str, str, str, str]
"""Method, judge, what is compared with, and the setting."""


def _prevailing(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, VerdictKind]:
    """By measure, the kind that most runs have verdicts of; of several the one with most answers."""
    runs: dict[str, Counter[VerdictKind]] = {}
    answers: Counter[tuple[str, VerdictKind]] = Counter()
    for verdict in itertools.chain(*verdicts):
        runs.setdefault(verdict.measure, Counter())[verdict.kind] += 1
        answers[verdict.measure, verdict.kind] += len(verdict.by_answer)
    return {
        measure: max(counts, key=lambda kind: (counts[kind], answers[measure, kind], kind))
        for measure, counts in runs.items()
    }


def _with_verdicts(
    measured: Mapping[str, dict[str, float]], verdicts: Sequence[Verdict], kinds: Mapping[str, VerdictKind]
) -> dict[str, dict[str, float]]:
    """Measures of answers, with the verdicts of these kinds and no others."""
    out = {key: {n: v for n, v in row.items() if n not in kinds} for key, row in measured.items()}
    for verdict in verdicts:
        if kinds[verdict.measure] == verdict.kind:
            for key, value in verdict.by_answer.items():
                if key in out:
                    out[key][verdict.measure] = value
    return out


def _of_equal_kinds(runs: Sequence[Results]) -> list[Results]:
    """The runs with verdicts of one kind for each measure."""
    kinds, out = _prevailing([run.verdicts for run in runs]), []
    for run in runs:
        if all(kinds[verdict.measure] == verdict.kind for verdict in run.verdicts):
            out.append(run)
            continue
        logger.warning(
            "%s: verdicts of another judge or setting than in most runs are left out", run.card.name
        )
        measured = _with_verdicts(run.measured, run.verdicts, kinds)
        other_means = {name: value for name, value in run.means.items() if name not in kinds}
        equal_rows = {key: {n: v for n, v in row.items() if n in kinds} for key, row in measured.items()}
        out.append(replace(run, measured=measured, means={**other_means, **summary(equal_rows)}))
    return out


def _of_equal_marks(runs: Sequence[Results]) -> list[Results]:
    """The runs without measures that another model took than in most of them."""
    takers: dict[str, Counter[str]] = {}
    for run in runs:
        for name, mark in run.marks.items():
            takers.setdefault(name, Counter())[mark] += 1
    usual = {name: max(counts, key=lambda mark: (counts[mark], mark)) for name, counts in takers.items()}
    out = []
    for run in runs:
        others = [name for name, mark in run.marks.items() if mark != usual[name] and name in run.means]
        if others:
            logger.warning(
                "%s: %s left out, since another model measured there than in most runs",
                run.card.name, " and ".join(others),
            )  # fmt: skip
        out.append(run.without(others))
    return out


def _band(run: Results) -> tuple[float | int, ...]:
    """Mean and deviation of the usual perplexity; of runs that did not record them, how many answers."""
    band = tuple(run.whole[name] for name in BAND if name in run.whole)
    return band or (len(run.measured),)


def _rejudged(run: Results, longest: Results | None) -> Results:
    """A run with the usual perplexities of another; without inlier rates if there is none."""
    run = run.without(["inlier"])
    if longest is None:
        return run
    from eval.fluency import Band

    limits = {name: longest.whole[name] for name in BAND}
    band = Band(*limits.values())
    read = {key: row["nll"] for key, row in run.measured.items() if "nll" in row}
    rates = {key: {"inlier": float(band.holds(nats))} for key, nats in read.items()}
    measured = {key: {**row, **rates.get(key, {})} for key, row in run.measured.items()}
    means, whole = {**run.means, **summary(rates)}, {**run.whole, **limits}
    return replace(run, measured=measured, means=means, whole=whole)


def _nan_for_none(row: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float("nan") if value is None else float(value) for name, value in row.items()}


@dataclass(frozen=True)
class Verdict:
    """Verdict of a judge on a run; a file of its folder `verdicts`.

    Attributes:
        method: of `dlm eval judge`.
        judge: name of the model that judged.
        against: the references, or the run compared with, or the annotator; empty where there is none.
        measure: name of the figure in `eval.metrics.MEASURES`.
        by_answer: the figure of each answer, by "id/turn".
        figures: of the run as a whole.
        setting: a digest of where the judge was, and of the prompts and references it was given.
    """

    method: str
    judge: str
    against: str
    measure: str
    by_answer: dict[str, float]
    figures: dict[str, Any]
    setting: str = ""

    @property
    def kind(self) -> VerdictKind:
        """The settings that compared verdicts have in common."""
        return self.method, self.judge, self.against, self.setting

    def save(self, folder: Path) -> None:
        """Write it into a run's folder, beside those of other judges."""
        parts = (self.method, self.measure, self.judge, self.against, self.setting)
        name = "-".join(part for part in parts if part)
        plain = re.sub(r"[^A-Za-z0-9.=,-]+", "_", name)
        file = folder / "verdicts" / f"{_shortened(plain, name)}.json"
        write_json(file, without_nan(asdict(self)))


def load_verdicts(folder: Path) -> list[Verdict]:
    """The verdicts on a run, in order of their names.

    Raises:
        DataError: naming a file that is none.
    """
    verdicts = []
    for file in sorted((folder / "verdicts").glob("*.json")):
        try:
            verdict = Verdict(**json.loads(file.read_text(encoding="utf-8")))
            verdicts.append(
                replace(verdict, by_answer=_nan_for_none(verdict.by_answer), figures=dict(verdict.figures))
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{file}: not a verdict of `dlm eval judge` ({error})") from error
    return verdicts


def representatives(runs: Sequence[Results], limit: int) -> list[Results]:
    """One run of each system and decoder, that of middling cost; so many, of all systems in turn."""
    kinds: dict[tuple[str, str], list[Results]] = {}
    for run in runs:
        kinds.setdefault((run.card.system, run.card.decoder or run.card.label), []).append(run)
    turns: dict[str, int] = {}
    middles: list[tuple[int, int, Results]] = []
    for (system, _), kind_runs in kinds.items():
        kind_runs.sort(key=lambda run: sum(answer.model_calls for answer in run.answers.values()))
        turns[system] = turns.get(system, 0) + 1
        middles.append((turns[system], len(middles), kind_runs[len(kind_runs) // 2]))
    picked = sorted(middles, key=lambda entry: entry[:2])[:limit]
    return [run for _, _, run in sorted(picked, key=lambda entry: entry[1])]


def open_run(folder: Path, card: Card) -> None:
    """Begin a run, or go on with one of the same settings.

    Raises:
        ConfigError: when the folder holds a run of other settings.
    """
    file = folder / "run.json"
    if file.exists():
        old = read_object(file, DataError, "remove the folder")
        new = json.loads(json.dumps(asdict(card)))
        for name in ("task", "fingerprint", "label", "decoder", "settings"):
            if old.get(name) != new[name]:
                raise ConfigError(
                    f"{folder} holds a run whose {name} was {old.get(name)!r}, not {new[name]!r}; "
                    "give another --output, or remove it"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(card))


def answer_all(
    folder: Path, card: Card, questions: Sequence[Question], system: System, share: tuple[int, int] = (0, 1)
) -> None:
    """Have the questions answered that are not answered yet; those of this process's share.

    Args:
        folder: of the run.
        card: of the run.
        questions: of the task.
        system: who answers.
        share: number of this process, and how many there are.
    """
    rank, count = share
    earlier = AnswerFile(folder / "answers.jsonl").read()
    part = AnswerFile(folder / f"part-{rank}.jsonl")
    generate(questions[rank::count], system, part, earlier, card.name, quiet=rank > 0)


def merge(folder: Path, questions: Sequence[Question]) -> dict[tuple[str, int], Answer]:
    """Put the answers of all processes into one file, in the order of the questions."""
    file = AnswerFile(folder / "answers.jsonl")
    answers = file.read()
    parts = sorted(folder.glob("part-*.jsonl"))
    for part in parts:
        answers |= AnswerFile(part).read()
    order = {question.id: i for i, question in enumerate(questions)}
    ordered = sorted(answers.values(), key=lambda a: (order.get(a.id, len(order)), a.turn))
    if parts:
        file.write(ordered)
        for part in parts:
            part.unlink()
    merged = {answer.key: answer for answer in ordered if answer.id in order}
    check(questions, merged, str(folder))
    return merged


def finish(
    folder: Path,
    card: Card,
    questions: Sequence[Question],
    answers: Mapping[tuple[str, int], Answer],
    instruments: Instruments,
) -> None:
    """Measure the answers, and write them in the formats of the official tools."""
    write_json(folder / "model_outputs.json", model_outputs(questions, answers, card.name))
    name = re.sub(r"[^\w.=,-]+", "_", card.name)
    file = folder / "model_answer" / f"{_shortened(name, card.name)}.jsonl"
    write_lines(file, model_answers(questions, answers, name))
    measured = measure(card.task, questions, dict(answers), instruments, card.name)
    texts = [answer.text for answer in answers.values()]
    overall = {"seconds": sum(answer.seconds for answer in answers.values())}
    for n in (1, 2, 3):
        overall[f"distinct_{n}"] = distinct(texts, n)
        overall[f"distinct_{n}_around"] = distinct_around(texts, n)
    if instruments.band is not None:
        overall |= dict(zip(BAND, (instruments.band.mean, instruments.band.deviation), strict=True))
    figures = {"whole": overall, "answers": measured, "marks": instruments.marks}
    write_json(folder / "metrics.json", without_nan(figures))
