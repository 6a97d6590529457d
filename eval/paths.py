"""Likelihood that ways of decoding leave: the paths of several decoders to the same true answers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dlm.atomic import write_whole
from dlm.curves import without_frame
from dlm.data.encode import encode_rows
from dlm.data.rows import load_rows
from dlm.errors import ConfigError, DataError
from eval.path import PathCost
from eval.report.plots import LOOKS
from eval.report.tables import Table
from eval.statistics import Estimate, estimate, paired_test

logger = logging.getLogger(__name__)

LEVEL = 0.1
"""Runs whose model calls differ by less than this part have as many calls."""

TokenRows = list[tuple[list[int], list[int]]]
"""Prompts and answers as ids; answers hold their end token."""


def held_out(
    source: str, last: int, limit: int, tokenizer: PreTrainedTokenizerBase, room: int, tokens: int
) -> TokenRows:
    """The first rows among the last of a file that fit.

    Args:
        source: rows, as `dlm train` reads them.
        last: how many rows at the end of it count: those that training holds out.
        limit: how many rows are wanted; 0 for all.
        tokenizer: the model's.
        room: longest row in tokens, prompt and end token included.
        tokens: longest answer.

    Raises:
        ConfigError: when none fits.
    """
    rows = load_rows(source)
    encoded, _ = encode_rows(rows.select(range(max(len(rows) - last, 0), len(rows))), tokenizer, room)
    complete = (row for row in encoded if row["input_ids"][-1] == tokenizer.eos_token_id)
    pairs = [
        (row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :])
        for row in complete
    ]
    short = [(prompt, answer) for prompt, answer in pairs if len(answer) <= tokens]
    if not short:
        wrong = f"has an answer of at most {tokens} tokens" if pairs else f"fits in {room} tokens"
        raise ConfigError(f"{source}: none of the last {min(last, len(rows))} rows {wrong}")
    if len(short) < len(pairs):
        left_out = f"{len(pairs) - len(short)} of {len(pairs)} answers"
        logger.info("%s: %s have more than %d tokens and are left out", source, left_out, tokens)
    return short[: limit or None]


@dataclass(frozen=True)
class PathRun:
    """One decoder's paths.

    Attributes:
        model: its name or folder.
        line: the decoder and its sizes.
        pace: steps, rate, window.
        fingerprint: of the model, see `dlm.origin.fingerprint`.
        costs: of each answer.
    """

    model: str
    line: str
    pace: str
    fingerprint: str
    costs: list[PathCost]

    @property
    def key(self) -> tuple[str, str, str]:
        """Key that tells runs of one folder apart; of a model that has changed, the new one stays."""
        return self.model, self.line, self.pace

    @property
    def nats(self) -> Estimate:
        """Nats per token of the answers; the interval is over answers."""
        owner = [str(i) for i, cost in enumerate(self.costs) for _ in cost.nats]
        return estimate([nats for cost in self.costs for nats in cost.nats], owner)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer; runs with the same have the same answers."""
        return [len(cost.nats) for cost in self.costs]

    @property
    def calls(self) -> float:
        """Mean number of model calls."""
        return sum(cost.calls for cost in self.costs) / len(self.costs)


def differences(runs: Sequence[PathRun]) -> Table:
    """Each run against those of its model with its pace or as many calls, and against itself on other models.

    Nats of whole answers, by a permutation test on the same answers; divided by the mean length.
    """
    rows = []
    for i, run in enumerate(runs):
        for second in runs[:i]:
            level = run.pace == second.pace or abs(math.log(run.calls / second.calls)) < math.log(1 + LEVEL)
            comparable = (
                level if run.model == second.model else (run.line, run.pace) == (second.line, second.pace)
            )
            if comparable and run.lengths == second.lengths:
                first_totals, second_totals = (
                    [cost.total for cost in run_of_pair.costs] for run_of_pair in (second, run)
                )
                difference, p = paired_test(first_totals, second_totals)
                length = sum(len(cost.nats) for cost in run.costs) / len(run.costs)
                shown = "< 0.001" if p < 0.001 else f"{p:.3f}"
                rows.append([_path_name(run), _path_name(second), f"{difference / length:+.3f}", shown])
    return Table("Differences", ["", "against", "nats per token", "p"], rows)


def _path_name(run: PathRun) -> str:
    return ", ".join(part for part in (run.model, run.line, run.pace) if part)


