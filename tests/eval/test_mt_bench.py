"""MT-Bench's grades and pairs, by a scripted judge that sees what the official prompts show."""

import re

import pytest

from dlm.errors import ConfigError, DLMError
from eval.answers import Answer
from eval.config import JudgeConfig
from eval.judge import Judge
from eval.mt_bench import JudgePrompt, compare, grade, outcome, read_grade, read_winner
from eval.tasks import Question
from tests.eval.endpoint import serving

NAMES = ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")


def template(name):
    pair, math, multi = name.startswith("pair"), "math" in name, name.endswith("multi-turn")
    parts = ["{question_1}", "{question_2}"] if multi else ["{question}"]
    turns = ("_1", "_2") if multi else ("",)
    parts += [f"R<{{ref_answer_{i}}}>" for i in (1, 2)[: len(turns) if math else 0]]
    sides = ("a", "b") if pair else ("",)
    parts += [f"{s or 'x'}<{{answer{'_' if s else ''}{s}{t}}}>" for s in sides for t in turns]
    return JudgePrompt(f"You judge by {name}", " ".join(parts))


PROMPTS = {name: template(name) for base in NAMES for name in (base, f"{base}-multi-turn")}
QUESTIONS = [
    Question("1", ("Write.", "Write more."), (), "writing"),
    Question("2", ("1+1?", "2+2?"), ("two", "four"), "math"),
    Question("3", ("Who are you?",), (), "roleplay"),
]


def said(**texts):
    return {(i, t): Answer(i, t, text) for i, several in texts.items() for t, text in enumerate(several)}


OURS = {(k[1:], t): a for (k, t), a in said(q1=["ok7", "ok9"], q2=["ok4", "ok2"], q3=["ok10"]).items()}


def judge(endpoint, tmp_path):
    return Judge(JudgeConfig(endpoint.url, "judge", cache=str(tmp_path / "cache")))


def test_grades_are_averaged_by_turn_and_category(tmp_path):
    def reply(body):
        grades = re.findall(r"ok(\d+)>", body["messages"][1]["content"])
        return f"Fine. Rating: [[{grades[-1]}]]"

    with serving(reply) as endpoint:
        found = grade(QUESTIONS, OURS, judge(endpoint, tmp_path), PROMPTS)
        assert found.by_turn == [pytest.approx((7 + 4 + 10) / 3), pytest.approx((9 + 2) / 2)]
        assert found.overall["mean"] == pytest.approx((7 + 9 + 4 + 2 + 10) / 5)
        assert found.categories == {"math": 3.0, "roleplay": 10.0, "writing": 8.0}
        assert found.grades["2/1"] == 2.0
        assert found.tally == {"judged": 5, "malformed": 0, "unanswered": 0}
        systems = sorted(
            body["messages"][0]["content"].removeprefix("You judge by ") for body in endpoint.seen
        )
        assert systems == [
            "single-math-v1",
            "single-math-v1-multi-turn",
            "single-v1",
            "single-v1",
            "single-v1-multi-turn",
        ]
        maths = [b["messages"][1]["content"] for b in endpoint.seen if "math" in b["messages"][0]["content"]]
        assert all("R<two>" in text for text in maths)


def test_malformed_grades_are_counted_and_left_out(tmp_path):
    with serving(lambda body: "[[8]]" if "ok7" in str(body) else "a good answer") as endpoint:
        found = grade(QUESTIONS, OURS, judge(endpoint, tmp_path), PROMPTS)
        assert found.tally == {"judged": 2, "malformed": 3, "unanswered": 0}
        assert found.overall["mean"] == 8.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Rating: [[7]]", 7),
        ("[[7.5]] then [[9]]", 7.5),
        ("[3]", 3),
        ("[[11]]", None),
        ("7/10", None),
        ("", None),
        ("<think>At first I would say [[3]].</think>Rating: [[8]]", 8),
        ("Perhaps [[3]].</think>\nRating: [[8]], not [[9]]", 8),
        ("<think>[[3]]", None),
        ("<think>[[3]]</think>I cannot say.", None),
        ("<think>[3]</think>[4]", 4),
    ],
)
def test_grades_are_read(text, value):
    assert read_grade(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so [[A]]", "A"),
        ("[[B]]", "B"),
        ("[[C]]", "tie"),
        ("A", None),
        ("[[D]]", None),
        ("<think>[[A]] is better</think>[[B]]", "B"),
        ("<think>[[A]]", None),
        ("[[B]], for [[A]] errs", "A"),  # FastChat asks for A first
        ("[[C]] or [[B]]", "B"),
    ],
)
def test_winners_are_read(text, value):
    assert read_winner(text) == value


