"""Frontiers of several decoders: curves from the answers of their runs, compared, as tables and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlm.atomic import write_whole
from dlm.errors import ConfigError, DataError
from dlm.tokenizer import encode_text
from eval.commands.frontier import FrontierConfig, heat
from eval.divergence import Distance, distance
from eval.formats import without_nan, write_json
from eval.frontier import (
    Comparison,
    Curve,
    FrontierSample,
    at_levels,
    left_out,
    levels,
    resamples,
    unigram_entropy,
)
from eval.report.tables import Table
from eval.run import Results
from eval.statistics import Estimate
from eval.tasks import load_questions

FIGURES = ("tokens", "tokens_per_call", "repetition_4", "empty")
"""Measures of answers that are shown beside, see `eval.metrics.MEASURES`."""


def shared_reader(models: Sequence[str], reader: str) -> str:
    """The model that reads all answers.

    Raises:
        ConfigError: where "base" is not one and the same model for all.
    """
    from dlm.origin import autoregressive_origin

    if reader != "base":
        return reader
    bases = {model: autoregressive_origin(model) for model in models}
    nameless = [model for model, base in bases.items() if not base]
    if nameless:
        raise ConfigError(
            f"no reader: the records of {nameless[0]} name no autoregressive model that is still there; "
            "--reader names one"
        )
    if len(set(bases.values())) > 1:
        raise ConfigError(
            f"the models began with different ones ({', '.join(bases.values())}); --reader names one"
        )
    return bases[models[0]]


def encoder_of(config: FrontierConfig) -> Any:
    """The sentence encoder for distances from the references; None where there are to be none.

    Raises:
        ConfigError: where a question lacks its reference, and for fewer than ten questions.
    """
    if not config.encoder:
        return None
    from dlm.checkpoint import place
    from eval.relevance import Encoder

    questions = load_questions(config.task, config.data, config.limit)
    if len(questions) < 10 or any(len(q.reference) < len(q.turns) for q in questions):
        raise ConfigError("encoder: a distance needs a reference to every question, and ten of them")
    return Encoder(config.encoder, place(config.device, config.dtype)[0])


@dataclass(frozen=True)
class Line:
    """A decoder of a model at a pace.

    Attributes:
        name: of model, decoder and pace.
        pace: as runs are called; empty for a decoder with a pace of its own.
        samples: in the order of temperatures.
        curve: of them.
        distances: from the references, for each sample; empty where they are not measured.
    """

    name: str
    pace: str
    samples: list[FrontierSample]
    curve: Curve
    distances: list[Distance]

    def at(self, level: float) -> dict[str, float]:
        """Figures at an entropy: those of `FIGURES`, and the distance where it is measured."""
        figures = {
            name: self.curve.along(level, [sample.figure(name) for sample in self.samples])
            for name in FIGURES
        }
        if self.distances:
            figures["distance"] = self.curve.along(level, [each.value for each in self.distances])
        return figures


@dataclass(frozen=True)
class Frontiers:
    """All curves, and what they were made of.

    Attributes:
        config: of the command.
        lines: the first is the one that others are compared with.
        questions: how many there are.
        references: entropy of the reference answers; NaN without any.
    """

    config: FrontierConfig
    lines: list[Line]
    questions: int
    references: float

    @classmethod
    def of(
        cls, config: FrontierConfig, reader: str, encoder: Any, results: Sequence[Sequence[Results]]
    ) -> Frontiers:
        """From the runs of each model and seed, as `eval.commands.frontier.answered` gives them."""
        texts = FrontierTexts(config, reader, encoder, results)
        count = len(texts.questions)
        if encoder is not None and count < 10:
            raise ConfigError(f"encoder: a distance needs ten questions, and {count} fit in the window")
        weights = left_out(count) if config.entropy == "corpus" else resamples(count, config.resamples)
        lines = []
        for model in config.models:
            for variant in config.variants():
                labels = [heat(variant, value).label for value in config.heats]
                runs = [texts.runs[model, label] for label in labels]
                samples = [texts.sample(value, each) for value, each in zip(config.heats, runs, strict=True)]
                line, pace = variant.split("default")
                name = ", ".join(part for part in (Path(model).name, line, pace) if part)
                curve = Curve.of(samples, weights)
                free = "rate" not in variant.pace and "steps" not in variant.pace
                distances = [texts.distance(each) for each in runs] if texts.encoder else []
                lines.append(Line(name, "" if free else pace, samples, curve, distances))
        return cls(config, lines, len(texts.questions), texts.entropy_of_references())

    def groups(self) -> Iterator[tuple[str, list[Line]]]:
        """Pace, and the decoders that had it or their own."""
        paces = list(dict.fromkeys(line.pace for line in self.lines if line.pace)) or [""]
        for pace in paces:
            yield pace, [line for line in self.lines if line.pace in (pace, "")]

    def compared(self) -> dict[str, dict[str, list[Comparison]]]:
        """Comparisons by pace and by name."""
        out = {}
        for pace, lines in self.groups():
            curves = {line.name: line.curve for line in lines}
            entropies = self.config.levels or levels(list(curves.values()))
            jackknifed = self.config.entropy == "corpus"
            out[pace] = at_levels(curves, entropies, self.questions, jackknifed=jackknifed)
        return out

    def tables(self) -> list[Table]:
        """Tables of all points, and of the decoders at equal entropy."""
        by_name = {line.name: line for line in self.lines}
        return [
            self._points(),
            *(_equal_entropy(pace, by_name, comparisons) for pace, comparisons in self.compared().items()),
        ]

    def _points(self) -> Table:
        far = any(line.distances for line in self.lines)
        head = ["", "temperature", "entropy", "nats/token", "tokens", "tokens per call", "repeated 4-grams"]
        head += ["empty", *(["distance", "by chance"] if far else [])]
        rows = []
        for line in self.lines:
            for i, sample in enumerate(line.samples):
                tokens, per_call, repeated, empty = (sample.figure(name) for name in FIGURES)
                cells = [f"{line.curve.entropy[0, i]:.3f}", f"{line.curve.nats[0, i]:.3f}", f"{tokens:.1f}"]
                cells += [f"{per_call:.2f}", f"{100 * repeated:.1f} %", f"{100 * empty:.1f} %"]
                if line.distances:
                    cells += [f"{line.distances[i].value:.3f}", f"{line.distances[i].chance:.3f}"]
                rows.append([line.name, f"{sample.temperature:g}", *cells])
        seeds = f", {len(self.config.noise)} seeds" if len(self.config.noise) > 1 else ""
        ending = "" if math.isnan(self.references) else f"; entropy of the references {self.references:.3f}"
        title = f"Frontier: {self.questions} questions{seeds}, entropy by {self.config.entropy}{ending}"
        return Table(title, head, rows)

    def write(self, folder: Path) -> list[Path]:
        """Write figures, tables and plot; returns their paths."""
        figures, words, picture = (folder / f"frontier.{end}" for end in ("json", "md", "svg"))
        write_json(figures, without_nan(self.figures()))
        parts = [f"## {table.title}\n\n{table.markdown()}\n" for table in self.tables()]
        write_whole(words, "\n".join(parts))
        plot_frontiers(self).savefig(picture)
        return [figures, words, picture]

    def figures(self) -> dict[str, Any]:
        """Everything measured, as JSON has it."""
        points = {
            line.name: [
                {
                    "temperature": sample.temperature,
                    "entropy": float(line.curve.entropy[0, i]),
                    "nats": float(line.curve.nats[0, i]),
                    **{name: sample.figure(name) for name in FIGURES},
                    **({"distance": asdict(line.distances[i])} if line.distances else {}),
                }
                for i, sample in enumerate(line.samples)
            ]
            for line in self.lines
        }
        by_name = {line.name: line for line in self.lines}
        equal = {
            pace: {
                name: [{**asdict(each), **by_name[name].at(each.entropy)} for each in row]
                for name, row in comparisons.items()
            }
            for pace, comparisons in self.compared().items()
        }
        shown = {"questions": self.questions, "entropy": self.config.entropy, "references": self.references}
        return {**shown, "points": points, "equal": equal}


class FrontierTexts:
    """Answers of all runs as tokens of the reader, and what is measured of them.

    Args:
        config: of the command.
        reader: whose tokens are counted.
        encoder: see `encoder_of`.
        results: the runs of each model and seed.
    """

    def __init__(
        self, config: FrontierConfig, reader: str, encoder: Any, results: Sequence[Sequence[Results]]
    ) -> None:
        from dlm.backbone import load_causal_lm

        self.config, self.tokenizer = config, load_causal_lm(reader)[1]
        self.runs: dict[tuple[str, str], list[Results]] = {}
        for run in (run for result in results for run in result):
            self.runs.setdefault((run.card.model, run.card.label), []).append(run)
        shared = set.intersection(*(set(run.answers) for result in self.runs.values() for run in result))
        self.keys = sorted(shared)
        self.questions = sorted({key[0] for key in self.keys})
        if not self.keys:
            raise DataError("the runs have no question in common")
        self._numbers = {question: i for i, question in enumerate(self.questions)}
        self._columns: dict[int, int] = {}
        references = {q.id: q.reference for q in load_questions(config.task, config.data, config.limit)}
        self.references = {
            key: references[key[0]][key[1]] for key in self.keys if key[1] < len(references.get(key[0], ()))
        }
        self.encoder = encoder
        self._true = encoder and encoder.encode([self.references[key] for key in self.keys]).numpy()

    def sample(self, temperature: float, runs: Sequence[Results]) -> FrontierSample:
        """The answers of all seeds at one temperature."""
        pairs = [(run, key) for run in runs for key in self.keys]
        ids = [encode_text(self.tokenizer, run.answers[key].text) for run, key in pairs]
        rows = [run.measured[f"{key[0]}/{key[1]}"] for run, key in pairs]
        span = self.config.span if self.config.entropy == "span" else 0
        return FrontierSample(
            temperature,
            np.array([self._numbers[key[0]] for _, key in pairs]),
            np.array([row["nll"] for row in rows]),
            np.array([unigram_entropy(answer_ids, span) for answer_ids in ids]),
            self._counted(ids) if self.config.entropy == "corpus" else None,
            {name: np.array([row.get(name, math.nan) for row in rows]) for name in FIGURES},
        )

    def _counted(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """[N, V'] counts of the tokens of each text, V' the tokens of these texts."""
        names, where = np.unique(
            np.concatenate([np.array(answer_ids, dtype=int) for answer_ids in ids]), return_inverse=True
        )
        owner = np.repeat(np.arange(len(ids)), [len(answer_ids) for answer_ids in ids])
        counts = np.zeros((len(ids), len(names)))
        np.add.at(counts, (owner, where), 1.0)
        return counts

    def distance(self, runs: Sequence[Results]) -> Distance:
        """Distance of the answers of all seeds from the references."""
        states = [self.encoder.encode([run.answers[key].text for key in self.keys]).numpy() for run in runs]
        return distance(self._true, np.stack(states, axis=1))

    def entropy_of_references(self) -> float:
        """The reference answers' entropy, by the same definition; NaN without them."""
        ids = [encode_text(self.tokenizer, text) for text in self.references.values() if text.strip()]
        if not ids:
            return math.nan
        if self.config.entropy == "corpus":
            from eval.frontier import entropy

            return float(entropy(self._counted(ids).sum(0)))
        span = self.config.span if self.config.entropy == "span" else 0
        return float(np.mean([unigram_entropy(answer_ids, span) for answer_ids in ids]))


def _equal_entropy(
    pace: str, lines: Mapping[str, Line], comparisons: Mapping[str, list[Comparison]]
) -> Table:
    """The decoders of a pace at equal entropy."""
    far = any(line.distances for line in lines.values())
    head = ["", "entropy", "nats/token", "difference", "tokens", "tokens per call"]
    head += ["distance"] if far else []
    rows = []
    for name, row in comparisons.items():
        for point in row:
            if math.isnan(point.nats.mean):
                low, high = lines[name].curve.range
                outside = "no answers" if math.isnan(low) else f"outside {low:.2f} to {high:.2f}"
                rows.append([name, f"{point.entropy:.2f}", outside, *["–"] * (len(head) - 3)])
                continue
            beside = lines[name].at(point.entropy)
            cells = [_shown(point.nats), "–" if point.difference is None else _shown(point.difference, "+")]
            cells += [f"{beside['tokens']:.1f}", f"{beside['tokens_per_call']:.2f}"]
            cells += [f"{beside['distance']:.3f}"] if far else []
            rows.append([name, f"{point.entropy:.2f}", *cells])
    title = (
        "At equal entropy" + (f", {pace}" if pace else "") + f": differences from {next(iter(comparisons))}"
    )
    return Table(title, head, rows)


def _shown(value: Estimate, sign: str = "") -> str:
    """A value with the ends of its interval."""
    if math.isnan(value.mean):
        return "–"
    ends = "" if math.isnan(value.low) else f" ({value.low:{sign}.2f} to {value.high:{sign}.2f})"
    return f"{value.mean:{sign}.2f}{ends}"


def plot_frontiers(frontiers: Frontiers) -> Any:
    """Nats per token over entropy as a matplotlib figure: a panel for each pace, a line for each decoder."""
    from matplotlib.figure import Figure

    from dlm.curves import without_frame
    from eval.report.plots import LOOKS

    groups = list(frontiers.groups())
    figure = Figure(figsize=(5.2 * len(groups) + 1, 4.4), layout="constrained")
    for panel, (pace, lines) in zip(
        figure.subplots(1, len(groups), squeeze=False).ravel(), groups, strict=True
    ):
        for i, line in enumerate(lines):
            colour, marker, stroke = LOOKS[i % len(LOOKS)]
            x, y = line.curve.entropy[0], line.curve.nats[0]
            face = colour if i < len(LOOKS) else "white"
            panel.plot(
                x, y, marker + stroke, color=colour, markersize=4, label=line.name, markerfacecolor=face
            )
            for end in (0, -1):
                panel.annotate(
                    f"{line.samples[end].temperature:g}", (x[end], y[end]), fontsize=6, color=colour
                )
        if not math.isnan(frontiers.references):
            panel.axvline(
                frontiers.references, color="grey", linewidth=0.8, linestyle=":", label="references"
            )
        panel.set(xlabel=f"entropy, nats ({frontiers.config.entropy})", ylabel="nats per token", title=pace)
        without_frame(panel)
        panel.legend(frameon=False, fontsize=6)
    return figure
