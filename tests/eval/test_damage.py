"""Files of runs and questions that are not what they should be: one clear error, whatever stands in them."""

import json

import pytest

from dlm.errors import DataError, DLMError
from eval.answers import Answer, AnswerFile
from eval.metrics import Instruments
from eval.report.report import find_runs, write_report
from eval.run import Card, Results, Verdict, finish, merge, open_run
from eval.tasks import TASKS, Question, load_questions

QUESTIONS = [Question(str(i), (f"{i}?",), (f"#### {i}",)) for i in range(6)]
CARD = Card("gsm8k", "q.json", "tiny", "m", "abc", "conv,S=8", "conv", {"steps": 8})
JUNK = [
    b"", b"{\n", b"[]\n", b"5\n", b"null\n", b'"x"\n', b"\xff\xfe\x00\n", b"{}\n", b"[" * 100_000 + b"\n",
    b'{"whole": 3, "answers": []}\n', b'{"whole": {"a": "x"}, "answers": {"0/0": 3}}\n',
    b'{"id": 3, "turn": "x", "text": 5}\n', b'{"id": "0", "turn": 0, "text": null}\n',
    b'{"method":"alpaca_eval","judge":"j","against":"","measure":"win","by_answer":{},"figures":{}}\n',
    b'{"method":"geval","judge":"j","against":"","measure":"z","by_answer":{"0/0":"x"},"figures":[]}\n',
    b'{"question": "x", "answer": 5}\n', b'{"turns": [], "question_id": 1}\n', b'{"prompt": 5}\n',
    b'{"instruction": {"a": 1}}\n', b'{"instruction": "x", "output": [1]}\n',
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    place = CARD.folder(tmp_path / "runs")
    open_run(place, CARD)
    said = {(q.id, 0): Answer(q.id, 0, "It is 3", 4, "stop", 8, 8) for q in QUESTIONS}
    AnswerFile(place / "answers.jsonl").write(said.values())
    finish(place, CARD, QUESTIONS, said, Instruments())
    figures = {"mean": {"mean": 3.0, "low": None, "high": None}}
    Verdict("geval", "j", "x", "score", {"0/0": 3.0}, figures).save(place)
    return place


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
@pytest.mark.parametrize("name", ["run.json", "metrics.json", "answers.jsonl", "verdicts"])
def test_a_damaged_run_is_one_error(folder, tmp_path, name, junk):
    file = next((folder / name).iterdir()) if name == "verdicts" else folder / name
    file.write_bytes(junk)
    errors: list[str] = []
    for call in (
        lambda: Results.load(folder),
        lambda: open_run(folder, CARD),
        lambda: merge(folder, QUESTIONS),
        lambda: write_report(find_runs([str(tmp_path / "runs")]), tmp_path / "report", "t", 2, "", []),
    ):
        try:
            call()
        except DLMError as error:
            errors.append(str(error))
    assert errors
    assert all(folder.name in error for error in errors)


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_damaged_questions_are_one_error_that_names_the_file(tmp_path, junk):
    for task in TASKS:
        for name, text in (("questions.jsonl", junk), ("questions.json", b"[" + junk.strip() + b"]")):
            file = tmp_path / name
            file.write_bytes(text)
            try:
                load_questions(task, str(file))
            except DataError as error:
                assert name in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_calls", None),
        ("reveal_step", "a"),
        ("reveal_step", [None]),
        ("seconds", "x"),
        ("asked", 3),
    ],
)
def test_an_answer_whose_fields_are_of_other_kinds_is_named(tmp_path, name, value):
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.write([Answer("0", 0, "text")])
    row = json.loads(file.path.read_text())
    file.path.write_text(json.dumps({**row, name: value}) + "\n")
    with pytest.raises(DataError, match=rf"answers.jsonl, line 1: not an answer \(its {name}"):
        file.read()
