"""Prompts of files are those of training: one reader of records."""

import io
import json

import pytest

from dlm.data.prompts import read_prompts, read_whole
from dlm.data.rows import parse_row
from dlm.errors import DataError

TURNS = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "What?"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "input": "  ", "output": "3"},
        {"instruction": "Add.", "input": "", "output": "3"},
        {"instruction": "Add.", "context": "1 2", "response": "3"},
        {"prompt": "Add.", "completion": "3"},
        {"question": "Add.", "answer": "3"},
    ],
)
def test_a_record_gives_the_prompt_that_training_sees(tmp_path, name, record):
    file = tmp_path / name
    file.write_text(json.dumps([record] if name == "a.json" else record))
    (prompt,) = read_prompts(str(file))
    assert parse_row(record, "f", 0)["prompt"] == [{"role": "user", "content": prompt}]


def test_conversations_by_any_name(tmp_path):
    file = tmp_path / "a.jsonl"
    other = [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "What?"}]
    file.write_text("\n".join(json.dumps(r) for r in ({"messages": TURNS}, {"conversations": other})))
    assert list(read_prompts(str(file))) == [TURNS[:1]] * 2  # what training learns is not part of the prompt
    file.write_text(json.dumps({"messages": [{"role": "user"}]}))
    with pytest.raises(DataError, match=r"a\.jsonl, row 0: turn 0 needs a role"):
        list(read_prompts(str(file)))
    file.write_text(json.dumps({"other": 1}))
    with pytest.raises(DataError, match=r"row 0: needs 'instruction'"):
        list(read_prompts(str(file)))
    file.write_text(json.dumps({"prompt": 5}))
    with pytest.raises(DataError, match=r"row 0: 'prompt' must be a text, got 5"):
        list(read_prompts(str(file)))


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "Be brief."}], TURNS])
def test_a_chat_row_gives_the_prompt_that_training_sees(tmp_path, key, before):
    file, record = tmp_path / "a.jsonl", {key: [*before, *TURNS]}
    file.write_text(json.dumps(record))
    assert list(read_prompts(str(file))) == [parse_row(record, "f", 0)["prompt"]]
    file.write_text(json.dumps({key: record[key][:-1]}))  # nobody has answered yet
    assert list(read_prompts(str(file))) == [parse_row(record, "f", 0)["prompt"]]


@pytest.mark.parametrize("turns", [TURNS[1:], [TURNS[1], TURNS[1]], [{"role": "system", "content": "x"}]])
def test_a_conversation_without_a_question_is_named(tmp_path, turns):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    with pytest.raises(DataError, match=r"a\.jsonl, row 0: a conversation must end with a user's turn"):
        list(read_prompts(str(file)))


def test_lines_and_encodings(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffGrüße\n\n  two \n".encode())
    assert list(read_prompts(str(file))) == ["Grüße", "  two "]
    file.write_bytes("Grüße".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        list(read_prompts(str(file)))


@pytest.mark.parametrize("value", [5, {"a": 1}, True])
def test_a_prompt_that_is_no_text_is_named(tmp_path, value):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"prompt": value}))
    prompts = read_prompts(str(file))
    assert next(prompts) == "one"
    with pytest.raises(DataError, match="row 1: 'prompt' must be a text, got "):
        next(prompts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_file_without_prompts_is_named(tmp_path, name):
    (tmp_path / name).write_text("[]" if name == "a.json" else "\n\n" if name == "a.txt" else "")
    with pytest.raises(DataError, match=f"{name}: (holds no prompts|empty|.*empty)"):
        list(read_prompts(str(tmp_path / name)))


class Bytes:
    """A stdin of bytes."""

    def __init__(self, data):
        self.buffer = io.BytesIO(data)


def test_stdin_is_utf_8_whatever_marks_it_begins_with(monkeypatch):
    monkeypatch.setattr("sys.stdin", Bytes("\ufeffOne é\r\n\nTwo\n".encode()))
    assert list(read_prompts("-")) == ["One é", "Two"]
    monkeypatch.setattr("sys.stdin", Bytes("\ufeffA page\nof text\n".encode()))
    assert read_whole("-") == "A page\nof text"
    for read in (lambda: list(read_prompts("")), lambda: read_whole("-")):
        monkeypatch.setattr("sys.stdin", Bytes("fine\ncaf\xe9\n".encode("latin-1")))
        with pytest.raises(DataError, match="stdin, line 2: not UTF-8"):
            read()


@pytest.mark.parametrize("name", ["", "-"])
def test_a_stdin_without_prompts_is_named(monkeypatch, name):
    monkeypatch.setattr("sys.stdin", Bytes(b"\n \n"))
    with pytest.raises(DataError, match="stdin: holds no prompts"):
        list(read_prompts(name))


def test_lines_end_at_line_feeds_alone(tmp_path):
    """U+2028, form feeds and U+0085 stand in texts that people copy; they end no line of a file."""
    odd = "a\u2028b\x0cc\x85d"
    file = tmp_path / "a.txt"
    file.write_bytes(f"{odd}\r\nTwo\r\n".encode())
    assert list(read_prompts(str(file))) == [odd, "Two"]
    table = tmp_path / "a.csv"
    table.write_bytes(f"prompt,completion\r\n{odd},x\r\n".encode())
    assert list(read_prompts(str(table))) == [odd]
