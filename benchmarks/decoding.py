"""Decoding speed against the loop of the published code and against autoregressive decoding.

A model of SmolLM2-135M's shape with random weights answers prompts of 40 tokens with 60 tokens, about the
mean Alpaca answer; L = 512, S = 64, K = 129, k = 20. All ways are measured in turn in one run; medians and
ratios of tokens per second are printed. "exact" ways follow the law of the plain loop; the others say what
they approximate.

    python -m benchmarks.decoding [--rounds 3] [--rows 1] [--dtype float32] [--answer 60] [--padding]
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.models import EOS, MASK, VOCAB, Ending, smollm2
from dlm.checkpoint import DTYPES
from eval.bench import Problem, as_causal, bench_table, standard_ways, time_ways

PROMPT = 40


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--answer", type=int, default=60, help="tokens of an answer")
    parser.add_argument("--padding", action="store_true", help="every position behind the end is an end too")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = smollm2(options.device, DTYPES[options.dtype])
    causal = as_causal(model)
    ending = Ending(model, PROMPT + options.answer, options.padding)
    prompts = torch.randint(5, VOCAB - 5, (options.rows, PROMPT), device=options.device)
    problem = Problem(ending, prompts, MASK, EOS, options.window, options.steps)
    runs = time_ways(standard_ways(problem, causal, options.answer), options.rounds, options.device)
    print(
        f"{options.rows} answers of {options.answer} tokens behind prompts of {PROMPT}, 135M parameters, "
        f"{options.dtype}, {torch.get_num_threads()} threads, {options.device}"
        f"{', the end token everywhere behind' if options.padding else ''}\n"
    )
    first = next(iter(runs))
    print(bench_table(runs, [first, "autoregressive, cache"]))


if __name__ == "__main__":
    main()
