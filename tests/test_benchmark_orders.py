"""The page of the benchmark of orders, on answers made by hand."""

import json
import sys

import pytest

from benchmarks import orders

REWARDS = {
    "confidence": [1, 0, 0, 0, 0, 0],
    "gate only": [1, 1, 0, 0, 0, 0],
    "DPRM": [1, 1, 1, 0, 0, 0],
    "drawn by confidence": [1, 1, 1, 1, 1, 1],
}
"""By question, alike for both seeds; of every other way 0, but 1 for the first."""


def answers():
    return [
        {"way": way, "seed": seed, "id": f"{i}", "tokens": 4, "calls": 3 + seed, "repetition": 0.0,
         "text": "a", "reward": float(REWARDS.get(way, [1, 0, 0, 0, 0, 0])[i])}
        for way in orders.WAYS for seed in (0, 1) for i in range(6)
    ]  # fmt: skip


def cells(lines):
    """Rows of the table by order, each by column; of the two columns p, the second is that of the control."""
    table = [line.strip().strip("|").split("|") for line in "".join(lines).splitlines() if line[:1] == "|"]
    heads, _, *rows = [[cell.strip() for cell in row] for row in table]
    heads[-1] = "p of the control"
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def test_every_order_with_a_table_is_compared_with_the_same_order_without_it():
    table = cells(orders.compared(answers()))
    assert list(table) == list(orders.WAYS)
    first, control = "difference from confidence", "difference from its control"
    assert table["DPRM"][first].startswith("+0.333")
    assert table["DPRM"]["p"] == "0.500"  # two questions of one sign: 2 of 4 assignments of signs
    assert table["DPRM"][control].startswith("+0.167")
    assert table["DPRM"]["p of the control"] == "1.000"
    soft = table["DPRM, soft best-of-16"]
    assert soft[first].startswith("+0.000")
    assert soft[control].startswith("-0.833")
    assert soft["p of the control"] == f"{2 / 2**5:.3f}"
    assert {way for way, row in table.items() if row[control]} == set(orders.CONTROLS)
    assert table["confidence"][first] == ""
    assert {row["calls"] for row in table.values()} == {"3.500 ± 0.000"}


def test_controls_differ_from_their_orders_by_the_table_alone():
    for way, control in orders.CONTROLS.items():
        assert orders.WAYS[control]["control"] == "gate"
        assert "control" not in orders.WAYS[way]
    assert set(orders.CONTROLS) == {
        way for way, options in orders.WAYS.items() if way != "confidence" and "control" not in options
    }


def test_the_page_says_of_how_many_comparisons_a_p_is_one():
    text = "".join(orders.compared(answers()))
    count = sum(bool(row["p"]) + bool(row["p of the control"]) for row in cells([text]).values())
    assert f"one of {count} comparisons" in text
    assert f"p below {0.05 / count:.4f}" in text


@pytest.mark.parametrize("lacking", [(), ("entropy",)])
def test_the_page_is_made_of_stored_answers_without_a_model(tmp_path, monkeypatch, lacking):
    """Neither the model nor the file of instructions of this command exists."""
    rows = [row for row in answers() if row["way"] not in lacking]
    (tmp_path / "rules-answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--demo", "no-such-model", "--output", str(tmp_path), "--report"]
    monkeypatch.setattr(sys, "argv", ["orders", *words])
    orders.main()
    page = (tmp_path / "orders.md").read_text("utf-8")
    assert ("| DPRM |" in page) == (not lacking)
    assert ("No question has been answered in every order" in page) == bool(lacking)
