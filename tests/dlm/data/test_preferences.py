"""Files of good and bad answers: what is read, what is refused, and the batches that come out."""

import json

import pytest
import torch

from dlm.data.preferences import (
    PreferenceCollator,
    are_pairs,
    encode_preferences,
    joined,
    load_preferences,
    parse_preference,
)
from dlm.errors import DataError

USER = {"role": "user", "content": "How many?"}
PAIR = {"prompt": "How many?", "chosen": "Two.", "rejected": "Two two two."}
SINGLE = {"prompt": "How many?", "completion": "Two.", "label": True}


def said(text):
    return [{"role": "assistant", "content": text}]


def written(folder, rows, name="rows.jsonl"):
    file = folder / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


PAIRED = {"prompt": [USER], "answer": "Two.", "rejected": "Two two two.", "good": True}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": [USER], "chosen": said("Two."), "rejected": said("Two two two.")},
        {"prompt": "How many?", "chosen": said("Two."), "rejected": said("Two two two.")},
        {"chosen": [USER, *said("Two.")], "rejected": [USER, *said("Two two two.")]},
        {"prompt": "How many?", "chosen": [USER, *said("Two.")], "rejected": [USER, *said("Two two two.")]},
    ],
)
def test_pairs_in_every_shape_are_the_same_row(row):
    assert parse_preference(row, "x", 0) == PAIRED


def test_turns_that_go_on_where_the_prompt_ends_stand_behind_it():
    more = [*said("One."), {"role": "user", "content": "Sure?"}]
    row = {"prompt": [USER], "chosen": [*more, *said("Two.")], "rejected": [*more, *said("No.")]}
    parsed = parse_preference(row, "x", 0)
    assert parsed["prompt"] == [USER, *more]
    assert (parsed["answer"], parsed["rejected"]) == ("Two.", "No.")


@pytest.mark.parametrize(
    ("label", "good"), [(True, True), (False, False), (1, True), (0, False), ("True", True), ("false", False)]
)
def test_single_answers_have_a_label(label, good):
    expected = {"prompt": [USER], "answer": "Two.", "rejected": None, "good": good}
    assert parse_preference({**SINGLE, "label": label}, "x", 0) == expected
    chat = {"prompt": [USER], "completion": said("Two."), "label": label}
    assert parse_preference(chat, "x", 0) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"needs 'prompt', 'chosen' and 'rejected', or .*has chosen, prompt"),
        ({"instruction": "a", "output": "b"}, "it has instruction, output"),
        ({"chosen": "a", "rejected": "b"}, "'chosen' is an answer alone and needs a 'prompt'"),
        ({**PAIR, "rejected": 3}, "'rejected' must be text, got int 3"),
        ({**PAIR, "rejected": [USER]}, "the last turn of 'rejected' must be the assistant's"),
        ({**PAIR, "chosen": None}, "'chosen' is null"),
        (
            {"chosen": [USER, *said("a")], "rejected": [{**USER, "content": "Why?"}, *said("b")]},
            "answer different conversations",
        ),
        ({**SINGLE, "label": "good"}, "'label' must be true .a good answer. or false, got 'good'"),
        ({**SINGLE, "label": 2}, "'label' must be true"),
        ({**SINGLE, "label": 0.5}, "'label' must be true"),
        ({**SINGLE, "label": None}, "'label' is null"),
        ([1], "expected an object, got list"),
    ],
)
def test_a_bad_row_is_named_with_what_is_wrong(row, message):
    with pytest.raises(DataError, match=rf"rows\.json, row 7: .*{message}|rows\.json, row 7: {message}"):
        parse_preference(row, "rows.json", 7)


def test_files_are_read_and_odd_rows_left_out(tmp_path):
    rows = load_preferences(written(tmp_path, [PAIR, {**PAIR, "chosen": None}, PAIR, PAIR]))
    assert are_pairs(rows)
    assert rows["row"][:] == [0, 2, 3]
    assert {name: rows[1][name] for name in PAIRED} == PAIRED
    csv = tmp_path / "rows.csv"
    csv.write_text("prompt,completion,label\nHow many?,Two.,True\nHow many?,Three.,False\n")
    single = load_preferences(str(csv))
    assert not are_pairs(single)
    assert single["good"][:] == [True, False]


