import gzip
import json

import pytest

from dlm.data.rows import load_rows, parse_row
from dlm.errors import DataError

ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hello."},
]
EXPECTED = [
    {"prompt": [{"role": "user", "content": "Add.\n\n1 2"}], "answer": "3"},
    {"prompt": [{"role": "user", "content": "Greet."}], "answer": "Hello."},
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    text = "\n".join(map(json.dumps, ALPACA)) if "jsonl" in name else json.dumps(ALPACA)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert load_rows(str(path)).to_list() == EXPECTED


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
        ({"instruction": None, "output": "y"}, "'instruction' must be text, got NoneType"),
        (["x"], "expected an object, got list"),
        ({"messages": []}, "must be a list of turns"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last turn must be the assistant's"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "turn 0 needs a role"),
        ({"text": 1}, "'text' must be text"),
    ],
)
def test_a_malformed_row_names_its_file_and_index(tmp_path, row, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([*ALPACA, row]))
    with pytest.raises(DataError, match=rf"bad\.json, row 2: .*{message}"):
        load_rows(str(path))


def test_a_hub_data_set_gives_the_same_rows(monkeypatch):
    from datasets import Dataset

    asked = []

    def hub(name, split):
        asked.append((name, split))
        return Dataset.from_list(ALPACA)

    monkeypatch.setattr("datasets.load_dataset", hub)
    assert load_rows("tatsu-lab/alpaca").to_list() == EXPECTED
    assert asked == [("tatsu-lab/alpaca", "train")]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list([{"instruction": "x"}]))
    with pytest.raises(DataError, match=r"some/set\[train\], row 0: needs 'instruction' and 'output'"):
        load_rows("some/set")


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
    other = tmp_path / "a.csv"
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