def path_table(runs: Sequence[PathRun]) -> Table:
    """A line for each run: mean and half of the 95 % interval."""
    rows = []
    for run in runs:
        nats = run.nats
        half = max(nats.high - nats.mean, nats.mean - nats.low)
        around = "" if math.isnan(half) else f" ± {half:.3f}"
        rows.append([_path_name(run), str(len(run.costs)), f"{run.calls:.1f}", f"{nats.mean:.3f}{around}"])
    title = "What the order and the pace cost: the true answers, tokens at temperature 1"
    return Table(title, ["", "answers", "model calls", "nats per token"], rows)


def draw_paths(runs: Sequence[PathRun]) -> Any:
    """Nats per token over model calls as a matplotlib figure: a panel for each model, a line per decoder."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(run.model for run in runs))
    lines = list(dict.fromkeys(run.line for run in runs))
    figure = Figure(figsize=(4.2 * len(models) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        for i, line in enumerate(lines):
            points = sorted(
                (r for r in runs if (r.model, r.line) == (model, line)), key=lambda run: run.calls
            )
            colour, marker, dashes = LOOKS[i % len(LOOKS)]
            estimates = [run.nats for run in points]
            error = [[e.mean - e.low for e in estimates], [e.high - e.mean for e in estimates]]
            panel.errorbar(
                [run.calls for run in points], [e.mean for e in estimates], yerr=error, label=line,
                color=colour, marker=marker, linestyle=dashes,
                markersize=5, linewidth=1.3, capsize=2, elinewidth=0.8,
            )  # fmt: skip
        panel.set_title(model, fontsize=10, loc="left")
        panel.set_xlabel("model calls per answer")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        without_frame(panel)
        panel.get_legend().remove()
    panels[0].set_ylabel("nats per token of the true answer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _section(table: Table) -> str:
    return f"## {table.title}\n\n{table.markdown()}\n"


class PathFolder:
    """Folder of paths: paths.json, renewed after each run, and in the end paths.md and paths.svg.

    Args:
        folder: of the three.
        settings: what all runs have in common; a folder with runs under others is refused.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = Path(folder), settings
        self.file = self.folder / "paths.json"
        self.runs = self._load()

    def _load(self) -> dict[tuple[str, str, str], PathRun]:
        """Earlier runs under the same settings.

        Raises:
            ConfigError: when it holds runs under other settings.
            DataError: when the file is not one of ours.
        """
        if not self.file.is_file():
            return {}
        try:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            settings = dict(stored["settings"])
            runs = [
                PathRun(**{**run, "costs": [PathCost(**c) for c in run["costs"]]}) for run in stored["runs"]
            ]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{self.file}: not what `dlm eval path` writes ({error!r})") from error
        if settings != self.settings:
            name = next(n for n in {**settings, **self.settings} if settings.get(n) != self.settings.get(n))
            raise ConfigError(
                f"{self.file} holds paths whose {name} was {settings.get(name)!r}, not "
                f"{self.settings.get(name)!r}; give another --output, or remove it"
            )
        return {run.key: run for run in runs}

    def forget(self, model: str, mark: str) -> None:
        """Drop the runs of a model whose fingerprints do not begin so: its weights or rows were others."""
        runs = [run for run in self.runs.values() if run.model == model]
        stale = [run for run in runs if not run.fingerprint.startswith(mark)]
        for run in stale:
            del self.runs[run.key]
        if stale:
            logger.warning("%s: %d runs of other weights or rows are dropped", self.file, len(stale))

    def save(self, run: PathRun) -> None:
        """Write the figures of a run, beside those that are there."""
        self.runs[run.key] = run
        figures = {"settings": self.settings, "runs": [asdict(each) for each in self.runs.values()]}
        write_whole(self.file, json.dumps(figures))

    def publish(self) -> list[Path]:
        """Write table, tests and plot of all that is there, model after model; returns all files."""
        models = list(dict.fromkeys(run.model for run in self.runs.values()))
        runs = sorted(self.runs.values(), key=lambda run: (models.index(run.model), run.line))
        words, picture = self.folder / "paths.md", self.folder / "paths.svg"
        write_whole(words, "\n\n".join(_section(each) for each in (path_table(runs), differences(runs))))
        draw_paths(runs).savefig(picture)
        return [self.file, words, picture]
