"""Objects in JSON files, and what is said about files that are damaged."""

import json
import re
from pathlib import Path

import pytest

from dlm.checkpointing import MARKER, complete_checkpoints
from dlm.errors import CheckpointError, ConfigError, DataError
from dlm.json_files import damaged, read_object

JUNK = [b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe\x00", b"[" * 100_000, b'{"a": 1} x']


def test_an_object_comes_back(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"a": [1, "\u00fc"]}))
    assert read_object(file) == {"a": [1, "\u00fc"]}


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
@pytest.mark.parametrize("kind", [CheckpointError, DataError, ConfigError])
def test_what_is_no_object_is_one_line_that_names_the_file(tmp_path, junk, kind):
    file = tmp_path / "x.json"
    file.write_bytes(junk)
    with pytest.raises(kind, match=rf"^{re.escape(str(file))}: damaged \([^\n]+\); begin anew$"):
        read_object(file, kind, "begin anew")


def test_a_file_that_cannot_be_read_and_a_field_that_is_not_there_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.json: damaged \(.*No such file"):
        read_object(tmp_path / "nothing.json")
    assert str(damaged("x.json", KeyError("step"))) == "x.json: damaged ('step' is missing)"


@pytest.mark.parametrize("junk", [*JUNK, b'{"files": []}', b'{"files": {"a": 1}}'], ids=range(len(JUNK) + 2))
def test_a_checkpoint_with_a_damaged_marker_is_not_whole(tmp_path, junk):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / MARKER).write_bytes(junk)
    assert complete_checkpoints(tmp_path) == []


def test_no_json_file_is_parsed_without_a_net():
    """Wherever a file of JSON is read, what is damaged is caught in the lines that follow."""
    root = Path(__file__).parents[2]
    calls = [
        (path, number, lines)
        for package in ("dlm", "decoding", "finetune", "eval", "serve")
        for path in (root / package).rglob("*.py")
        for lines in [path.read_text("utf-8").splitlines()]
        for number, line in enumerate(lines)
        if re.search(r"json\.loads?\(", line) and not re.search(r"json\.dumps\(|__getstate__", line)
    ]
    assert len(calls) > 5
    for path, number, lines in calls:
        following = "\n".join(lines[number : number + 20])
        caught = " ".join(re.findall(r"except ([^:]+):", following))
        assert {"ValueError", "RecursionError"} <= set(re.findall(r"\w+", caught)), f"{path}:{number + 1}"
