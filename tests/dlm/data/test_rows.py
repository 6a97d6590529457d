import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from dlm.data.rows import asked_and_answer, load_rows, parse_row
from dlm.errors import ConfigError, DataError
from dlm.tokenizer import encode_prompt, encode_text

ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hello."},
]
EXPECTED = [
    {"prompt": [{"role": "user", "content": "Add.\n\n1 2"}], "answer": "3"},
    {"prompt": [{"role": "user", "content": "Greet."}], "answer": "Hello."},
]


def listed(rows):
    """The rows, which are numbered in order, without their numbers."""
    assert list(rows["row"]) == list(range(len(rows)))
    return rows.remove_columns("row").to_list()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    text = "\n".join(map(json.dumps, ALPACA)) if "jsonl" in name else json.dumps(ALPACA)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert listed(load_rows(str(path))) == EXPECTED


def test_chat_and_text_rows():
    chat = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                         {"role": "assistant", "content": "a"}]}  # fmt: skip
    assert parse_row(chat, "f", 0) == {"prompt": chat["messages"][:2], "answer": "a"}
    shared = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}
    assert parse_row(shared, "f", 0) == {"prompt": [{"role": "user", "content": "u"}], "answer": "a"}
    assert parse_row({"text": "once"}, "f", 0) == {"prompt": [], "answer": "once"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "x"}, "needs 'instruction' and 'output'.*it has instruction"),
        ({"instruction": "x", "output": 3}, "'output' must be text, got int 3"),
        ({"instruction": ["x"], "output": "y"}, "'instruction' must be text, got list"),
        (["x"], "expected an object, got list"),
        ({"text": 1}, "'text' must be text"),
    ],
)
def test_a_malformed_row_names_its_file_and_index(tmp_path, row, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([*ALPACA, row]))
    with pytest.raises(DataError, match=rf"bad\.json, row 2: .*{message}"):
        load_rows(str(path))


USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
PICTURE = {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image", "url": "x"}]}
ODD = [
    ([], "must be a list of turns"),
    ("u", "must be a list of turns"),
    ([USER], "the last turn must be the assistant's, got 'user'"),
    ([USER, ASSISTANT, {"role": "tool", "content": "{}"}, ASSISTANT], "turn 2 needs a role"),
    ([{"role": "robot", "content": "x"}, ASSISTANT], "turn 0 needs a role.*got 'robot'"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": []}], "turn 1 needs .* a text content"),
    ([PICTURE, ASSISTANT], "turn 0 needs .* a text content"),
    ([USER, "a"], "turn 1 must be an object"),
]


@pytest.mark.parametrize(("turns", "message"), ODD)
def test_odd_chat_rows_are_left_out_counted_and_one_is_shown(tmp_path, turns, message, caplog):
    path = tmp_path / "chat.jsonl"
    good = {"messages": [USER, ASSISTANT]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, {"messages": turns}, good)))
    for _ in range(2):  # read, and from the cache
        caplog.clear()
        rows = load_rows(str(path))
        assert rows.to_list() == [{"prompt": [USER], "answer": "a", "row": number} for number in (0, 2)]
        assert re.search(rf"1 of 3 rows .* the first: .*chat\.jsonl, row 1: .*{message}", caplog.text)
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in ({"messages": turns}, good, {"messages": turns}))
    )
    with pytest.raises(DataError, match=rf"2 of 3 rows .* the first: .*row 0: .*{message}"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"instruction": "x", "output": None}, "output"),
        ({"instruction": None, "output": "y"}, "instruction"),
        ({"text": None}, "text"),
    ],
)
def test_a_null_is_left_out_counted_and_shown(tmp_path, row, name, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (ALPACA[0], row, ALPACA[1])))
    assert load_rows(str(path)).remove_columns("row").to_list() == EXPECTED
    assert f"1 of 3 rows cannot be used, the first: {path}, row 1: '{name}' is null" in caplog.text


