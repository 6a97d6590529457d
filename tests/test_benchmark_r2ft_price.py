"""The price of R2FT: questions are told apart as they should be, and differences are those of pairs."""

import math
from types import SimpleNamespace

import pytest

from benchmarks.r2ft_price import MEASURES, line, nothing_to_reject, table


def run(rows):
    """A run of answers given as (relevance, nll, words, repetition, ended)."""
    names = (*MEASURES, "ended")
    return SimpleNamespace(
        measured={f"{i}/0": dict(zip(names, row, strict=True)) for i, row in enumerate(rows)}
    )


BEFORE = run(
    [(0.5, 2, 10, 0, 1), (0.6, 2, 20, 0, 0), (0.7, 1, 30, 0.2, 1), (0.4, 1, 10, 0, 1), (0.1, 3, 5, 0, 1)]
)
AFTER = run(
    [(0.7, 3, 12, 0, 1), (0.6, 2, 10, 0, 1), (0.5, 1, 10, 0, 1), (0.5, 2, 14, 0.5, 1), (0.1, 3, 5, 0, 1)]
)


def test_questions_are_told_apart_by_repetition_and_end():
    lines = table(BEFORE, AFTER).splitlines()
    counts = dict(row.strip("| ").split(" | ")[:2] for row in lines[2:])
    assert counts == {
        "all": "5", "nothing to reject": "3", "nothing to reject, nor after": "2",
        "something to reject": "2", "both ended": "4",
    }  # fmt: skip
    figures = {"repetition_4": {"q": 0.0}, "ended": {"q": 1.0}}
    assert nothing_to_reject(figures, "q")
    assert not nothing_to_reject({**figures, "ended": {"q": 0.0}}, "q")


def test_a_difference_is_that_of_pairs_and_questions_without_a_figure_are_left_out():
    before = {name: {"a": 1.0, "b": 2.0, "c": math.nan} for name in MEASURES}
    after = {name: {"a": 2.0, "b": 4.0, "c": 9.0} for name in MEASURES}
    cells = line(before, after, ["a", "b", "c"], "x").strip("| ").split(" | ")
    assert cells[:2] == ["x", "3"]
    assert cells[2].startswith("1.500 → 3.000: +1.500 (")
    assert cells[2].endswith("p = 0.500")  # of four ways to give signs to 1 and 2, two are as far from 0
    assert line(before, after, ["c"], "x").count("–") == len(MEASURES)


@pytest.mark.parametrize("missing", [0, 4])
def test_only_questions_of_both_count(missing):
    fewer = SimpleNamespace(measured={k: v for k, v in AFTER.measured.items() if k != f"{missing}/0"})
    assert "| all | 4 |" in table(BEFORE, fewer)
