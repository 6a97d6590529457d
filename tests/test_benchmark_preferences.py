"""The comparison of objectives on labelled answers of the demo's model: its files and its table."""

import json

import pytest

from benchmarks import preferences, rule_preferences
from benchmarks.rule_preferences import COMPARED, Variant, against_r2ft, held_out, table, write_files
from dlm.data.preferences import load_preferences
from dlm.data.rows import load_rows
from dlm.data.rules import is_right, make_examples, split_of
from finetune.sft import train
from tests.finetune.test_train import settings


def test_files_have_the_labels_of_the_program_and_pairs_a_true_and_a_wrong_answer(tmp_path):
    examples = make_examples(12, seed=3)
    texts = [e.answer if i % 3 else f"no {i}" for i, e in enumerate(examples)]
    texts[11] = " "  # an empty answer is left out
    counts = write_files(tmp_path, examples, texts)
    assert counts == {"answers": 11, "wrong": 4, "theta": round(7 / 11, 3)}
    by_instruction = {(e.instruction, e.answer): e for e in examples}
    pairs = load_preferences(str(tmp_path / "pairs.jsonl"))
    assert len(pairs) == 4
    for row in pairs:
        example = by_instruction[row["prompt"][0]["content"], row["answer"]]
        assert row["rejected"].startswith("no ")
        assert not is_right(example, row["rejected"])
    single = load_preferences(str(tmp_path / "single.jsonl"))
    assert single["good"] == [not answer.startswith("no ") for answer in single["answer"]]
    assert len(single) == 11
    assert load_rows(str(tmp_path / "answers.jsonl"))["answer"] == pairs["answer"]  # R2FT sees no others


def test_what_is_answered_is_in_no_training_split_and_nothing_twice():
    instructions = [each.instruction for each in held_out(200)]
    assert len(set(instructions)) == len(instructions) == 200
    assert {split_of(each) for each in instructions} == {"test", "validation"}


def result(name, right, good, bad):
    answers = {f"{decoder} {seed}": right for decoder in COMPARED for seed in (0, 1)}
    return {"name": name, "right": answers, "good": good, "bad": bad, "tokens": [2] * len(good)}


def test_differences_are_paired_and_gains_are_those_of_the_start_less_those_of_the_model():
    start = result("start", [True, False, False, False, False, False], [4.0] * 6, [9.0] * 5)
    other = result("R2FT", [True, True, True, False, False, False], [3.0] * 6, [11.0] * 5)
    heads, _, first, row = table({"start": start, "R2FT": other}).splitlines()
    names, before, cells = ([cell.strip() for cell in x.split("|")[1:-1]] for x in (heads, first, row))
    assert len(names) == len(before) == len(cells)
    assert cells[2].startswith("+0.333")
    assert cells[3] == "0.500"
    assert cells[-3:] == ["1.5000", "+1.00 ± 0.00", "-2.00 ± 0.00"]
    assert before[-3:] == ["2.0000", "0", "0"]


def test_objectives_are_compared_with_r2ft_at_the_same_learning_rate():
    right = {"start": 0, "R2FT, 0.1": 1, "R2FT, 0.2": 4, "DPO, pairs, 0.1": 3, "DPO, pairs, 0.2": 3}
    results = {name: result(name, [i < n for i in range(6)], [], []) for name, n in right.items()}
    _, _, *rows = against_r2ft(results).splitlines()
    cells = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in rows}
    assert list(cells) == ["DPO, pairs, 0.1", "DPO, pairs, 0.2"]
    assert [value[:6] for value in cells.values()] == ["+0.333", "-0.167"]


def test_a_miniature_run_trains_and_measures_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    start = train(settings(tmp_path / "sft", max_steps=4))
    two = [Variant("start"), Variant("DPO, pairs", "pairs", (("name", "dpo"),), 1e-2)]
    monkeypatch.setattr(rule_preferences, "variants", lambda rates, theta: two)
    monkeypatch.setattr(rule_preferences, "is_right", lambda example, text: len(text) % 2 == 0)
    words = [
        *("--rules", str(start), "--output", str(tmp_path), "--sampled", "24", "--limit", "8", "--seeds"),
        *("1", "--steps", "2", "--batch", "2", "--held-out", "4"),
    ]
    for _ in range(2):
        preferences.main(words)
        lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text("utf-8").splitlines()]
        assert [line["name"] for line in lines] == ["start", "DPO, pairs"]
    first, other = lines
    assert first["texts"] == other["texts"]  # the wrong answers are those of the start
    assert other["good"] != first["good"]
    assert "| DPO, pairs |" in capsys.readouterr().out


def test_a_model_that_is_always_wrong_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rule_preferences, "material", lambda _: {"answers": 9, "wrong": 9, "theta": 0.0})
    with pytest.raises(SystemExit, match="9 of 9 answers are wrong"):
        preferences.main(["--rules", "no-such-model", "--output", str(tmp_path)])


def test_either_kind_of_material_must_be_given():
    with pytest.raises(SystemExit):
        preferences.main([])
