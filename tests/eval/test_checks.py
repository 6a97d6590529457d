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


PHRASINGS = [
    ("#### 18", "18"),
    ("She makes $18.\n#### 18", "18"),
    ("####18", "18"),
    ("#### $1,200", "1200"),
    ("#### -5", "-5"),
    ("#### 18 dollars", "18"),
    ("The answer is $9{,}500.", "9500"),
    ("The answer is 9\\,500", "9500"),
    ("It is 1 200 000 people", "1200000"),
    ("1\u202f200\u202f000", "1200000"),
    ("1'200", "1200"),
    ("The answer is 12 = 3*4", "12"),
    ("The answer is 3*4 = 12", "12"),
    ("So 12 = 3*4.", "12"),
    ("So 3 * 4 = 12.", "12"),
    ("The answer is \\boxed{18}. Check: 9 * 2 = 18 and 20 - 2 = 18, so 7 is wrong.", "18"),
    ("\\boxed{18} dollars for 7 days", "18"),
    ("$\\boxed{\\frac{3}{4}}$", "0.75"),
    ("$$\\boxed{\\text{$18$}}$$", "18"),
    ("\\boxed{\\$1{,}234.50}", "1234.50"),
    ("\\boxed{9*2=18}", "18"),
    ("The answer is 18.\n\nQuestion: Tom has 5 apples and eats 2.\nAnswer: 3", "18"),
    ("18\n\nQ: How many are 3 and 4?\nA: 7", "18"),
    ("#### 18\n\nJohn has 3 apples.\n#### 3", "18"),
    ("The answer is 18.\nUser: and 5 + 5?", "18"),
    ("It is 18.<|im_end|>\n<|im_start|>user\n5", "18"),
    ("<think>It may be 7. The answer is 9.</think>The answer is 18.", "18"),
    ("**18**", "18"),
    ("The answer is **18** eggs.", "18"),
    ("Answer: 18", "18"),
    ("Final answer: $18.00", "18"),
    ("answer = 18", "18"),
    ("The answer is -18", "-18"),
    ("The answer is \u221218", "-18"),
    ("It is \u201318 degrees", "-18"),
    ("-$5", "-5"),
    ("80%", "80"),
    ("80\\%", "80"),
    ("3/4", "0.75"),
    ("He has 2 1/2 hours", "2.5"),
    (".5", "0.5"),
    ("18.", "18"),
    ("18.00", "18"),
    ("$18", "18"),
    ("USD 18", "18"),
    ("18km", "18"),
    ("The answer is 18, since 9 * 2 = 18.", "18"),
    ("The answer is 18 because 20 - 2 = 18", "18"),
    ("The answer is 18 since 9 = 3*3", "18"),
    ("#### Step 1\nTake 9.\n#### Step 2\nTwice is 18.", "18"),
    ("First 3, then 5 eggs.", "5"),
    ("The answer is 2^3 = 8.", "8"),
    ("The answer is: 10 + 5 = 15", "15"),
    ("It is 18, no: 19.", "19"),
    ("The answer is:\n\n18", "18"),
    ("The answer to question 2 is 18.", "18"),
    ("x = 18", "18"),
    ("Total = 9 * 2 = $18 per day", "18"),
    ("none", None),
    ("5/0", None),
    ("The final answer is $x = 18$.", "18"),
    ("a 7-year-old has 3-4 apples", "4"),
    ("12,345,678 people", "12345678"),
    ("9 × 2 = 18", "18"),
    ("20 - 2 = 18 eggs, and 18 = 9*2", "18"),
    ("Thus 18 is the answer. We used 5 steps.", "18"),
    ("So 18 eggs is the final answer, after 3 days.", "18"),
    ("x = 18\nStep 2 done", "18"),
    ("Step 3", "3"),
    ("1e3", "1000"),
    ("1.5e-2 m", "0.015"),
    ("5 eggs", "5"),
]


@pytest.mark.parametrize(("text", "number"), PHRASINGS)
def test_the_final_number_of_many_phrasings(text, number):
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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 eggs * $2 per egg = $18", 18),
        ("9 eggs x 2 dollars = 18 dollars.", 18),
        ("The answer is 9 eggs * $2 = $18.", 18),
        ("20 apples - 5 apples = 15 apples.", 15),
        ("3 weeks = 21 days.", 21),
        ("18 dollars, since 9 eggs * $2 = $18", 18),
        ("18 because 9 * 2 = 18", 18),
    ],
)
def test_units_in_an_equation_are_no_results(text, number):
    assert final_number(text) == number
