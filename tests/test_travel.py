"""What the results say of the way of one prompt is what `benchmarks.travel` counts."""

from pathlib import Path

from benchmarks.travel import GOALS, figures, follow

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "decoding.md"


def test_the_table_of_the_results_is_what_is_counted():
    counted = figures(follow("conv", window=40, steps=6))
    lines = RESULTS.read_text("utf-8").splitlines()
    for name, goal in GOALS.items():
        (line,) = (line for line in lines if line.startswith(f"| {name} |"))
        *_, now, aim = (cell.strip() for cell in line.strip("|").split("|"))
        assert (float(now), aim) == (counted[name], f"≤ {goal}"), line
