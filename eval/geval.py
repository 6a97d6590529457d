"""G-Eval (arXiv 2303.16634): a judge scores answers from 1 to 5, weighted by the scores' probabilities."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dlm.errors import DLMError, unknown_name
from eval.answers import Answer
from eval.judge import Judge, JudgeRequest, conclusion
from eval.statistics import estimate
from eval.tasks import Question

ASPECTS = {
    "coherence": "The answer is one whole: its sentences follow from each other, and it says nothing twice.",
    "relevance": "The answer is about what was asked, and holds what the user needs.",
    "fluency": "The answer is correct, natural English.",
}
"""Aspects that can be scored, and their meanings."""

PROMPT = """You will see an instruction and an answer to it. Rate the answer on one aspect.

Aspect: {aspect} (1 to 5). {meaning}

Steps:
1. Read the instruction, and note what it asks for.
2. Read the answer, and note where it meets the aspect and where it does not.
3. Give a score from 1 (not at all) to 5 (fully).

Instruction:
{instruction}

Answer:
{answer}

Write the score alone, one digit.
Score:"""


_SCALE = re.compile(r"\(\s*1\s*[-–]\s*5\s*\)|(?:/|\bout of)\s*5\b")
"""The scale, which a judge may repeat."""

_DIGIT = re.compile(r"\s*[1-5]\s*")


@dataclass(frozen=True)
class Score:
    """Scores of one aspect.

    Attributes:
        mean: with its interval.
        scores: each, by question id.
        malformed: replies that hold no score.
        unanswered: requests without a reply.
    """

    mean: dict[str, float]
    scores: dict[str, float]
    malformed: int
    unanswered: int


def score(
    questions: Sequence[Question], answers: Mapping[tuple[str, int], Answer], judge: Judge, aspect: str
) -> Score:
    """Score the first turns."""
    if aspect not in ASPECTS:
        raise unknown_name("aspect", aspect, ASPECTS)
    answered = [q for q in questions if (q.id, 0) in answers]
    options = {"temperature": 0.0, "max_tokens": 4, "logprobs": True, "top_logprobs": 20}
    requests = []
    for question in answered:
        texts = {"instruction": question.instruction, "answer": answers[question.id, 0].text}
        text = PROMPT.format(aspect=aspect, meaning=ASPECTS[aspect], **texts)
        requests.append(JudgeRequest([{"role": "user", "content": text}], options))
    choices = judge.ask(requests, f"G-Eval, {aspect}")
    ratings = [None if choice is None else expected_score(choice) for choice in choices]
    scores = {q.id: value for q, value in zip(answered, ratings, strict=True) if value is not None}
    unanswered = sum(choice is None for choice in choices)
    if answered and not scores:
        raise DLMError("the judge gave no score that can be read")
    malformed = len(answered) - len(scores) - unanswered
    return Score(asdict(estimate(list(scores.values()))), scores, malformed, unanswered)


def expected_score(choice: dict[str, Any]) -> float | None:
    """Σ p(s) s / Σ p(s) over the scores s = 1 … 5 where the score was written; else what was written.

    None for a reply that does not hold one number from 1 to 5: what a judge might have said is no score.
    """
    text = _SCALE.sub("", conclusion(choice["message"]["content"]))
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    if len(numbers) != 1 or not 1 <= float(numbers[0]) <= 5:
        return None
    mass: dict[int, float] = {}
    for place in (choice.get("logprobs") or {}).get("content") or []:
        if place["token"].strip() == numbers[0]:
            for candidate in place.get("top_logprobs") or []:
                if _DIGIT.fullmatch(candidate["token"]):
                    digit = int(candidate["token"])
                    mass[digit] = mass.get(digit, 0.0) + math.exp(candidate["logprob"])
            break
    total = sum(mass.values())
    return sum(digit * p for digit, p in mass.items()) / total if total > 0 else float(numbers[0])
