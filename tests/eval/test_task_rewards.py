import math

import pytest

from dlm.errors import ConfigError, DLMError
from eval.task_rewards import check_task_reward, task_reward
from eval.tasks import Question

QUESTION = Question("0", ("How many?",), ("The answer is 12.",), history=(("system", "Be short."),))


def told(prompts, completions):
    """A reward of one's own: what it was told."""
    assert prompts == [QUESTION.opening]
    return [len(text) for text in completions]


def endless(prompts, completions):
    """No number."""
    return [math.inf]


def test_a_check_gives_one_or_nothing():
    reward = task_reward("check", "gsm8k")
    assert [reward(QUESTION, text) for text in ("It is 12", "13", "")] == [1.0, 0.0, 0.0]


def test_closeness_to_the_reference(monkeypatch):
    class Encoder:
        def relevance(self, answers, references):
            return [float(answers == references)]

    monkeypatch.setattr("eval.relevance.Encoder", Encoder)
    reward = task_reward("relevance", "file")
    assert reward(QUESTION, "The answer is 12.") == 1.0
    assert reward(QUESTION, "It is 12.") == 0.0
    assert math.isnan(reward(Question("1", ("?",)), "x"))


def test_any_reward_of_a_text_is_told_the_conversation():
    assert task_reward("tests.eval.test_task_rewards:told", "file")(QUESTION, "abc") == 3.0
    assert task_reward("length=2", "file")(QUESTION, "one two three") == -0.5
    with pytest.raises(DLMError, match="must be a finite number, got inf"):
        task_reward("tests.eval.test_task_rewards:endless", "file")(QUESTION, "")


def test_a_reward_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="unknown reward 'lenght=2'|unknown reward 'lenght'"):
        task_reward("lenght=2", "file")
    with pytest.raises(
        ConfigError, match="task 'file' has no program's check; those that have: gsm8k, rules"
    ):
        task_reward("check", "file")
    check_task_reward("length=2", ["file"])
    check_task_reward("check", ["gsm8k", "rules"])
    with pytest.raises(ConfigError, match="task 'wiki'"):
        check_task_reward("check", ["gsm8k", "wiki"])
