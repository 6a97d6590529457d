"""Right or wrong, told by a program: numbers of GSM8K, and the rule-made tasks."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from eval.tasks import Question

_GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ '’\u00a0\u2009\u202f]\d{3})+(?!\d)|\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+](?=[.\d]))?(?:(?P<whole>\d+) (?=\d+/\d))?(?P<value>(?:{_GROUPED})(?:\.\d+)?|\.\d+)"
    r"(?:/(?P<below>\d+)|[eE](?P<power>[-+]?\d{1,2})(?!\w))?"
)
"""A number: 1,234.50, 1 200 000, -3, .5, 3/4, 2 1/2, 1e3."""

_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\{,\}|\\[,;!:] ?(?=\d{3})"), ","),  # 9{,}500 and 9\,500
    (re.compile(r"\\(?:text|mathrm|mbox|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\times|\\cdot"), "*"),
    (re.compile("[$£€\\\\]"), ""),
    (re.compile("[\u2212\u2013\u2011]"), "-"),  # minus sign, en dash, hyphen that does not break
)

_NEXT = re.compile(
    r"\n\s*(?:#+ *|\*\* *)?(?:(?:next |new |another )?(?:question|problem|exercise|instruction|q)(?: *\d+)?"
    r"(?:\*\*)? *[:.)]|(?:user|human)(?:\*\*)? *:)|<\|",
    re.IGNORECASE,
)
"""The place at which a model has gone on with a question of its own."""

_MARKED = re.compile(r"####(?=[ \t]*[*$£€\\]*[-+\u2212]?[$£€\\]*\.?\d)")
_ANSWER = re.compile(r"\banswer\b[^.\n]*?(?:\bis\b|[:=])", re.IGNORECASE)
_IS_ANSWER = re.compile(
    r"[^.\n\d]{0,30}?\bis\s+(?:the|my|our)\s+(?:final\s+|correct\s+)?answer\b", re.IGNORECASE
)
"""Words that may stand behind a number: "eggs is the answer"."""

_LABEL = re.compile(r"\b(?:step|part|case|equation|example|method)\s+\d+\b", re.IGNORECASE)
"""Numbers that count parts of a solution."""

_CLAUSE = re.compile(r"[;,](?!\d)|\b(?:since|because|as|so|where|which|when)\b", re.IGNORECASE)
"""Marks between two clauses of a line."""

_OPERATOR = re.compile(r"\s*(?:[-+*/^=×÷]|x\b|times\b|plus\b|minus\b|divided\b|multiplied\b)", re.IGNORECASE)


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order; "$1,234.50", "-3", ".5" and "3/4" are one each, units are left out."""
    text = _without_marks(text)
    return [value for match in _NUMBER.finditer(text) if (value := _parsed_value(match, text)) is not None]


def _without_marks(text: str) -> str:
    """A text without the marks of LaTeX, currencies and other dashes."""
    for pattern, instead in _LATEX:
        text = pattern.sub(instead, text)
    return text


def _parsed_value(match: re.Match[str], text: str) -> Decimal | None:
    """Value of a match of `_NUMBER`; "3-4" and "7-year" are no negative numbers."""
    above = re.sub("[^0-9.]", "", match["value"])
    try:
        value = Decimal(above) / Decimal(match["below"] or 1) + Decimal(match["whole"] or 0)
        value = value.scaleb(int(match["power"] or 0))
    except (InvalidOperation, ZeroDivisionError):
        return None
    negative = match["sign"] == "-" and not (match.start() and text[match.start() - 1].isalnum())
    return -value if negative else value


def final_number(text: str) -> Decimal | None:
    r"""The number that a solution ends with.

    What is behind the end of a model's thoughts counts, up to where it asks itself another question. Of that,
    the number behind the first "####"; else in the last \boxed{}; else behind the last "answer is"; else
    before the last "is the answer"; else the last one that counts no part ("step 2"). Of an equation, the
    side that is worked out.
    """
    text = text.rsplit("</think>", 1)[-1]
    begin = len(text) - len(text.lstrip())
    ends = [match.start() for match in _NEXT.finditer(text) if text[begin : match.start()].strip()]
    text = text[: ends[0]] if ends else text
    marked = _MARKED.split(text, maxsplit=1)
    if len(marked) > 1 and (candidates := numbers(marked[1])):
        return candidates[0]
    for box in reversed(_boxes(text)):
        if inside := numbers(box):
            return _worked_out(box, inside[-1])
    marked = _ANSWER.split(text)
    if len(marked) > 1 and (candidates := numbers(marked[-1])):
        line = next(line for line in marked[-1].split("\n") if numbers(line))
        return _worked_out(line, candidates[0])
    if named := _named(text):
        return named[-1]
    unlabelled = _LABEL.sub(" ", text)
    text = unlabelled if numbers(unlabelled) else text
    values = numbers(text)
    if not values:
        return None
    sentence = [part for part in re.split(r"\n|(?<=[.!?])\s", text) if numbers(part)][-1]
    return _worked_out(sentence, values[-1]) if "=" in sentence else values[-1]


def _named(text: str) -> list[Decimal]:
    """The numbers of which a text says that they are the answer."""
    text = _without_marks(text)
    named = [match for match in _NUMBER.finditer(text) if _IS_ANSWER.match(text, match.end())]
    return [value for match in named if (value := _parsed_value(match, text)) is not None]


def _boxes(text: str) -> list[str]:
    r"""Contents of the braces of \boxed{…}, braces within them included."""
    contents = []
    for start in re.finditer(r"\\boxed\s*\{", text):
        depth, end = 1, start.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        contents.append(text[start.end() : end - (not depth)])
    return contents


def _worked_out(text: str, otherwise: Decimal) -> Decimal:
    """Of "10 + 5 = 15", "12 = 3 * 4" or "18, since 9 * 2 = 18" the result.

    That is the first number, if its clause does nothing with it and is no equation; else the last side of the
    equation with one number.
    """
    text = _without_marks(text)
    if "=" not in text:
        return otherwise
    first = _NUMBER.search(text)
    parts = _CLAUSE.split(text)
    if first is not None and re.fullmatch(r"[\W_]*", text[: first.start()]) and "=" not in parts[0]:
        value = _parsed_value(first, text)
        if value is not None and not _OPERATOR.match(text, first.end()):
            return value
    clauses = [part for part in parts if "=" in part and numbers(part)]
    for clause in [text, *reversed(clauses)]:
        sides = [numbers(side) for side in clause.split("=")]
        if single := [side[0] for side in sides if len(side) == 1]:
            return single[-1]
    return otherwise


def gsm8k(question: Question, answer: str) -> bool:
    """True when an answer to a GSM8K question ends with the right number, to within a ten-thousandth."""
    right, answered = final_number(question.reference[0]), final_number(answer)
    return right is not None and answered is not None and abs(right - answered) <= Decimal("0.0001")


def rules(question: Question, answer: str) -> bool:
    """True when an answer to a rule-made instruction is right."""
    from dlm.data.rules import Example, is_right

    return is_right(Example(question.category, question.turns[0], question.reference[0]), answer)


def parallel(question: Question, answer: str) -> bool:
    """True when an answer to one of the tasks of `eval.parallel` is right."""
    from eval.parallel import solves

    return solves(question.category, question.turns[0], question.reference[0], answer)


CHECKS: dict[str, Callable[[Question, str], bool]] = {"gsm8k": gsm8k, "rules": rules, "parallel": parallel}
