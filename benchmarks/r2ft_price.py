"""The price of R2FT where it had nothing to reject: answers of two systems to the same questions, paired.

    dlm eval alpaca_eval --model full-sft --output runs/price …   # before; after: --model full
    python -m benchmarks.r2ft_price runs/price/alpaca_eval/full-sft_… runs/price/alpaca_eval/full_…

Answers that repeat no 4-gram and end by themselves have nothing to reject. Questions are told apart by their
answers before; that choice alone makes the answers after look worse, for chance has its part in it. The
line "nor after" takes both, and is fair to both. "Both ended": one that was cut off has no length of its own.
Differences are after - before, with 95 % intervals and permutation tests.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping

from eval.metrics import by_question
from eval.report.report import find_runs
from eval.run import Results
from eval.statistics import estimate, paired_test

MEASURES = {"relevance": 3, "nll": 2, "words": 1, "repetition_4": 3}
"""Measures of an answer, and their decimal places."""

Figures = Mapping[str, Mapping[str, float]]
"""By measure the figures of each question."""


def figures_of(run: Results) -> dict[str, dict[str, float]]:
    """The figures of a run, by measure and question."""
    return {name: by_question(run.measured, name) for name in (*MEASURES, "ended")}


def nothing_to_reject(before: Figures, question: str) -> bool:
    """True for an answer that repeats no 4-gram and ended by itself."""
    return before["repetition_4"][question] == 0 and before["ended"][question] == 1


def line(before: Figures, after: Figures, questions: list[str], name: str) -> str:
    """A line of the table: each measure before and after, and their difference."""
    cells = [name, str(len(questions))]
    for measure, digits in MEASURES.items():
        pairs = [(before[measure][q], after[measure][q]) for q in questions]
        pairs = [pair for pair in pairs if not math.isnan(sum(pair))]
        if len(pairs) < 2:
            cells.append("–")
            continue
        first, second = zip(*pairs, strict=True)
        spread = estimate([b - a for a, b in pairs])
        p = paired_test(first, second)[1]
        means = " → ".join(f"{sum(x) / len(x):.{digits}f}" for x in (first, second))
        around = f"{spread.low:+.{digits}f} to {spread.high:+.{digits}f}"
        cells.append(f"{means}: {spread.mean:+.{digits}f} ({around}), p = {p:.3f}")
    return f"| {' | '.join(cells)} |"


def table(before: Results, after: Results) -> str:
    """The table of two runs, over the questions that both have."""
    first, second = figures_of(before), figures_of(after)
    shared = [q for q in first["ended"] if q in second["ended"]]
    groups: dict[str, Callable[[str], bool]] = {
        "all": lambda question: True,
        "nothing to reject": lambda question: nothing_to_reject(first, question),
        "nothing to reject, nor after": lambda question: (
            nothing_to_reject(first, question) and nothing_to_reject(second, question)
        ),
        "something to reject": lambda question: not nothing_to_reject(first, question),
        "both ended": lambda question: first["ended"][question] == second["ended"][question] == 1,
    }
    lines = [f"| questions | n | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 2) + "|"]
    for name, belongs in groups.items():
        lines.append(line(first, second, [q for q in shared if belongs(q)], name))
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("before", help="folder of a run")
    parser.add_argument("after", help="folder of a run")
    options = parser.parse_args()
    (before,), (after,) = find_runs([options.before]), find_runs([options.after])
    print(table(before, after))


if __name__ == "__main__":
    main()