@pytest.mark.parametrize(
    ("forward", "swapped", "result"),
    [
        ("A", "B", "win"),
        ("B", "A", "loss"),
        ("tie", "tie", "tie"),
        ("A", "A", "inconsistent"),
        ("A", "tie", "inconsistent"),
        (None, "A", ""),
    ],
)
def test_a_win_must_hold_in_both_positions(forward, swapped, result):
    assert outcome(forward, swapped) == result


def test_pairs_are_judged_both_ways(tmp_path):
    """The judge prefers the higher number, the first place where both are 9, and ties other equal ones."""
    theirs = {
        key: Answer(*key, text) for key, text in zip(OURS, ["ok6", "ok9", "ok5", "ok1", "ok10"], strict=True)
    }

    def reply(body):
        text = body["messages"][1]["content"]
        a, b = (int(re.findall(rf"{x}<ok(\d+)>", text)[-1]) for x in "ab")
        if a == b == 9:
            return "[[A]]"
        return "[[C]]" if a == b else ("[[A]]" if a > b else "[[B]]")

    with serving(reply) as endpoint:
        found = compare(QUESTIONS, OURS, theirs, judge(endpoint, tmp_path), PROMPTS)
        assert (found.wins, found.losses, found.ties, found.inconsistent) == (2, 1, 2, 1)
        assert found.win_rate == pytest.approx(0.6)
        assert len(endpoint.seen) == 9  # one pair of answers is equal, and so are both orders
        assert sorted(found.by_answer.values()) == [0.0, 0.5, 0.5, 1.0, 1.0]


def test_the_turns_of_a_question_are_not_independent(tmp_path):
    """Two turns with equal grades are one grade for the interval."""
    questions = [Question(str(i), ("A?", "B?"), (), "writing") for i in range(12)]
    answers = {(q.id, t): Answer(q.id, t, f"ok{1 + int(q.id) % 4}") for q in questions for t in (0, 1)}

    def reply(body):
        return f"[[{re.findall(r'ok(.)', body['messages'][1]['content'])[-1]}]]"

    with serving(reply) as endpoint:
        found = grade(questions, answers, judge(endpoint, tmp_path), PROMPTS)
        assert found.overall["count"] == 12
        assert found.overall["mean"] == 2.5


def test_prompts_know_two_turns(tmp_path):
    three = [Question("1", ("A?", "B?", "C?"), (), "writing")]
    answers = {("1", t): Answer("1", t, "x") for t in range(3)}
    with serving(lambda body: "[[1]]") as endpoint, pytest.raises(ConfigError, match="3 turns"):
        grade(three, answers, judge(endpoint, tmp_path), PROMPTS)


def test_no_verdict_at_all_is_an_error(tmp_path):
    with serving(lambda body: "hm") as endpoint, pytest.raises(DLMError, match="5 malformed"):
        grade(QUESTIONS, OURS, judge(endpoint, tmp_path), PROMPTS)
    with serving(lambda body: "hm") as endpoint, pytest.raises(DLMError, match="no pair of verdicts"):
        compare(QUESTIONS, OURS, OURS, judge(endpoint, tmp_path), PROMPTS)


def test_maths_need_references(tmp_path):
    bare = [Question("2", ("1+1?",), (), "math")]
    with serving(lambda body: "[[1]]") as endpoint, pytest.raises(ConfigError, match="needs a reference"):
        grade(bare, OURS, judge(endpoint, tmp_path), PROMPTS)