def test_kinds_are_not_mixed(tmp_path):
    file = written(tmp_path, [PAIR, PAIR, SINGLE])
    with pytest.raises(DataError, match=r"row 2: a single answer .*, where the first row is a pair"):
        load_preferences(file)
    with pytest.raises(DataError, match=r"row 1: a pair .*, where the first row is a single answer"):
        load_preferences(written(tmp_path, [SINGLE, PAIR], "other.jsonl"))
    with pytest.raises(DataError, match=r"row 1: needs 'prompt', 'chosen'"):
        load_preferences(written(tmp_path, [PAIR, {"text": "a"}], "third.jsonl"))


def test_both_answers_are_encoded_as_sft_would_encode_them(tmp_path, tokenizer):
    from dlm.data.encode import encode_rows
    from dlm.data.rows import load_rows

    long = {**PAIR, "rejected": "word " * 200}
    source = [PAIR, {**PAIR, "rejected": " "}, long, {**PAIR, "prompt": "x " * 400}]
    encoded, report = encode_preferences(load_preferences(written(tmp_path, source)), tokenizer, 64)
    assert (report.read, report.kept, report.dropped_empty, report.truncated) == (4, 2, 1, 1)
    assert report.dropped_long_prompt == 1
    rows = [{"prompt": r["prompt"], "completion": r[k]} for r in (PAIR, long) for k in ("chosen", "rejected")]
    plain, _ = encode_rows(load_rows(written(tmp_path, rows, "plain.jsonl")), tokenizer, 64)
    for i, row in enumerate(encoded):
        assert row["input_ids"] == plain[2 * i]["input_ids"]
        assert row["rejected_ids"] == plain[2 * i + 1]["input_ids"]
        assert row["prompt_length"] == plain[2 * i]["prompt_length"]
        assert row["length"] == max(len(row["input_ids"]), len(row["rejected_ids"]))
    assert "good" not in encoded.column_names
    single = load_preferences(written(tmp_path, [SINGLE, {**SINGLE, "label": False}], "single.jsonl"))
    encoded, _ = encode_preferences(single, tokenizer, 64)
    assert encoded["good"][:] == [True, False]
    assert "rejected_ids" not in encoded.column_names


def test_batches_hold_both_answers_in_windows_of_one_width():
    rows = [
        {"input_ids": [5, 6, 7, 8, 2], "rejected_ids": [5, 6, 9, 2], "prompt_length": 2, "row": 0},
        {"input_ids": [5, 6, 2], "rejected_ids": [5, 6, *range(10, 22), 2], "prompt_length": 2, "row": 1},
    ]
    for grouped in (False, True):
        batch = PreferenceCollator(eos_token_id=2, window=24, grouped=grouped)(rows)
        pair = joined(batch)
        width = 16 if grouped else 24
        assert pair["input_ids"].shape == (4, width)
        for i, name in enumerate(("input_ids", "rejected_ids")):
            for j, row in enumerate(rows):
                ids, k = row[name], 2 * i + j
                assert pair["input_ids"][k, : len(ids)].tolist() == ids
                assert (pair["input_ids"][k, len(ids) :] == 2).all()
                assert pair["loss_mask"][k].nonzero()[:, 0].tolist() == list(range(2, len(ids)))
        assert pair["row"].tolist() == [0, 1, 0, 1]
        assert batch["good"].all()
        assert batch["bad"].all()
        if grouped:
            assert not pair["attention_mask"][1, 3:].any()
    single = PreferenceCollator(eos_token_id=2, window=24, paired=False)
    labelled = single([{**rows[0], "good": True}, {**rows[1], "good": False}])
    assert labelled["good"].tolist() == [True, False]
    assert torch.equal(labelled["bad"], ~labelled["good"])
    assert not any(name.startswith("rejected") for name in labelled)


def test_bad_answers_are_not_read_as_good_ones(tmp_path):
    from dlm.data.rows import load_rows

    advice = "good and bad answers are for dlm r2ft --rejected data"
    bad = {**SINGLE, "label": False}
    chat = {"prompt": [USER], "completion": said("Two."), "label": False}
    for i, rows in enumerate(([PAIR], [SINGLE, bad], [chat], [{**SINGLE, "label": "False"}])):
        with pytest.raises(DataError, match=advice):
            load_rows(written(tmp_path, rows, f"{i}.jsonl"))
    assert len(load_rows(written(tmp_path, [SINGLE], "good.jsonl"))) == 1
