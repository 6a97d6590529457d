"""A small instruction set made by rule: seeded, without a network, with answers that a program can check.

Four kinds of task. Two have one right answer (`count`, `spell`), two have many (`climb`, `story`), so that a
decoder that writes several tokens at once has to keep them consistent. `count`, `climb` and `story` answers
run to 40 tokens and more.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset

from dlm.data.rows import FEATURES
from dlm.errors import ConfigError

NAMES = ("Anna", "Ben", "Cora", "Dan", "Emma", "Finn", "Gina", "Hugo")
ANIMALS = ("cat", "dog", "horse", "goat", "duck", "rabbit", "sheep", "mouse")
PLACES = ("in the garden", "near the old bridge", "at home", "behind the barn", "on the hill", "by the river")
DEEDS = ("feeds", "washes", "follows", "calls", "draws", "finds")
MOODS = ("happy", "tired", "hungry", "very calm", "a little afraid", "full of joy")
TIMES = ("Then", "After that", "In the evening", "At noon", "Later", "The next day")
WORDS = ("bread", "cloud", "stone", "river", "light", "apple", "chair", "green", "night", "sugar", "train", "world")


@dataclass(frozen=True)
class Example:
    """One instruction with an answer that is right."""

    task: str
    instruction: str
    answer: str


def _count(rng: random.Random) -> tuple[str, str]:
    low = rng.randint(1, 60)
    high = low + rng.randint(4, 22)
    return f"Count from {low} to {high}.", " ".join(map(str, range(low, high + 1)))


def _check_count(instruction: str, answer: str) -> bool:
    low, high = map(int, re.findall(r"\d+", instruction))
    return answer.split() == [str(n) for n in range(low, high + 1)]


def _spell(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return f"Spell the word {word}.", " ".join(word)


def _check_spell(instruction: str, answer: str) -> bool:
    return answer.split() == list(instruction.rstrip(".").split()[-1])


def _climb(rng: random.Random) -> tuple[str, str]:
    size, low = rng.randint(6, 16), rng.randint(1, 40)
    numbers = [low]
    while len(numbers) < size:
        numbers.append(numbers[-1] + rng.randint(1, 3))
    return f"Give {size} rising numbers from {low}, in steps of 1 to 3.", " ".join(map(str, numbers))


def _check_climb(instruction: str, answer: str) -> bool:
    size, low = map(int, re.findall(r"\d+", instruction)[:2])
    if not re.fullmatch(r"\d+( \d+)*", answer):
        return False
    numbers = list(map(int, answer.split()))
    rises = [b - a for a, b in zip(numbers, numbers[1:], strict=False)]
    return len(numbers) == size and numbers[0] == low and all(1 <= rise <= 3 for rise in rises)


def _story(rng: random.Random) -> tuple[str, str]:
    name, animal, size = rng.choice(NAMES), rng.choice(ANIMALS), rng.randint(2, 5)
    deeds, times = rng.sample(DEEDS, size), rng.sample(TIMES, size)
    lines = [f"{name} {deeds[0]} the {animal} {rng.choice(PLACES)}."]
    for deed, time in zip(deeds[1:], times[1:], strict=True):
        if rng.random() < 0.5:
            lines.append(f"{time} {name} {deed} the {animal} {rng.choice(PLACES)}.")
        else:
            lines.append(f"{time} the {animal} is {rng.choice(MOODS)}.")
    return f"Tell a story of {size} sentences about {name} and a {animal}.", " ".join(lines)


def _one_of(words: tuple[str, ...]) -> str:
    return "(?:" + "|".join(words) + ")"


def _check_story(instruction: str, answer: str) -> bool:
    found = re.search(r"of (\d+) sentences about (\w+) and a (\w+)", instruction)
    if found is None:
        return False
    size, name, animal = int(found[1]), found[2], found[3]
    deed = f"{name} {_one_of(DEEDS)} the {animal} {_one_of(PLACES)}"
    line = f"(?:{deed}|the {animal} is {_one_of(MOODS)})"
    lines = re.split(r"(?<=\.) ", answer)
    if len(lines) != size or not re.fullmatch(rf"{deed}\.", lines[0]):
        return False
    openings = [re.match(_one_of(TIMES), text) for text in lines[1:]]
    used = [opening[0] for opening in openings if opening]
    return len(set(used)) == size - 1 and all(
        re.fullmatch(rf"{_one_of(TIMES)} {line}\.", text) for text in lines[1:]
    )


@dataclass(frozen=True)
class Task:
    """A kind of task: how an example is made and how an answer is checked."""

    make: Callable[[random.Random], tuple[str, str]]
    check: Callable[[str, str], bool]


TASKS: dict[str, Task] = {
    "count": Task(_count, _check_count),
    "spell": Task(_spell, _check_spell),
    "climb": Task(_climb, _check_climb),
    "story": Task(_story, _check_story),
}


def make_examples(size: int, seed: int = 0, tasks: tuple[str, ...] = tuple(TASKS)) -> list[Example]:
    """`size` examples, the kinds of task in turn; the same for the same seed."""
    if size < 1:
        raise ConfigError(f"the number of examples must be at least 1, got {size}")
    rng = random.Random(seed)
    return [Example(task, *TASKS[task].make(rng)) for task in (tasks[i % len(tasks)] for i in range(size))]


def is_right(example: Example, answer: str) -> bool:
    """Whether `answer` is a right answer to the example's instruction (not only the one it came with)."""
    return TASKS[example.task].check(example.instruction, answer.strip())


def rule_rows(size: int, seed: int = 0) -> Dataset:
    """Examples as training rows (columns of `dlm.data.rows.FEATURES`)."""
    examples = make_examples(size, seed)
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": example.instruction}] for example in examples],
            "answer": [example.answer for example in examples],
        },
        features=FEATURES,
    )
