"""Likelihoods of choices in lm-evaluation-harness: how often an estimate has the winner of the exact bound.

    python -m benchmarks.likelihood [--model full] [--questions 50] [--seed 0]

Sums and differences of one digit, each with four digits to choose from: as one token ("7") and as two ("7.").
The NELBO is exact where no more maskings exist than draws: one for one token, three for two. Printed for each
way: the share of questions whose likeliest choice is that of the exact NELBO, and the share of right ones.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from typing import Any

from eval.lm_harness import DLM

WAYS: dict[str, dict[str, Any]] = {
    "exact": {"draws": 3},
    "draws=2": {"draws": 2},
    "likelihood=path": {"likelihood": "path", "decoder": "conv"},
}


@dataclass(frozen=True)
class Choice:
    """A question with four answers."""

    question: str
    answers: tuple[str, ...]
    right: int


def choices(count: int, seed: int) -> list[Choice]:
    """Questions whose answers are single digits."""
    draw = random.Random(seed)
    out: list[Choice] = []
    while len(out) < count:
        a, b, sign = draw.randint(1, 9), draw.randint(1, 9), draw.choice("+-")
        value = a + b if sign == "+" else a - b
        if not 0 <= value <= 9:
            continue
        others = draw.sample([digit for digit in range(10) if digit != value], 3)
        answers = [value, *others]
        draw.shuffle(answers)
        out.append(Choice(f"What is {a} {sign} {b}?", tuple(map(str, answers)), answers.index(value)))
    return out


def winners(model: DLM, asked: list[Choice], ending: str) -> list[int]:
    """Place of the likeliest answer to each question."""
    from lm_eval.api.instance import Instance

    pairs = [(choice.question, f" {answer}{ending}") for choice in asked for answer in choice.answers]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    nats = [value for value, _ in model.loglikelihood(requests)]
    groups = [nats[i : i + 4] for i in range(0, len(nats), 4)]
    return [max(range(4), key=group.__getitem__) for group in groups]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", default="full")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    asked = choices(options.questions, options.seed)
    print(f"{len(asked)} questions of four choices, {options.model}\n")
    print("| choices | way | exact winner wins | right |\n|---|---|---|---|")
    models = {name: DLM(options.model, device="cpu", **given) for name, given in WAYS.items()}
    for words, ending in (("one token", ""), ("two tokens", ".")):
        exact = winners(models["exact"], asked, ending)
        for name, model in models.items():
            chosen = exact if name == "exact" else winners(model, asked, ending)
            same = sum(a == b for a, b in zip(chosen, exact, strict=True)) / len(asked)
            right = sum(a == b.right for a, b in zip(chosen, asked, strict=True)) / len(asked)
            print(f"| {words} | {name} | {100 * same:.0f} % | {100 * right:.0f} % |", flush=True)


if __name__ == "__main__":
    main()
