"""Tokens per second as `dlm chat` streams them, models in turns.

    python -m benchmarks.chat default full [--rounds 3]

Three questions, one at a time, at most 128 tokens; an answer's end token does not count. A colon and words
behind a name say how: "default:plain" leaves the weights as they are (`dlm.prepacking`), "default:drafts=1"
computes a draft in each call (`Request.drafts`), "default:block_size=4" has smaller blocks, and
"default:plain,drafts=1" is both.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from decoding import Sampler
from dlm import load_model

QUESTIONS = (
    "Explain why the sky is blue.",
    "Write a short story about a lost dog.",
    "Describe the life of a bee.",
)


@dataclass(frozen=True)
class System:
    """A model, and how it is asked."""

    sampler: Sampler
    drafts: int | None

    @classmethod
    def of(cls, name: str, device: str) -> System:
        """Load what a name stands for."""
        model, _, words = name.partition(":")
        plain, drafts, block_size = False, None, None
        for word in filter(None, words.split(",")):
            option, _, value = word.partition("=")
            if option == "drafts":
                drafts = int(value)
            elif option == "block_size":
                block_size = int(value)
            elif word == "plain":
                plain = True
            else:
                raise SystemExit(
                    f"{name}: the words are plain, drafts=NUMBER and block_size=NUMBER, got {word!r}"
                )
        return cls(Sampler(*load_model(model, device, prepacked=not plain, block_size=block_size)), drafts)


def speed(system: System, longest: int = 128) -> float:
    """Tokens per second over the questions."""
    sampler = system.sampler
    begun, count = time.perf_counter(), 0
    others = {*sampler.spec.end_token_ids, sampler.spec.mask_token_id}
    for question in QUESTIONS:
        *_, last = sampler.stream(question, max_tokens=longest, drafts=system.drafts)
        count += sum(token not in others for token in last.token_ids)
    return count / (time.perf_counter() - begun)


def main() -> None:
    """Print the speed of each model in each round, and against the last one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    systems = {name: System.of(name, options.device) for name in options.models}
    for system in systems.values():
        speed(system, 16)
    rounds = [{name: speed(system) for name, system in systems.items()} for _ in range(options.rounds)]
    for name in systems:
        speeds = [each[name] for each in rounds]
        ratio = sum(speeds) / sum(each[options.models[-1]] for each in rounds)
        print(f"{name}: {', '.join(f'{x:.1f}' for x in speeds)} tokens/s, {ratio:.2f} × {options.models[-1]}")


if __name__ == "__main__":
    main()
