import math

import pytest

from dlm.errors import ConfigError, DLMError
from eval.answers import Answer
from eval.config import JudgeConfig
from eval.geval import expected_score, score
from eval.judge import Judge
from eval.tasks import Question
from tests.eval.endpoint import serving


def choice(text, **probabilities):
    top = [{"token": k[1:], "logprob": math.log(p), "bytes": None} for k, p in probabilities.items()]
    content = [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": top}]
    return {
        "message": {"role": "assistant", "content": text},
        "logprobs": {"content": content} if top else None,
    }


def test_scores_are_weighted_by_their_probabilities():
    assert expected_score(choice("4", t4=0.6, t5=0.2, tx=0.2)) == pytest.approx((4 * 0.6 + 5 * 0.2) / 0.8)
    assert expected_score(choice("3")) == 3.0
    assert expected_score(choice("I say 2.")) == 2.0
    assert expected_score(choice("seven")) is None
    assert expected_score(choice("9")) is None


def test_a_digit_counts_behind_a_judges_thoughts():
    assert expected_score({"message": {"content": "<think>1 or 2?</think> 4"}}) == 4.0
    assert expected_score({"message": {"content": "<think>1 or 2?"}}) is None


def test_answers_are_scored_and_what_holds_no_score_is_counted(tmp_path):
    questions = [Question(str(i), (f"Ask {i}",)) for i in range(3)]
    said = {(q.id, 0): Answer(q.id, 0, f"answer {q.id}") for q in questions}

    def reply(body):
        text = body["messages"][0]["content"]
        return "?" if "answer 1" in text else choice("5", t5=0.5, t3=0.5)

    with serving(reply) as endpoint:
        judge = Judge(JudgeConfig(endpoint.url, "judge", cache=str(tmp_path)))
        found = score(questions, said, judge, "fluency")
        assert found.mean["mean"] == pytest.approx(4.0)
        assert (set(found.scores), found.malformed, found.unanswered) == ({"0", "2"}, 1, 0)
        assert "natural English" in endpoint.seen[0]["messages"][0]["content"]
        with serving(lambda body: "?") as mute, pytest.raises(DLMError, match="no score"):
            score(questions, said, Judge(JudgeConfig(mute.url, "j", cache=str(tmp_path))), "fluency")
        with pytest.raises(ConfigError, match="Did you mean 'fluency'"):
            score(questions, said, judge, "fluence")


def test_a_judge_that_rules_all_digits_out_is_read_by_its_words():
    ruled_out = choice("3", t3=0.5)
    ruled_out["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = -9999.0
    assert expected_score(ruled_out) == 3.0


def test_only_a_score_that_was_written_is_one():
    """What a judge might have said instead is no verdict."""
    assert expected_score(choice("I'm sorry", t5=2e-6)) is None
    for text in ("-3", "1 or 2", "0", "6", "3 of 4"):
        assert expected_score(choice(text)) is None
    for text in ("Score (1-5): 4", "4/5", "4 out of 5", "**4**", "4.0"):
        assert expected_score(choice(text)) == 4.0
    assert expected_score(choice("4.5")) == 4.5
    places = [
        {"token": "Score", "top_logprobs": [{"token": "1", "logprob": -16.0}]},
        {"token": ": ", "top_logprobs": None},
        {"token": "5", "top_logprobs": [{"token": t, "logprob": math.log(0.5)} for t in ("5", "4")]},
    ]
    said = {"message": {"content": "Score: 5"}, "logprobs": {"content": places}}
    assert expected_score(said) == pytest.approx(4.5)
    places[2]["top_logprobs"] = None
    assert expected_score(said) == 5.0


def test_a_judge_sees_what_was_said_before_the_question(tmp_path):
    history = (("system", "Speak of trees."), ("user", "In summer?"), ("assistant", "Green."))
    question = Question("0", ("And in winter?",), history=history)
    with serving(lambda body: choice("4")) as endpoint:
        judge = Judge(JudgeConfig(endpoint.url, "judge", cache=str(tmp_path)))
        score([question], {("0", 0): Answer("0", 0, "Bare.")}, judge, "fluency")
        asked = endpoint.seen[0]["messages"][0]["content"]
    assert all(text in asked for text in ("Speak of trees.", "In summer?", "Green.", "And in winter?"))
