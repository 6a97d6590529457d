from decimal import Decimal

import pytest

from eval.checks import final_number, gsm8k, numbers
from eval.tasks import Question


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It costs $1,234.50.", ["1234.50"]),
        ("-3 degrees, then +4", ["-3", "4"]),
        ("half is .5 and 3/4 is more", ["0.5", "0.75"]),
        ("a 7-year-old has 3-4 apples", ["7", "3", "4"]),
        ("$-5 or -$5", ["-5", "-5"]),
        ("12,345,678 people", ["12345678"]),
        ("1,2 and 3", ["1", "2", "3"]),
        ("80% of 20kg", ["80", "20"]),
        ("nothing, really.", []),
        ("5/0", []),
    ],
)
def test_numbers_are_read_as_people_write_them(text, found):
    assert numbers(text) == [Decimal(x) for x in found]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18 every day.\n#### 18", "18"),
        ("The answer is 42, since 6 times 7 is 42.", "42"),
        ("6 + 6 = 12. The final answer: 1,200 dollars.", "1200"),
        ("First 3, then 5 eggs.", "5"),
        ("#### 7\nor was it 8", "7"),
        ("The answer is: 10 + 5 = 15", "15"),
        ("The answer is 2^3 = 8.", "8"),
        ("The answer is \N{MINUS SIGN}5", "-5"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_final_number_is_the_marked_one_or_the_last(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("So she earns $18.00", True),
        ("#### 18", True),
        ("18 dollars", True),
        ("It is 18, no: 19.", False),
        ("The answer is -18", False),
        ("", False),
    ],
)
def test_answers_to_gsm8k(answer, right):
    question = Question("0", ("How much?",), ("9 * 2 = <<9*2=18>>18\n#### 18",))
    assert gsm8k(question, answer) is right