def test_speakers_have_many_names_and_contents_parts():
    parts = [{"type": "text", "text": "on"}, {"type": "text", "text": "ce"}]
    for user, assistant in (("human", "gpt"), ("Human", "AI"), ("prompter", "assistant"), ("user", "model")):
        turns = [{"from": user, "value": parts}, {"from": assistant, "value": "a"}]
        assert parse_row({"conversations": turns}, "f", 0) == {
            "prompt": [{"role": "user", "content": "once"}], "answer": "a",
        }  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Add.\n\n1 2", "completion": "3"},
        {"prompt": "Add.\n\n1 2", "response": "3", "text": "both"},
        {"instruction": "Add.", "context": "1 2", "response": "3", "category": "maths"},  # Dolly
        {"question": "Add.\n\n1 2", "answer": "3"},
        {"prompt": [{"role": "user", "content": "Add.\n\n1 2"}],
         "completion": [{"role": "assistant", "content": "3"}]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_rows_of_other_data_sets(tmp_path, row, ending):
    path = tmp_path / f"rows.{ending}"
    rows = Dataset.from_list([row, row])
    if ending == "parquet":
        rows.to_parquet(path)
    elif isinstance(row.get("prompt"), list) and ending != "jsonl":
        return  # a table has no lists
    elif ending == "jsonl":
        path.write_text(f"{json.dumps(row)}\n" * 2)
    else:
        rows.to_csv(path, sep="\t" if ending == "tsv" else ",", index=False)
    assert listed(load_rows(str(path))) == EXPECTED[:1] * 2


def test_a_table_may_be_divided_by_semicolons_and_must_be_whole(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeffinstruction;input;output\r\nAdd.;1 2;3\r\nGreet.;;"Hello."\r\n'.encode())
    assert listed(load_rows(str(path))) == EXPECTED
    path.write_text("instruction,output\nAdd.,3,4\n")
    with pytest.raises(DataError, match=r"rows\.csv, row 0: has not as many fields"):
        load_rows(str(path))
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read"):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_encodings(tmp_path, name):
    row = {"instruction": "Grüße", "output": "Schöne Grüße"}
    text = json.dumps(row, ensure_ascii=False)
    text = {"a.json": f"[{text}]", "a.jsonl": text, "a.csv": "instruction,output\nGrüße,Schöne Grüße\n"}[name]
    path = tmp_path / name
    expected = [{"prompt": [{"role": "user", "content": "Grüße"}], "answer": "Schöne Grüße"}]
    path.write_bytes(text.encode("utf-8-sig"))
    assert listed(load_rows(str(path))) == expected
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match=rf"{name}.*UTF-16"):
        load_rows(str(path))
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=rf"{name}.*not UTF-8 \(byte 0xfc .*Latin-1"):
        load_rows(str(path))


def test_halves_of_surrogate_pairs_are_replaced(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a \\ud800 b \\ud83d\\ude00", "output": "\\udfff"}\n')
    (row,) = listed(load_rows(str(path)))
    assert row == {"prompt": [{"role": "user", "content": "a \ufffd b \U0001f600"}], "answer": "\ufffd"}
    assert encode_text(tokenizer, "a\ud800") == encode_text(tokenizer, "a\ufffd")
    encode_prompt(tokenizer, [{"role": "user", "content": "\ud800 <|mask|>"}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1: nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "line 1: not valid JSON"),
        ('{"text": 1e999}', "row 0: 'text' must be text"),
    ],
)
def test_extremes_are_named(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"a\.jsonl.*{message}"):
        load_rows(str(path))
    (tmp_path / "b.json").write_text("")
    with pytest.raises(DataError, match=r"b\.json: the file is empty"):
        load_rows(str(tmp_path / "b.json"))


def test_a_hub_data_set_gives_the_same_rows(monkeypatch):

    asked = []

    def hub(name, split):
        asked.append((name, split))
        return Dataset.from_list(ALPACA)

    monkeypatch.setattr("datasets.load_dataset", hub)
    assert listed(load_rows("tatsu-lab/alpaca")) == EXPECTED
    assert asked == [("tatsu-lab/alpaca", "train")]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list([{"instruction": "x"}]))
    with pytest.raises(DataError, match=r"some/set\[train\], row 0: needs 'instruction' and 'output'"):
        load_rows("some/set")


def test_a_file_has_no_splits(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ALPACA))
    with pytest.raises(ConfigError, match="split 'test' is for data sets of the hub"):
        load_rows(str(path), "test")


def test_a_missing_hub_data_set_says_so():
    with pytest.raises(DataError, match="no-such/data-set: no such file, and not a data set that the hub"):
        load_rows("no-such/data-set")


