"""A small instruction set made by rule: seeded, without a network, with answers that a program can check.

Four kinds of task. `count` and `spell` have one right answer. `climb` and `meet` have many, so that far from
what is known every position is uncertain and near it almost nothing is: the situation in which a decoder
that writes several tokens at once has to choose where to write. The longest answers have more than 40 tokens.

Every instruction belongs to one split, by a hash of its text: what is tested was never trained on.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from dlm.data.rows import features
from dlm.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from datasets import Dataset

PEOPLE = ("Anna", "Ben", "Cora", "Dan", "Emma", "Finn", "Gina", "Hugo")
ANIMALS = ("cat", "dog", "horse", "goat", "duck", "rabbit", "sheep", "mouse")
PLACES = ("at home", "outside", "in the garden", "on the hill", "by the river", "near the old bridge")
DEEDS = ("feeds", "washes", "follows", "calls", "draws", "finds")
OPENINGS = ("First", "Then", "Later", "Finally")
WORDS = (
    "bread",
    "cloud",
    "stone",
    "river",
    "light",
    "apple",
    "chair",
    "green",
    "night",
    "sugar",
    "train",
    "world",
)


@dataclass(frozen=True)
class Example:
    """One instruction with an answer that is right."""

    task: str
    instruction: str
    answer: str


GOAL = 50
"""The number at which counting and climbing end."""


def _count(rng: random.Random) -> tuple[str, str]:
    name, low = rng.choice(PEOPLE), rng.randint(6, 46)
    numbers = " ".join(map(str, range(low, GOAL + 1)))
    return f"{name} counts from {low} to {GOAL}.", f"{name} counts: {numbers}"


def _check_count(instruction: str, answer: str) -> bool:
    low, high = map(int, re.findall(r"\d+", instruction))
    return answer.split() == [
        instruction.split(maxsplit=1)[0],
        "counts:",
        *(str(n) for n in range(low, high + 1)),
    ]


def _spell(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, 2)
    return f"Spell {words[0]} and {words[1]}.", "Spell: " + ", ".join(" ".join(word) for word in words)


def _check_spell(instruction: str, answer: str) -> bool:
    words = re.findall(r"\w+", instruction)[1::2]
    return answer == "Spell: " + ", ".join(" ".join(word) for word in words)


def _climb(rng: random.Random) -> tuple[str, str]:
    name, low = rng.choice(PEOPLE), rng.randint(6, 46)
    numbers = [low]
    while numbers[-1] < GOAL:
        numbers.append(min(GOAL, numbers[-1] + rng.randint(1, 2)))
    instruction = f"{name} climbs from {low} to {GOAL} in steps of 1 or 2."
    return instruction, f"{name} climbs: " + " ".join(map(str, numbers))


def _check_climb(instruction: str, answer: str) -> bool:
    low, high = map(int, re.findall(r"\d+", instruction)[:2])
    if not re.fullmatch(rf"{instruction.split(maxsplit=1)[0]} climbs:( \d+)+", answer):
        return False
    numbers = list(map(int, answer.split()[2:]))
    steps = {b - a for a, b in pairwise(numbers)}
    return numbers[0] == low and numbers[-1] == high and steps <= {1, 2}


def _meet(rng: random.Random) -> tuple[str, str]:
    name, animal = rng.choice(PEOPLE), rng.choice(ANIMALS)
    sentences = [
        f"{opening} {name} {rng.choice(DEEDS)} the {animal} {rng.choice(PLACES)}." for opening in OPENINGS
    ]
    return f"Tell how {name} meets the {animal}.", " ".join(sentences)


def _one_of(words: tuple[str, ...]) -> str:
    return "(?:" + "|".join(words) + ")"


def _check_meet(instruction: str, answer: str) -> bool:
    match = re.fullmatch(r"Tell how (\w+) meets the (\w+)\.", instruction)
    if match is None:
        return False
    line = f"{match[1]} {_one_of(DEEDS)} the {match[2]} {_one_of(PLACES)}\\."
    return re.fullmatch(" ".join(f"{opening} {line}" for opening in OPENINGS), answer) is not None


@dataclass(frozen=True)
class RuleTask:
    """A kind of task: how an example is made and how an answer is checked."""

    make: Callable[[random.Random], tuple[str, str]]
    check: Callable[[str, str], bool]


RULE_TASKS: dict[str, RuleTask] = {
    "count": RuleTask(_count, _check_count),
    "spell": RuleTask(_spell, _check_spell),
    "climb": RuleTask(_climb, _check_climb),
    "meet": RuleTask(_meet, _check_meet),
}


SPLITS = ("train", "validation", "test")
_PARTS = 6
"""Instructions are divided into this many parts; the first is for tests, the second for validation."""


def split_of(instruction: str) -> str:
    """The split that an instruction belongs to."""
    part = hashlib.blake2b(instruction.encode(), digest_size=4).digest()[0] % _PARTS
    return {0: "test", 1: "validation"}.get(part, "train")


def make_examples(size: int, seed: int = 0, split: str = "train") -> list[Example]:
    """`size` examples of a split, the kinds of task in turn; the same for the same seed.

    Raises:
        ConfigError: for a size below 1 or an unknown split.
    """
    if size < 1:
        raise ConfigError(f"the number of examples must be at least 1, got {size}")
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    rng = random.Random(seed)
    examples: list[Example] = []
    while len(examples) < size:
        task = list(RULE_TASKS)[len(examples) % len(RULE_TASKS)]
        example = Example(task, *RULE_TASKS[task].make(rng))
        if split_of(example.instruction) == split:
            examples.append(example)
    return examples


def is_right(example: Example, answer: str) -> bool:
    """True when `answer` is a right answer to the example's instruction (not only the one it came with)."""
    return RULE_TASKS[example.task].check(example.instruction, answer.strip())


def rule_rows(size: int, seed: int = 0, split: str = "train") -> Dataset:
    """Examples as rows (columns of `dlm.data.rows.features`)."""
    from datasets import Dataset

    examples = make_examples(size, seed, split)
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": example.instruction}] for example in examples],
            "answer": [example.answer for example in examples],
        },
        features=features(),
    )
