"""Rewards of answers to questions of a task: a program's check, the reference, or any reward of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from decoding.tilted.rewards import reward_named, values
from dlm.errors import ConfigError
from eval.checks import CHECKS
from eval.tasks import TASKS, Question

TaskReward = Callable[[Question, str], float]
"""Question and finished answer -> a number, the higher the better; NaN for an answer that has none."""


def check_task_reward(name: str, tasks: Iterable[str]) -> None:
    """Refuse a program's check for tasks that have none.

    Raises:
        ConfigError: naming the tasks that have one.
    """
    for task in tasks:
        if name == "check" and not TASKS[task].checks:
            with_check = ", ".join(key for key, value in TASKS.items() if value.checks)
            raise ConfigError(f"task {task!r} has no program's check; those that have: {with_check}")


def task_reward(name: str, task: str) -> TaskReward:
    """The reward that a text names.

    Args:
        name: "check" (1 for a right answer, 0 for a wrong one), "relevance" (closeness in meaning to the
            reference), or a reward of `decoding.tilted.rewards.reward_named`, such as "likelihood=PATH" or
            "module:function".
        task: whose answers it is for.

    Raises:
        ConfigError: for a name that is none, and a task without a check.
    """
    check_task_reward(name, [task])
    if name == "check":
        check = CHECKS[TASKS[task].checks]
        return lambda question, answer: float(check(question, answer))
    if name == "relevance":
        return _relevance()
    reward = reward_named(name)
    return lambda question, answer: values(reward, [question.opening], [answer], nan=True)[0]


def _relevance() -> TaskReward:
    from eval.relevance import Encoder

    encoder = Encoder()

    def relevance(question: Question, answer: str) -> float:
        if not question.reference:
            return math.nan
        return encoder.relevance([answer], [question.reference[0]])[0]

    return relevance
