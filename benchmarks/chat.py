"""Tokens per second as `dlm chat` streams them, models in turns.

    python -m benchmarks.chat default full [--rounds 3]

Three questions, one at a time, at most 128 tokens; an answer's end token does not count.
"""

from __future__ import annotations

import argparse
import time

from decoding import Sampler
from dlm import load_model

QUESTIONS = (
    "Explain why the sky is blue.",
    "Write a short story about a lost dog.",
    "Describe the life of a bee.",
)


def speed(sampler: Sampler, longest: int = 128) -> float:
    """Tokens per second over the questions."""
    begun, count = time.perf_counter(), 0
    others = {*sampler.spec.end_token_ids, sampler.spec.mask_token_id}
    for question in QUESTIONS:
        *_, last = sampler.stream(question, max_tokens=longest)
        count += sum(token not in others for token in last.token_ids)
    return count / (time.perf_counter() - begun)


def main() -> None:
    """Print the speed of each model in each round, and against the last one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    samplers = {name: Sampler(*load_model(name, options.device)) for name in options.models}
    for sampler in samplers.values():
        speed(sampler, 16)
    rounds = [{name: speed(sampler) for name, sampler in samplers.items()} for _ in range(options.rounds)]
    for name in samplers:
        speeds = [each[name] for each in rounds]
        ratio = sum(speeds) / sum(each[options.models[-1]] for each in rounds)
        print(f"{name}: {', '.join(f'{x:.1f}' for x in speeds)} tokens/s, {ratio:.2f} × {options.models[-1]}")


if __name__ == "__main__":
    main()
