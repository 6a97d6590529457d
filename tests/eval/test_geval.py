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
