import json
from dataclasses import replace

import pytest

from dlm.data.prompts import read_prompts
from dlm.data.rows import parse_row
from dlm.errors import ConfigError, DataError
from dlm.tokenizer import as_messages
from eval.generation import conversation, mark
from eval.mt_bench import load_references
from eval.tasks import TASKS, load_questions

ROWS = {
    "alpaca_eval": {"instruction": "Who?", "output": "Me.", "generator": "davinci", "dataset": "vicuna"},
    "wiki": {"instruction": "Explain it.", "dataset": "wiki", "category": "history"},
    "gsm8k": {"question": "How many?", "answer": "2+2\n#### 4"},
    "mt_bench": {"question_id": 81, "category": "writing", "turns": ["One?", "Two?"]},
    "arena_hard": {"question_id": "ab", "category": "arena", "turns": [{"content": "Do it."}]},
    "file": {"prompt": "Hello?"},
}


def write(tmp_path, rows, name="q.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("task", ROWS)
def test_rows_of_every_task_are_read(task, tmp_path):
    (question,) = load_questions(task, write(tmp_path, [ROWS[task]]))
    expected = {
        "alpaca_eval": ("0", ("Who?",), ("Me.",), "vicuna", "davinci"),
        "wiki": ("0", ("Explain it.",), (), "history", "reference"),
        "gsm8k": ("0", ("How many?",), ("2+2\n#### 4",), "", "reference"),
        "mt_bench": ("81", ("One?", "Two?"), (), "writing", "reference"),
        "arena_hard": ("ab", ("Do it.",), (), "arena", "reference"),
        "file": ("0", ("Hello?",), (), "", "reference"),
    }[task]
    assert (
        question.id, question.turns, question.reference, question.category, question.generator,
    ) == expected  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ("Who?", ()),
        ({"question": "Who?"}, ()),
        ({"question": "Who?", "answer": "Me.", "context": "At the door."}, ("Me.",)),
        ({"instruction": "Who?", "response": "Me."}, ("Me.",)),
        ({"prompt": "Who?", "completion": "Me."}, ("Me.",)),
        ({"prompt": "Who?", "response": "Me.", "output": ""}, ("Me.",)),
        ({"text": "Who?"}, ()),
        ({"messages": [{"role": "user", "content": "Who?"}]}, ()),
    ],
)
def test_a_file_asks_what_generate_reads_from_it(tmp_path, row, reference):
    file = write(tmp_path, [row])
    (question,), (prompt,) = load_questions("file", file), read_prompts(str(file))
    assert question.opening == as_messages(prompt)
    assert question.reference == reference
    if reference:
        assert parse_row(row, "f", 0) == {"prompt": as_messages(prompt), "answer": reference[0]}


def test_an_input_follows_its_instruction(tmp_path):
    row = {"instruction": "Sum up.", "input": "A text.", "output": "T."}
    assert load_questions("file", write(tmp_path, [row]))[0].turns == ("Sum up.\n\nA text.",)


USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "history", "reference"),
    [
        ({"messages": [USER, ASSISTANT]}, [], ("Me.",)),
        ({"messages": [USER]}, [], ()),
        ({"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM], ("Me.",)),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, [USER, ASSISTANT], ("Me.",)),
        (
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
            [],
            ("Me.",),
        ),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM], ("Me.",)),
    ],
)
def test_a_chat_row_is_its_last_question_with_what_was_said_before(tmp_path, row, history, reference):
    file = write(tmp_path, [row])
    (question,) = load_questions("file", file)
    assert (question.turns, question.reference) == (("Who?",), reference)
    assert question.opening == [*history, USER] == conversation(question, 0, {})
    if reference:  # the same prompt and the same answer as in training
        parsed = parse_row(row, "f", 0)
        assert (question.opening, question.reference[0]) == (parsed["prompt"], parsed["answer"])
    if "completion" not in row:
        assert [question.opening] == [
            [{"role": "user", "content": p}] if isinstance(p, str) else p for p in read_prompts(file)
        ]


def test_questions_that_differ_in_their_history_are_others(tmp_path):
    rows = [{"messages": [*before, USER]} for before in ([], [SYSTEM], [USER, ASSISTANT])]
    assert len({mark(question, 0) for question in load_questions("file", write(tmp_path, rows))}) == 3


@pytest.mark.parametrize("turns", [[ASSISTANT], [SYSTEM], [], ["x"], [{"role": "robot", "content": "x"}]])
def test_a_chat_row_without_a_question_is_named(tmp_path, turns):
    with pytest.raises(DataError, match=r"q\.jsonl, row 0: "):
        load_questions("file", write(tmp_path, [{"messages": turns}]))


def test_the_second_release_of_arena_hard(tmp_path):
    row = {"uid": "x1", "category": "hard_prompt", "prompt": "Prove it."}
    assert load_questions("arena_hard", write(tmp_path, [row]))[0].turns == ("Prove it.",)


def test_rule_made_questions_need_no_file():
    questions = load_questions("rules", limit=8)
    assert len(questions) == 8
    assert all(q.reference and q.category for q in questions)


def test_references_of_mt_bench(tmp_path):
    questions = load_questions("mt_bench", write(tmp_path, [ROWS["mt_bench"]]))
    answers = [{"question_id": 81, "choices": [{"index": 0, "turns": ["a", "b"]}]}]
    file = write(tmp_path, answers, "ref.jsonl")
    assert load_references(questions, file)[0].reference == ("a", "b")
    assert load_references(questions) == questions  # none of them needs one
    with pytest.raises(DataError, match="row 0"):
        load_references(questions, write(tmp_path, [{"question_id": 1}], "bad.jsonl"))
    maths = [replace(questions[0], category="math")]
    with pytest.raises(DataError, match="give --references"):
        load_references(maths)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x"}], "row 0: not a question"),
        ([ROWS["gsm8k"], {"question": "", "answer": "x"}], "row 1: a question must be"),
        ([ROWS["gsm8k"], ["a list"]], "row 1: not a question"),
        ([], "no questions"),
    ],
)
def test_bad_rows_are_named(rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_questions("gsm8k", write(tmp_path, rows))


def test_tasks_that_are_checked_need_answers(tmp_path):
    with pytest.raises(DataError, match="row 0: needs an answer"):
        load_questions("rules", write(tmp_path, [{"instruction": "Count."}]))


def test_other_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'gsm8k'"):
        load_questions("gsm8")
    with pytest.raises(ConfigError, match="needs --data"):
        load_questions("file")
    with pytest.raises(DataError, match="needs 'instruction', 'prompt', 'text' or 'messages'"):
        load_questions("file", write(tmp_path, [{"turns": "hello"}]))
    with pytest.raises(DataError, match="no such file"):
        load_questions("wiki", str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="same id"):
        load_questions("mt_bench", write(tmp_path, [ROWS["mt_bench"]] * 2))
    assert all(task.summary for task in TASKS.values())


def test_an_original_that_cannot_be_fetched_says_what_helps():
    with pytest.raises(DataError, match="give --data"):
        load_questions("gsm8k")
