"""Open lengths in infilling: how often the model finds the length of a gap, on sentences it has not seen.

    python -m benchmarks.gaps --data alpaca_data.json --model full --limit 200

From each held-out answer one sentence is taken, one to five tokens that are whole words are cut out, and
`<mask:1-5>` is filled, with the row's prompt and without.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

from tqdm import tqdm

from decoding import Sampler
from dlm import load_model
from dlm.data.rows import load_rows

MOST = 5


@dataclass(frozen=True)
class Sentence:
    """A sentence with a gap."""

    prompt: list[dict[str, str]]
    before: str
    gap: str
    behind: str
    tokens: int
    """Tokens of the gap, the space before it included."""


def sentences(rows: Any, sampler: Sampler, seed: int = 0) -> Iterator[Sentence]:
    """One from each row that has one of 8 to 30 words; gaps of 1 to `MOST` tokens, equally often."""
    draw = random.Random(seed)
    for row in rows:
        whole = [
            s
            for s in re.split(r"(?<=[.!?])\s+", row["answer"])
            if 8 <= len(s.split()) <= 30 and "\n" not in s
        ]
        if not whole:
            continue
        words = whole[0].split(" ")
        size = draw.randint(1, MOST)
        first = draw.randrange(2, len(words) - 2)
        for last in range(first + 1, len(words) - 1):
            gap = " ".join(words[first:last])
            tokens = len(sampler.rows.text(" " + gap))
            if tokens >= size:
                if tokens == size:
                    before, behind = " ".join(words[:first]) + " ", " " + " ".join(words[last:])
                    yield Sentence(row["prompt"], before, gap, behind, tokens)
                break


def measure(sampler: Sampler, chosen: list[Sentence], prompted: bool) -> str:
    """A line of the table."""
    lengths, right = [], []
    for one in tqdm(chosen, unit="sentence", leave=False):
        text = f"{one.before}<mask:1-{MOST}>{one.behind}"
        out = sampler.infill(text, prompt=one.prompt if prompted else None)
        written = sum(step >= 0 for step in out.reveal_step)
        lengths.append(written - one.tokens)
        right.append(" ".join(out.gaps).strip() == one.gap)
    cells = [
        "with the prompt" if prompted else "alone",
        f"{100 * mean(x == 0 for x in lengths):.0f} %",
        f"{100 * mean(abs(x) <= 1 for x in lengths):.0f} %",
        f"{mean(lengths):+.2f}",
        f"{100 * mean(right):.0f} %",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data", default="tatsu-lab/alpaca")
    parser.add_argument("--model", default="full")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--last", type=int, default=1000, help="held-out rows, from the end")
    options = parser.parse_args()
    sampler = Sampler(*load_model(options.model))
    rows = load_rows(options.data)
    held_out = rows.select(range(len(rows) - options.last, len(rows)))
    chosen = [s for s, _ in zip(sentences(held_out, sampler), range(options.limit), strict=False)]
    print(f"{len(chosen)} sentences, gaps of 1 to {MOST} tokens, {options.model}\n")
    print("| | right length | within one | bias, tokens | right text |\n|---|---|---|---|---|")
    for prompted in (False, True):
        print(measure(sampler, chosen, prompted), flush=True)


if __name__ == "__main__":
    main()
