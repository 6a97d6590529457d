"""Reward against model calls: particles beside best-of-n and soft best-of-n with as many rows.

    python -m benchmarks.tilted --model full-sft --data alpaca_data.json --sizes 1 4 --minutes 40
    python -m benchmarks.tilted --demo demo/sft --minutes 20

Every line answers the same prompts under the same seeds, in one thread. "drawn" is the expected reward of a
particle drawn by weight (of soft best-of-n, where there is no twist), "best" the greatest of a population
(best-of-n); ± is the standard error over prompts. "gain" is the difference from the line without a twist and
as many rows, prompt by prompt. "calls" are the rows that went through the model for one answer.

With `--model`: prompts of held-out rows, and three rewards by name. With `--demo`, a model of
`make demo`: its held-out instructions, and whether a program finds the answer right.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch

from decoding import Sampler
from decoding.presets import Decoder
from decoding.tilted.particles import TiltedOutput
from decoding.tilted.rewards import Reward, reward_named
from dlm import load_model
from dlm.data.rows import load_rows
from dlm.data.rules import is_right, make_examples
from examples.demo import DECODERS, PROMPT_SEED, STEPS, WINDOW

TWISTS = ("none", "written", "predicted")
NAMED = {"no-repetition=1": 0.02, "regex=^[^.!?]+[.]$": 0.1, "length=12": 0.1}
"""Rewards of answers to Alpaca's questions, each with its β: new words, one whole sentence, a length."""


@dataclass(frozen=True)
class Trial:
    """A model and a reward that it is steered by."""

    name: str
    reward: Reward
    prompts: Sequence[Any]
    how: dict[str, Any]
    beta: float


@dataclass(frozen=True)
class Result:
    """One prompt, answered by one population."""

    drawn: float
    best: float
    calls: int
    seconds: float

    @classmethod
    def of(cls, output: TiltedOutput, seconds: float) -> Result:
        """From the record of a population."""
        drawn = sum(weight * r for weight, r in zip(output.weights, output.rewards, strict=True))
        return cls(drawn, max(output.rewards), output.model_calls, seconds)


def lines(sizes: Sequence[int]) -> list[tuple[int, str]]:
    """Particles and twist of each line; one particle has no use for a twist."""
    return [(size, twist) for size in sizes for twist in TWISTS if size > 1 or twist == "none"]


def run(
    sampler: Sampler, trial: Trial, sizes: Sequence[int], minutes: float
) -> dict[tuple[int, str], list[Result]]:
    """Answer prompts in every way, until the time is over or they are; only whole prompts count."""
    results: dict[tuple[int, str], list[Result]] = {line: [] for line in lines(sizes)}
    end = time.monotonic() + 60 * minutes
    for seed, prompt in enumerate(trial.prompts):
        answered = {}
        for size, twist in results:
            if time.monotonic() > end:
                return results
            begun = time.monotonic()
            tilt: dict[str, Any] = {
                "reward": trial.reward,
                "particles": size,
                "beta": trial.beta,
                "twist": twist,
            }
            output = sampler.generate([prompt], seed=seed, **tilt, **trial.how)[0]
            assert isinstance(output, TiltedOutput)
            answered[size, twist] = Result.of(output, time.monotonic() - begun)
        for line, result in answered.items():
            results[line].append(result)
    return results


def with_error(values: Sequence[float], signed: bool = False) -> str:
    """The mean of values with its standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean(values):{'+' if signed else ''}.3f} ± {error:.3f}"


def table(results: dict[tuple[int, str], list[Result]]) -> None:
    """Print a line for each number of particles and twist."""
    print(
        "| rows | twist | drawn | gain | best | gain | calls | seconds |\n|---|---|---|---|---|---|---|---|"
    )
    for (size, twist), line in results.items():
        plain = results[size, "none"]
        gains = [
            with_error([getattr(a, key) - getattr(b, key) for a, b in zip(line, plain, strict=True)], True)
            for key in ("drawn", "best")
        ]
        cells = [
            str(size),
            twist,
            with_error([result.drawn for result in line]),
            gains[0] if twist != "none" else "",
            with_error([result.best for result in line]),
            gains[1] if twist != "none" else "",
            f"{mean(result.calls for result in line):.0f}",
            f"{mean(result.seconds for result in line):.1f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def of_demo() -> list[Trial]:
    """Checks of answers to the demo's held-out instructions."""
    examples = {e.instruction: e for e in make_examples(1000, seed=PROMPT_SEED, split="test")}

    def right(*, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        return [float(is_right(examples[prompt], text)) for prompt, text in pairs]

    how = {"decoder": Decoder.named("conv", **DECODERS["conv"]), "window": WINDOW, "steps": STEPS}
    no_repetition = reward_named("no-repetition=2")
    return [
        Trial("the answer is right", right, list(examples), how, 0.1),
        Trial("no-repetition=2", no_repetition, list(examples), how, 0.01),
    ]


def of_model(sampler: Sampler, data: str, last: int, max_tokens: int) -> list[Trial]:
    """The rewards of `NAMED`, for prompts of held-out rows."""
    rows = load_rows(data)
    prompts = [rows[i]["prompt"] for i in range(len(rows) - last, len(rows))]
    prompts = [prompt for prompt in prompts if sampler.prompt_length(prompt) <= 64]
    how = {"decoder": "conv", "max_tokens": max_tokens}
    return [Trial(name, reward_named(name), prompts, how, beta) for name, beta in NAMED.items()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", default="")
    parser.add_argument("--data", default="tatsu-lab/alpaca")
    parser.add_argument("--last", type=int, default=1000, help="held-out rows, from the end")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--demo", default="", help="a model of make demo")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16], help="particles")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all tables together")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for path in filter(None, (options.model, options.demo)):
        sampler = Sampler(*load_model(path, "cpu", "float32"))
        trials = (
            of_demo()
            if path == options.demo
            else of_model(sampler, options.data, options.last, options.max_tokens)
        )
        for trial in trials:
            share = len(trials) * len([path for path in (options.model, options.demo) if path])
            results = run(sampler, trial, options.sizes, options.minutes / share)
            count = len(results[options.sizes[0], "none"])
            print(f"\n{path}, {trial.name}: {count} prompts, β = {trial.beta:g}\n")
            if count:
                table(results)


if __name__ == "__main__":
    main()