def test_unreadable_files_say_why(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"instruction": ')
    with pytest.raises(DataError, match="not valid JSON"):
        load_rows(str(path))
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps(ALPACA[0]) + "\n{oops\n")
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        load_rows(str(lines))
    with pytest.raises(DataError, match="no such file"):
        load_rows(str(tmp_path / "none.json"))
    table = tmp_path / "a.json.gz"
    table.write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(str(table))
    other = tmp_path / "a.xml"
    other.write_text("x")
    with pytest.raises(DataError, match=r"expected one of .json, .jsonl"):
        load_rows(str(other))
    whole = tmp_path / "b.json"
    whole.write_text('{"instruction": "x"}')
    with pytest.raises(DataError, match="expected a JSON array of rows, got dict"):
        load_rows(str(whole))


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ALPACA))
    assert len(load_rows(str(path))) == 2
    path.write_text(json.dumps(ALPACA[:1]))
    assert len(load_rows(str(path))) == 1


def test_quotation_marks_between_tabs_may_be_text(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('instruction\toutput\nSay "hi"\t"Hello" he said\n')
    (row,) = listed(load_rows(str(path)))
    assert row["answer"] == '"Hello" he said'
    path.write_text('instruction\toutput\n"a\ttab"\t"quoted"\n')
    (row,) = listed(load_rows(str(path)))
    assert (row["prompt"][0]["content"], row["answer"]) == ("a\ttab", "quoted")


def test_tabs_divide_a_tsv_whatever_else_its_first_line_holds(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("question\tanswer\nWhat, when, where?\tHere; now\n")
    (row,) = listed(load_rows(str(path)))
    assert (row["prompt"][0]["content"], row["answer"]) == ("What, when, where?", "Here; now")
    path.write_text("text\nHello, world\n")
    assert [row["answer"] for row in listed(load_rows(str(path)))] == ["Hello, world"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    if ending == "csv":
        path.write_text("instruction,output,output\na,b,c\n")
    else:
        columns = [pyarrow.array(["a"])] * 3
        pyarrow.parquet.write_table(pyarrow.table(columns, names=["instruction", "output", "output"]), path)
    with pytest.raises(DataError, match="several columns called 'output'"):
        load_rows(str(path))


@pytest.mark.parametrize("label", [False, "false", 0, "0"])
def test_a_bad_answer_is_none_to_learn(tmp_path, label):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "bad", "label": label}))
    with pytest.raises(DataError, match="so its completion is a bad answer"):
        load_rows(str(path))


def test_a_conversation_of_the_assistant_alone_is_left_out(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    alone = {"messages": [{"role": "assistant", "content": "only me"}]}
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path.write_text("\n".join(json.dumps(row) for row in (talk, talk, alone)))
    assert [row["answer"] for row in listed(load_rows(str(path)))] == ["a", "a"]
    assert "only the assistant speaks" in caplog.text


def test_another_way_of_reading_reads_again(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "q", "output": "a"}))
    assert listed(load_rows(str(path)))[0]["answer"] == "a"
    monkeypatch.setattr("dlm.data.rows.READING", -1)
    monkeypatch.setattr("dlm.data.rows.text_field", lambda row, key, where: "another")
    assert listed(load_rows(str(path)))[0]["answer"] == "another"


USER = {"role": "user", "content": "q"}
AGREE = [
    {"instruction": "i", "output": "o"},
    {"instruction": "i", "input": "x", "output": "o"},
    {"instruction": "i", "input": "  ", "output": "o"},
    {"instruction": "", "output": "o", "prompt": "p", "completion": "c"},
    {"prompt": "p", "question": "q", "answer": "a"},
    {"prompt": "p", "completion": "c"},
    {"prompt": [USER], "completion": "c"},
    {"prompt": [USER], "completion": [{"role": "assistant", "content": "c"}]},
    {"messages": [], "instruction": "i", "output": "o"},
    {"messages": [USER, {"role": "assistant", "content": "a"}], "instruction": "i", "output": "o"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "i", "response": "r", "context": "c"},
]


@pytest.mark.parametrize("record", AGREE, ids=str)
def test_what_is_trained_on_is_what_is_asked(record):
    row = parse_row(record, "x", 0)
    prompt, answer = asked_and_answer(record, "x")
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    assert (row["prompt"], row["answer"]) == (prompt, answer)
