"""Rows of different lengths, and rows in company.

First, positions per second of the forward pass, a backbone of SmolLM2-135M's shape: rows of 40 to 300
tokens packed end to end, against as many positions in rows of equal length (nothing to pack) and against
padded rows. Then answers decoded by the batch engine, 16 rows at a time, against one row at a time: answers
per second, and the share of rows whose text differs (on a fake model none may; on a real one sums are taken
in another order).

    python -m benchmarks.batching [--rounds 3] [--model DIR --file PROMPTS]
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch

from benchmarks.models import smollm2
from decoding.denoiser import hidden_of_rows
from decoding.sampler import Sampler
from dlm.checkpoint import DTYPES, load_model
from dlm.data.prompts import read_prompts
from eval.bench import now

LENGTHS = [40, 300, 75, 220, 130, 60, 180, 95]


class Padded:
    """A model that cannot pack."""

    def __init__(self, model: Any) -> None:
        self.hidden = model.hidden


def throughput(model: Any, rounds: int) -> dict[str, float]:
    """Median positions per second, padding not counted."""
    total = sum(LENGTHS)
    equal = [total // len(LENGTHS)] * len(LENGTHS)
    ids = torch.randint(5, 49_000, (total,), device=model.device)
    ways: dict[str, tuple[Any, list[int]]] = {
        "equal lengths": (model, equal),
        "different lengths, packed": (model, LENGTHS),
        "different lengths, padded": (Padded(model), LENGTHS),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, (how, lengths) in ways.items():
            begun = now(model.device)
            with torch.inference_mode():
                hidden_of_rows(how, ids[: sum(lengths)], lengths)
            speeds[name].append(sum(lengths) / (now(model.device) - begun))
    return {name: median(each[1:]) for name, each in speeds.items()}


def company(path: str, file: str, limit: int, device: str, dtype: str) -> None:
    """Answer prompts alone and 16 at a time."""
    sampler = Sampler(*load_model(path, device, dtype))
    prompts = [p for _, p in zip(range(limit), read_prompts(file), strict=False)]
    texts, speeds = [], []
    for size in (1, 16):
        begun = now(device)
        outs = sampler.generate(prompts, batch_size=size, max_tokens=128)
        speeds.append(len(outs) / (now(device) - begun))
        texts.append([out.token_ids for out in outs])
    differing = sum(a != b for a, b in zip(*texts, strict=True))
    print(
        f"{len(prompts)} answers, length-free at rate 2: {speeds[0]:.2f} answers/s one by one, "
        f"{speeds[1]:.2f} sixteen at a time ({speeds[1] / speeds[0]:.2f} x); "
        f"{differing} of {len(prompts)} texts differ"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="")
    parser.add_argument("--file", default="")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    speeds = throughput(smollm2(options.device, DTYPES[options.dtype]), options.rounds)
    print(f"positions per second, 135M parameters, {options.dtype}, {options.device}")
    for name, speed in speeds.items():
        print(f"  {name:<28}{speed:8.0f}   {speed / speeds['equal lengths']:.2f} x equal lengths")
    if options.model:
        company(options.model, options.file, options.limit, options.device, options.dtype)


if __name__ == "__main__":
    main()
