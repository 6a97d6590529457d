"""Weights in 8 and 4 bits: bytes, held-out likelihood, and time of a forward pass.

    python -m benchmarks.quantized --data alpaca_data.json [--model full] [--rows 40] [--draws 4]

Rows are the last of the file, on which the models that come along were not trained. All types see the same
noise, so that differences of the NELBO (nats per token, with its 95 % interval over rows) are those of the
weights.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch

from dlm.checkpoint import load_model
from dlm.data.rows import load_rows
from dlm.quantization import weight_bytes
from dlm.tokenizer import encode_prompt, encode_text
from eval.nelbo import PromptAndAnswer, nelbo
from eval.statistics import estimate

DTYPES = ("bfloat16", "int8", "nf4")
SHAPES = ((1, 1), (1, 32), (1, 256), (8, 128))
"""Rows and tokens of the timed passes: a step with exact keys and values, a block, a canvas, a batch."""


@dataclass(frozen=True)
class Measured:
    """A model under one type."""

    dtype: str
    model: Any
    size: int
    """Bytes of its weights, on a CPU as they are after a pass."""
    nats: list[float]
    """Nats per token of each row."""


def main() -> None:
    """Print a table, one line for each type."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="full")
    parser.add_argument("--data", default="tatsu-lab/alpaca")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rows} rows")
    measured = [measure(options, dtype) for dtype in options.dtypes]
    times = fastest([each.model for each in measured])
    shapes = "".join(f"{f'{rows}x{tokens}':>9}" for rows, tokens in SHAPES)
    print(f"{'':10}{'MB':>8}{'nats':>8}{'more':>17}{shapes}  (ms)")
    for each, milliseconds in zip(measured, times, strict=True):
        more = estimate([a - b for a, b in zip(each.nats, measured[0].nats, strict=True)])
        difference = f"{more.mean:+.4f} ± {more.high - more.mean:.4f}"
        mean = sum(each.nats) / len(each.nats)
        passes = "".join(f"{ms:9.1f}" for ms in milliseconds)
        print(f"{each.dtype:10}{each.size / 1e6:8.1f}{mean:8.4f}{difference:>17}{passes}")


def measure(options: argparse.Namespace, dtype: str) -> Measured:
    """A model under a type, its bytes and likelihoods."""
    model, tokenizer = load_model(options.model, options.device, dtype)
    rows = held_out(options, tokenizer)
    nats = nelbo(model, rows, options.draws)
    per_token = [x / len(answer) for x, (_, answer) in zip(nats, rows, strict=True)]
    return Measured(dtype, model, weight_bytes(model), per_token)


def held_out(options: argparse.Namespace, tokenizer: Any) -> list[PromptAndAnswer]:
    """The last rows of the file, of at most 256 tokens."""
    rows = load_rows(options.data)
    out: list[PromptAndAnswer] = []
    for i in reversed(range(len(rows))):
        answer = [*encode_text(tokenizer, rows[i]["answer"]), tokenizer.eos_token_id]
        prompt = encode_prompt(tokenizer, rows[i]["prompt"])
        if len(prompt) + len(answer) <= 256:
            out.append((prompt, answer))
        if len(out) == options.rows:
            break
    return out


@torch.inference_mode()
def fastest(models: list[Any], rounds: int = 5) -> list[list[float]]:
    """Milliseconds of each model's fastest pass for each of `SHAPES`, head included; models take turns."""
    times = [[float("inf")] * len(SHAPES) for _ in models]
    for _ in range(rounds):
        for column, shape in enumerate(SHAPES):
            for model, best in zip(models, times, strict=True):
                ids = torch.full(shape, model.config.mask_token_id)
                start = time.perf_counter()
                model.logits(model.hidden(ids)).sum().item()  # waits for the device
                best[column] = min(best[column], 1e3 * (time.perf_counter() - start))
    return times


if __name__ == "__main__":
    main()
