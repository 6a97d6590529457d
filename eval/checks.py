"""Right or wrong, told by a program: numbers of GSM8K, and the rule-made tasks."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from eval.tasks import Question

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?")


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order; "$1,234.50", "-3", ".5" and "3/4" are one each, units are left out."""
    found, text = [], text.replace("$", "").replace("\N{MINUS SIGN}", "-")
    for word in _NUMBER.finditer(text):
        if not any(char.isdigit() for char in word[0]):
            continue
        hyphen = word[0][0] in "-+" and word.start() and text[word.start() - 1 : word.start()].isalnum()
        number = _value(word[0][1:] if hyphen else word[0])  # "3-4" and "7-year" are no negative numbers
        if number is not None:
            found.append(number)
    return found


def _value(word: str) -> Decimal | None:
    above, _, below = word.replace(",", "").partition("/")
    try:
        value = Decimal(above) / (Decimal(below) if below else 1)
    except (InvalidOperation, ZeroDivisionError):
        return None
    return value


def final_number(text: str) -> Decimal | None:
    """The number that a solution ends with: behind "####" or "answer is" where one stands, else the last."""
    marked = re.split(r"####|\banswer\b[^.\n]*?(?:\bis\b|[:=])", text, flags=re.IGNORECASE)
    if len(marked) > 1:
        first = (
            marked[-1].strip().split("\n")[0]
        )  # "10 + 5 = 15": what is worked out stands behind the last "="
        if after := numbers(first.rsplit("=", 1)[-1]) or numbers(marked[-1]):
            return after[0]
    every = numbers(text)
    return every[-1] if every else None


def gsm8k(question: Question, answer: str) -> bool:
    """Whether an answer to a GSM8K question ends with the right number, to within a ten-thousandth."""
    right, given = final_number(question.reference[0]), final_number(answer)
    return right is not None and given is not None and abs(right - given) <= Decimal("0.0001")


def rules(question: Question, answer: str) -> bool:
    """Whether an answer to a rule-made instruction is right."""
    from dlm.data.rules import Example, is_right

    return is_right(Example(question.category, question.turns[0], question.reference[0]), answer)


CHECKS: dict[str, Callable[[Question, str], bool]] = {"gsm8k": gsm8k, "rules": rules}
