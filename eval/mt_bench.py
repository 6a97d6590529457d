"""MT-Bench (arXiv 2306.05685): a judge grades answers from 1 to 10, or compares two systems both ways round.

The judge's prompts are the official ones, `judge_prompts.jsonl` of FastChat, downloaded or given by path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dlm.data.records import read_records
from dlm.errors import ConfigError, DataError, DLMError
from dlm.tokenizer import Message
from eval.answers import ByTurn
from eval.judge import Judge, JudgeRequest, Tally, conclusion
from eval.statistics import estimate
from eval.tasks import FASTCHAT, Question, with_references

MATHS = ("math", "reasoning", "coding", "arena-hard-200")
"""Categories that are judged with a reference answer."""

JUDGE_OPTIONS = {"temperature": 0.0, "max_tokens": 2048}

Winner = Literal["A", "B", "tie"]

_WINNERS: dict[str, Winner] = {"A": "A", "B": "B", "C": "tie"}


@dataclass(frozen=True)
class JudgePrompt:
    """One of the judge's prompts."""

    system: str
    template: str


def load_prompts(path: str = "") -> dict[str, JudgePrompt]:
    """The judge's prompts by name; from FastChat's repository, or a local copy.

    Raises:
        DataError: when they cannot be read.
    """
    rows: Any
    if path:
        rows = read_records(Path(path))
    else:
        from datasets import load_dataset

        try:
            rows = load_dataset("json", data_files=f"{FASTCHAT}/judge_prompts.jsonl", split="train")
        except (OSError, ValueError) as error:
            raise DataError(f"MT-Bench's prompts could not be fetched ({error}); give --prompts") from error
    try:
        return {row["name"]: JudgePrompt(row["system_prompt"], row["prompt_template"]) for row in rows}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not MT-Bench's judge prompts ({error!r})") from error


def load_references(questions: Sequence[Question], path: str = "") -> list[Question]:
    """The questions with GPT-4's answers, from FastChat's repository or a local copy.

    Only maths, reasoning and coding have them; where no question needs one, nothing is fetched.

    Raises:
        DataError: when they cannot be read.
    """
    if path:
        return with_references(questions, read_records(Path(path)), path)
    if all(q.reference or q.category not in MATHS for q in questions):
        return list(questions)
    from datasets import load_dataset

    url = f"{FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl"
    try:
        return with_references(questions, load_dataset("json", data_files=url, split="train"), url)
    except (OSError, ValueError) as error:
        raise DataError(f"MT-Bench's references could not be fetched ({error}); give --references") from error


def _filled(prompt: JudgePrompt, **texts: str) -> list[Message]:
    return [
        {"role": "system", "content": prompt.system},
        {"role": "user", "content": prompt.template.format(**texts)},
    ]


def _kind(question: Question, turn: int, base: str) -> str:
    """The name of the prompt: with a reference where the category wants one, for one turn or for both."""
    maths = "-math-v1" if question.category in MATHS else ("-v1" if base == "single" else "-v2")
    return f"{base}{maths}{'-multi-turn' if turn else ''}"


def _turn_prompt(prompts: dict[str, JudgePrompt], question: Question, turn: int, base: str) -> JudgePrompt:
    if len(question.turns) > 2:
        raise ConfigError(
            f"question {question.id} has {len(question.turns)} turns; MT-Bench's prompts know two"
        )
    name = _kind(question, turn, base)
    if name not in prompts:
        raise ConfigError(f"the judge's prompts lack {name!r}; they have {', '.join(sorted(prompts))}")
    if "math" in name and len(question.reference) <= turn:
        raise ConfigError(
            f"question {question.id} ({question.category}) needs a reference answer: --references"
        )
    return prompts[name]


def _turn_texts(question: Question, turn: int) -> dict[str, str]:
    """Fields of the templates besides answers."""
    if not turn:
        first = question.reference[0] if question.reference else ""
        return {"question": question.turns[0], "ref_answer_1": first}
    out = {f"question_{i + 1}": text for i, text in enumerate(question.turns[:2])}
    return out | {f"ref_answer_{i + 1}": text for i, text in enumerate(question.reference[:2])}


# ---- grades --------------------------------------------------------------------------------------------


def read_grade(text: str) -> float | None:
    """The first number in "[[7]]" (else in "[7]") behind a judge's thoughts, as FastChat reads it.

    None if there is none between 1 and 10.
    """
    text = conclusion(text)
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    grade = float(match[1]) if match else None
    return grade if grade is not None and 1 <= grade <= 10 else None


@dataclass(frozen=True)
class Grades:
    """MT-Bench's grades of one system.

    Attributes:
        by_turn: mean grade of the first turn, of the second, …
        overall: mean of all, with its interval over questions.
        categories: mean grade of each category.
        grades: each, by "id/turn".
        tally: how judging went.
    """

    by_turn: list[float]
    overall: dict[str, float]
    categories: dict[str, float]
    grades: dict[str, float]
    tally: dict[str, int]


