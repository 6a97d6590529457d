"""Systems side by side: closeness to the references against model calls, and the share that is repeated.

    dlm eval alpaca_eval --model default --output runs/systems …     # likewise the others
    F=runs/systems/alpaca_eval
    python -m benchmarks.systems default=$F/default_… full=$F/full_… --earlier base=0.723,0.026,63.7,8.8

Means over answers with 95 % intervals. `--earlier` takes figures of a run that is no longer there: relevance,
half of its interval, calls, and repeated 4-grams in percent.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.curves import without_frame
from eval.report.plots import LOOKS
from eval.report.report import find_runs
from eval.statistics import Estimate


@dataclass(frozen=True)
class Point:
    """Figures of a system."""

    name: str
    relevance: float
    around: float
    """Half of the interval of the relevance."""
    calls: float
    repeated: float
    """Share of the 4-grams, in percent."""
    others: tuple[str, ...] = ()
    """Further cells: ended, tokens, nats per token."""

    @classmethod
    def of(cls, given: str) -> Point:
        """Of a run, as NAME=FOLDER."""
        name, _, folder = given.partition("=")
        means = find_runs([folder])[0].means
        relevance = means["relevance"]
        others = f"{100 * means['ended'].mean:.1f} %", f"{means['tokens'].mean:.0f}", _shown(means["nll"])
        calls, repeated = means["model_calls"].mean, 100 * means["repetition_4"].mean
        return cls(name, relevance.mean, (relevance.high - relevance.low) / 2, calls, repeated, others)

    @classmethod
    def earlier(cls, given: str) -> Point:
        """Of figures, as NAME=relevance,half,calls,repeated."""
        name, _, figures = given.partition("=")
        relevance, around, calls, repeated = map(float, figures.split(","))
        return cls(name, relevance, around, calls, repeated)

    @property
    def row(self) -> str:
        """Line of the table."""
        figures = f"{self.relevance:.3f} ± {self.around:.3f}", f"{self.repeated:.1f} %", f"{self.calls:.0f}"
        return f"| {' | '.join((self.name, *figures, *(self.others or ('', '', ''))))} |"


def _shown(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ± {(estimate.high - estimate.low) / 2:.2f}"


def draw(points: Sequence[Point]) -> Any:
    """Relevance over calls, an interval for each; a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    for i, point in enumerate(points):
        colour, marker, _ = LOOKS[i % len(LOOKS)]
        label = f"{point.name} ({point.repeated:.1f} % repeated)"
        axes.errorbar(
            point.calls, point.relevance, point.around, color=colour, marker=marker, markersize=7,
            capsize=3, linestyle="none", label=label,
        )  # fmt: skip
    axes.set(xlabel="model calls of an answer", ylabel="closeness to the reference")
    axes.set_xlim(left=0)
    without_frame(axes)
    if legend := axes.get_legend():
        legend.remove()  # it would lie on the intervals
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    """Print the table, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("runs", nargs="+", help="NAME=FOLDER of a run")
    parser.add_argument("--earlier", action="append", default=[], help="NAME=relevance,half,calls,repeated")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    points = [*map(Point.of, options.runs), *map(Point.earlier, options.earlier)]
    print("| | relevance | repeated 4-grams | calls | ended | tokens | nats per token |\n" + "|---" * 7 + "|")
    print(*(point.row for point in points), sep="\n")
    if options.plot:
        draw(points).savefig(options.plot)


if __name__ == "__main__":
    main()
