"""Accuracy under parallelism: tasks whose tokens depend on each other, and one number for accuracy and speed.

A model that writes one token a call solves what it can solve; the question is what is left when it writes
several. The tasks are of the kind of ParallelBench (arXiv 2510.04767): made by rule, checked by a program,
from `copy`, whose tokens do not depend on each other given the question, to `shuffle` and `latin`, where any
token may come first and every other must fit it.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dlm.data.rules import WORDS

TOLERANCE = 5.0
"""Percentage points below the accuracy of the slowest point down to which faster points count."""


@dataclass(frozen=True)
class ParallelTask:
    """A kind of task: its making, and the check of an answer against the reference.

    Attributes:
        make: gives an instruction and a right answer.
        check: instruction, reference and answer (words) -> whether the answer is right.
    """

    make: Callable[[random.Random], tuple[str, str]]
    check: Callable[[str, list[str], list[str]], bool]


def _words(rng: random.Random, count: int = 6) -> list[str]:
    return rng.sample(WORDS, count)


def _same(instruction: str, reference: list[str], answer: list[str]) -> bool:
    del instruction
    return answer == reference


def _copy(rng: random.Random) -> tuple[str, str]:
    words = _words(rng)
    return f"Copy these words: {' '.join(words)}", " ".join(words)


def _reverse(rng: random.Random) -> tuple[str, str]:
    words = _words(rng)
    return f"Write these words in reverse order: {' '.join(words)}", " ".join(reversed(words))


def _sort(rng: random.Random) -> tuple[str, str]:
    words = _words(rng)
    return f"Sort these words from A to Z: {' '.join(words)}", " ".join(sorted(words))


def _insert(rng: random.Random) -> tuple[str, str]:
    *words, new = _words(rng, 7)
    place = rng.randrange(1, len(words))
    instruction = f"Insert the word {new} after the word {words[place - 1]}: {' '.join(words)}"
    return instruction, " ".join([*words[:place], new, *words[place:]])


def _shuffle(rng: random.Random) -> tuple[str, str]:
    words = _words(rng)
    mixed = rng.sample(words, len(words))
    while mixed == words:
        mixed = rng.sample(words, len(words))
    return f"Write these words in another order: {' '.join(words)}", " ".join(mixed)


def _is_shuffled(instruction: str, reference: list[str], answer: list[str]) -> bool:
    original = instruction.split(": ")[1].split()
    return sorted(answer) == sorted(reference) and answer != original


def _sentence(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 3)
    text = f"The {words[0]} and the {words[1]} are near the {words[2]}."
    return f"Write one sentence with the words {', '.join(words)}.", text


def _is_sentence(instruction: str, reference: list[str], answer: list[str]) -> bool:
    """One sentence with each of the words once, and no word twice in a row."""
    del reference
    required = re.findall(r"\w+", instruction.split("words ")[1].lower())
    text = " ".join(answer)
    words = re.findall(r"\w+", text.lower())
    one = re.fullmatch(r"[A-Z][^.!?]*[.!?]", text) is not None
    stutters = any(a == b for a, b in itertools.pairwise(words))
    return one and not stutters and all(words.count(word) == 1 for word in required)


def _latin(rng: random.Random) -> tuple[str, str]:
    rows, columns = rng.sample(range(4), 4), rng.sample(range(4), 4)
    symbols = rng.sample("ABCD", 4)
    square = [" ".join(symbols[(row + column) % 4] for column in columns) for row in rows]
    return "Write a Latin square of the letters A, B, C and D: four lines of four letters.", "\n".join(square)


def _is_latin(instruction: str, reference: list[str], answer: list[str]) -> bool:
    """Four rows of four letters, however they are spaced, each letter once in every row and column."""
    del instruction, reference
    letters = re.sub(r"[\s,|]", "", "".join(answer))
    if len(letters) != 16:
        return False
    lines = [letters[i : i + 4] for i in range(0, 16, 4)] + [letters[i::4] for i in range(4)]
    return all(sorted(line) == ["A", "B", "C", "D"] for line in lines)


PARALLEL_TASKS: dict[str, ParallelTask] = {
    "copy": ParallelTask(_copy, _same),
    "reverse": ParallelTask(_reverse, _same),
    "insert": ParallelTask(_insert, _same),
    "sort": ParallelTask(_sort, _same),
    "shuffle": ParallelTask(_shuffle, _is_shuffled),
    "sentence": ParallelTask(_sentence, _is_sentence),
    "latin": ParallelTask(_latin, _is_latin),
}
"""By name, the least dependent first."""


def examples(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Task, instruction and a right answer, the kinds in turn; the same for the same seed."""
    rng, names = random.Random(seed), list(PARALLEL_TASKS)
    return [(name, *PARALLEL_TASKS[name].make(rng)) for name in (names[i % len(names)] for i in range(count))]


def solves(task: str, instruction: str, reference: str, answer: str) -> bool:
    """True when an answer is right, be it the reference or another."""
    return PARALLEL_TASKS[task].check(instruction, reference.split(), answer.split())


@dataclass(frozen=True)
class Point:
    """One pace of a decoder.

    Attributes:
        tokens_per_call: ρ.
        accuracy: y, in percent.
    """

    tokens_per_call: float
    accuracy: float


def accuracy_under_parallelism(
    points: Sequence[Point], best: float | None = None, alpha: float = 3.0
) -> float:
    """AUP, the area under accuracy over tokens per call (d3LLM).

    With the points in order of ρ, those with y_i ≥ y_1 - 5 alone,

        AUP = ρ_1 y_1 + ½ Σ_i (ρ_i - ρ_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})),
        W(y) = min(exp(-α (1 - y / y_max)), 1)

    Args:
        points: of one decoder; the slowest is the first.
        best: y_max, the best accuracy of all that are compared; by default of these points.
        alpha: α, how hard a loss of accuracy weighs.

    Returns:
        0 where the best accuracy is 0.

    Raises:
        ValueError: without points.
    """
    ordered = sorted(points, key=lambda point: (point.tokens_per_call, -point.accuracy))
    if not ordered:
        raise ValueError("the area under no points is not defined")
    first = ordered[0]
    counted = [point for point in ordered if point.accuracy >= first.accuracy - TOLERANCE]
    top = max(point.accuracy for point in counted) if best is None else best
    if top <= 0:
        return 0.0

    def weighted(point: Point) -> float:
        return point.accuracy * min(math.exp(-alpha * (1 - point.accuracy / top)), 1.0)

    area = first.tokens_per_call * first.accuracy
    for lower, upper in itertools.pairwise(counted):
        area += (upper.tokens_per_call - lower.tokens_per_call) * (weighted(upper) + weighted(lower)) / 2
    return area