def grade(
    questions: Sequence[Question], by_key: ByTurn, judge: Judge, prompts: dict[str, JudgePrompt]
) -> Grades:
    """Grade every turn of every question that has answers."""
    asked_turns, requests = [], []
    for question in questions:
        for turn in range(len(question.turns)):
            if all((question.id, i) in by_key for i in range(turn + 1)):
                prompt = _turn_prompt(prompts, question, turn, "single")
                answers = {f"answer_{i + 1}": by_key[question.id, i].text for i in range(turn + 1)}
                texts = answers if turn else {"answer": by_key[question.id, 0].text}
                asked_turns.append((question, turn))
                requests.append(
                    JudgeRequest(_filled(prompt, **_turn_texts(question, turn), **texts), JUDGE_OPTIONS)
                )
    tally = Tally()
    values = tally.read(judge.ask(requests, "MT-Bench"), read_grade)
    pairs = [(q, turn, g) for (q, turn), g in zip(asked_turns, values, strict=True) if g is not None]
    turns = range(max((turn for _, turn, _ in pairs), default=-1) + 1)
    categories = sorted({q.category for q, _, _ in pairs})
    grades = {f"{q.id}/{turn}": g for q, turn, g in pairs}
    if not grades:
        raise DLMError(f"the judge gave no grade that can be read: {tally}")
    return Grades(
        [_mean([g for _, turn, g in pairs if turn == i]) for i in turns],
        asdict(estimate([g for _, _, g in pairs], [q.id for q, _, _ in pairs])),
        {c: _mean([g for q, _, g in pairs if q.category == c]) for c in categories},
        grades,
        asdict(tally),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


# ---- pairs ---------------------------------------------------------------------------------------------


def read_winner(text: str) -> Winner | None:
    """Winner by "[[A]]", "[[B]]" or "[[C]]" (a tie) behind a judge's thoughts; None if none stands there.

    Of several the first of A, B and C counts, as FastChat reads it.
    """
    text = conclusion(text)
    return next((winner for letter, winner in _WINNERS.items() if f"[[{letter}]]" in text), None)


@dataclass(frozen=True)
class Pairs:
    """Two systems compared.

    Attributes:
        wins: turns that the first system wins in both positions.
        losses: turns that it loses in both.
        ties: all others: a tie, or verdicts that change with the position.
        inconsistent: of the ties, those whose verdict changes with the position.
        win_rate: wins and half of the ties, in shares.
        by_answer: 1, 0 or 0.5 for each turn, by "id/turn".
        tally: how judging went.
    """

    wins: int
    losses: int
    ties: int
    inconsistent: int
    win_rate: float
    by_answer: dict[str, float]
    tally: dict[str, int]


def compare(
    questions: Sequence[Question],
    first: ByTurn,
    second: ByTurn,
    judge: Judge,
    prompts: dict[str, JudgePrompt],
) -> Pairs:
    """Compare two systems turn by turn, each pair in both orders."""
    requests, keys = [], []
    for question in questions:
        for turn in range(len(question.turns)):
            if all((question.id, i) in answers for i in range(turn + 1) for answers in (first, second)):
                prompt = _turn_prompt(prompts, question, turn, "pair")
                keys.append(f"{question.id}/{turn}")
                for a, b in ((first, second), (second, first)):
                    texts = _both(question, turn, a, b)
                    requests.append(
                        JudgeRequest(_filled(prompt, **_turn_texts(question, turn), **texts), JUDGE_OPTIONS)
                    )
    tally = Tally()
    winners: list[Winner | None] = []
    winners += tally.read(judge.ask(requests, "MT-Bench, pairs"), read_winner)
    results = [outcome(a, b) for a, b in zip(winners[::2], winners[1::2], strict=True)]
    wins, losses = results.count("win"), results.count("loss")
    inconsistent = results.count("inconsistent")
    ties = results.count("tie") + inconsistent
    total = wins + losses + ties
    share = {"win": 1.0, "loss": 0.0, "tie": 0.5, "inconsistent": 0.5}
    by_answer = {key: share[result] for key, result in zip(keys, results, strict=True) if result}
    if keys and not total:
        raise DLMError("the judge gave no pair of verdicts that can be read")
    rate = (wins + ties / 2) / total if total else float("nan")
    return Pairs(wins, losses, ties, inconsistent, rate, by_answer, asdict(tally))


def outcome(forward: Winner | None, swapped: Winner | None) -> str:
    """For the first system, from both verdicts: "win", "loss", "tie", "inconsistent", or "" without them."""
    if forward is None or swapped is None:
        return ""
    if (forward, swapped) == ("A", "B"):
        return "win"
    if (forward, swapped) == ("B", "A"):
        return "loss"
    return "tie" if forward == swapped == "tie" else "inconsistent"


def _both(question: Question, turn: int, a: ByTurn, b: ByTurn) -> dict[str, str]:
    if not turn:
        return {"answer_a": a[question.id, 0].text, "answer_b": b[question.id, 0].text}
    return {
        f"answer_{x}_{i + 1}": answers[question.id, i].text
        for x, answers in (("a", a), ("b", b))
        for i in (0, 1)
    }
