"""A report of runs: report.md with its plots beside it, and report.html in one piece."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from dlm.atomic import write_whole
from dlm.errors import DataError, unknown_name
from eval.report import plots, tables
from eval.report.tables import Table
from eval.run import BAND, Results, comparable, representatives
from eval.variants import SIZES


@dataclass(frozen=True)
class Plot:
    """A picture and what it shows."""

    name: str
    caption: str
    svg: str


@dataclass
class Part:
    """A section."""

    title: str
    note: str = ""
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


def find_runs(folders: Sequence[str]) -> list[Results]:
    """The finished runs in some folders, or below them, in order of their names.

    Raises:
        DataError: when there is none.
    """
    paths = {file.resolve() for folder in folders for file in Path(folder).glob("**/run.json")}
    files = sorted(paths, key=_natural)
    runs = [Results.load(file.parent) for file in files if (file.parent / "metrics.json").exists()]
    if not runs:
        raise DataError(f"no finished runs of `dlm eval` in {', '.join(folders)}")
    return runs


def _natural(path: Path) -> list[Any]:
    """Order in which 9 comes before 16."""
    import re

    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def write_report(
    runs: Sequence[Results],
    output: Path,
    title: str,
    texts: int = 8,
    ldw: str = "",
    against: Sequence[str] = (),
) -> list[Path]:
    """Write the report.

    Args:
        runs: what it is about.
        output: folder.
        title: of the report.
        texts: questions whose answers are shown side by side.
        ldw: figures that `dlm inspect ldw` wrote (.json); empty for none.
        against: decoders and systems with which everything is compared, see `eval.report.tables.paired`.

    Returns:
        The files.
    """
    output.mkdir(parents=True, exist_ok=True)
    _check_baselines(against, runs)
    _check_run_names(runs)
    _check_questions(runs)
    tasks = sorted({run.card.task for run in runs})
    by_task = [(task, comparable([run for run in runs if run.card.task == task])) for task in tasks]
    parts = [part for task, task_runs in by_task for part in _task(task, task_runs, against)]
    if ldw:
        curves = _curves(Path(ldw))
        caption = "Mean probability mass on a fresh canvas, by distance from the prompt."
        parts.append(Part("The long decoding window", plots=[_plot("ldw", caption, plots.ldw(curves))]))
    lead = (
        f"{len(runs)} runs on {', '.join(tasks)}. Means over answers; ± is half of the 95 % interval, "
        "or its ends stand behind the mean where it is lopsided; it takes five answers or more. "
        "Equal seeds for all decoders. "
        "p by paired permutation tests on the questions both have."
    ) + _sentence_on_default(runs)
    side = [(task, *_side_by_side(task_runs, texts)) for task, task_runs in by_task]
    files = [output / "report.md", output / "report.html"]
    write_whole(files[0], _markdown(title, lead, parts, side))
    write_whole(files[1], _html(title, lead, parts, side))
    for part in parts:
        for plot in part.plots:
            files.append(output / f"{plot.name}.svg")
            write_whole(files[-1], plot.svg)
    return files


def _sentence_on_default(runs: Sequence[Results]) -> str:
    """A sentence on what "default" stands for, with a warning where that differs from system to system."""
    systems: dict[str, set[str]] = {}
    for run in runs:
        if run.card.stands_for:
            systems.setdefault(run.card.stands_for, set()).add(run.card.system)
    if not systems:
        return ""
    listed = "; ".join(f"{decoder} ({', '.join(sorted(names))})" for decoder, names in systems.items())
    sentence = f' "default" is the checkpoint\'s own decoder: {listed}.'
    if len(systems) > 1:
        sentence += " They differ, and so do these systems by more than their weights."
    return sentence


def _curves(file: Path) -> Any:
    """The figures of `dlm inspect ldw`."""
    try:
        curves = json.loads(file.read_text(encoding="utf-8"))
        if not curves or any(set(curve) < {"frequent", "prompt", "end"} for curve in curves.values()):
            raise ValueError("no curves by model")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{file}: not what `dlm inspect ldw` writes ({error})") from error
    return curves


def _check_run_names(runs: Sequence[Results]) -> None:
    """Refuse two models of one name: their runs would count as those of one."""
    named: dict[str, Results] = {}
    for run in runs:
        if "://" in run.card.model:  # an endpoint, whose address may change
            continue
        first = named.setdefault(run.card.system, run)
        if run.card.fingerprint != first.card.fingerprint:
            raise DataError(
                f"{first.folder} and {run.folder} are of different models, and both are called "
                f"{run.card.system!r}; give each a name (dlm eval --name), or a report of its own"
            )


def _check_questions(runs: Sequence[Results]) -> None:
    """Refuse runs of one task that answered other questions under the same ids."""
    openings: dict[tuple[str, str, int], tuple[str, Results]] = {}
    for run in runs:
        for (question, turn), answer in run.answers.items():
            if not answer.asked:
                continue
            mark, first = openings.setdefault((run.card.task, question, turn), (answer.asked, run))
            if mark != answer.asked:
                raise DataError(
                    f"{first.folder} and {run.folder} answered different questions under one id "
                    f"({question}); a report is about one file of questions"
                )


def _check_baselines(against: Sequence[str], runs: Sequence[Results]) -> None:
    """Refuse names to compare with that are not among the runs."""
    names = {name for run in runs for name in (run.card.decoder, run.card.system) if name}
    for name in against:
        if name not in names:
            raise unknown_name("decoder or system", name, names)


def _task(task: str, runs: list[Results], against: Sequence[str] = ()) -> list[Part]:
    """The sections of one task."""
    first = Part(f"{task}: quality", _usual(runs), [tables.quality(runs), tables.repetitions(runs)])
    judged = tables.judged(runs)
    if judged:
        first.tables.insert(0, judged)
    drawings = (
        (
            "calls",
            plots.quality_plot(runs),
            "Quality against model calls, a line for each decoder, with 95 % intervals.",
        ),
        (
            "size",
            plots.quality_plot(
                plots.swept(runs, plots.size, SIZES), plots.size, "kernel or block size, tokens", SIZES
            ),
            "Quality against the size of the kernel, or of the blocks.",
        ),
        ("steps", plots.revealed(runs), "At which part of the steps each place of the answer got its token."),
    )
    for name, figure, caption in drawings:
        if figure is not None:
            first.plots.append(_plot(f"{task}-{name}", caption, figure))
    second = Part(f"{task}: speed", tables=[tables.speed(runs)])
    area = tables.under_parallelism(runs)
    if area:
        second.tables.append(area)
    if len(runs) < 2:
        return [first, second]
    measures = ("win", "grade", "score", "right", "nll", "inlier", "relevance", "repetition_4")
    differences = [tables.paired(runs, name, against) for name in measures]
    third = Part(f"{task}: differences", tables=[table for table in differences if table.rows])
    return [first, second, third] if third.tables else [first, second]


def _usual(runs: Sequence[Results]) -> str:
    """The range of perplexities that counts as usual."""
    bands = [tuple(run.whole[name] for name in BAND) for run in runs if BAND[0] in run.whole]
    if not any("inlier" in run.means for run in runs) or not bands:
        return ""
    mean, deviation = bands[0]
    low, high = max(1.0, mean - 2 * deviation), mean + 2 * deviation
    return (
        "Inliers have a usual perplexity, within two deviations of the mean of human answers "
        f"({mean:.1f} ± 2 x {deviation:.1f}: {low:.1f} to {high:.1f})."
    )


def _plot(name: str, caption: str, figure: Any) -> Plot:
    """A figure as SVG text, which is the same for the same figure."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "dlm", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return Plot(name, caption, text[text.index("<svg") :])


def _side_by_side(runs: list[Results], count: int) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the answers to the first questions, of up to eight runs."""
    shown = representatives(runs, 8)
    common = [key for key in shown[0].answers if all(key in run.answers for run in shown)][:count]
    texts_of = _questions(shown[0])
    rows = [
        [texts_of.get(key, f"{key[0]}, turn {key[1] + 1}"), *(run.answers[key].text for run in shown)]
        for key in common
    ]
    return [run.card.name for run in shown], rows


def _questions(run: Results) -> dict[tuple[str, int], str]:
    """First turns, which stand in the order of the answers in the file for AlpacaEval's tools."""
    try:
        outputs = json.loads((run.folder / "model_outputs.json").read_text(encoding="utf-8"))
        keys = [key for key in run.answers if key[1] == 0]
        return {key: row["instruction"] for key, row in zip(keys, outputs, strict=True)}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _markdown(title: str, lead: str, parts: Sequence[Part], side: Sequence[Any]) -> str:
    lines = [f"# {title}", "", lead, ""]
    for part in parts:
        lines += [f"## {part.title}", "", *([part.note, ""] if part.note else [])]
        for plot in part.plots:
            lines += [f"![{plot.caption}]({plot.name}.svg)", "", plot.caption, ""]
        for table in part.tables:
            lines += [f"**{table.title}**", "", table.markdown(), ""]
    for task, names, rows in side:
        lines += [f"## Answers: {task}", ""]
        for row in rows:
            lines += [f"**{shorten(row[0], 400)}**", ""]
            for name, text in zip(names, row[1:], strict=True):
                quoted = "\n".join(f"> {line}" for line in (text or "(empty)").splitlines())
                lines += [f"*{name}*", "", quoted, ""]
    return "\n".join(lines)


def _html(title: str, lead: str, parts: Sequence[Part], side: Sequence[Any]) -> str:
    from jinja2 import Environment

    source = (Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True).from_string(source)
    return template.render(title=title, lead=lead, parts=parts, texts=side)
