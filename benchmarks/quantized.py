"""What weights in 8 and 4 bits save and cost: bytes, held-out likelihood, and time of a forward pass.

    python -m benchmarks.quantized --data alpaca_data.json [--model default] [--rows 60] [--draws 4]

Rows are the last of the file, which the default model was not trained on. All types see the same noise, so
that differences of the NELBO (nats per token, with its 95 % interval over rows) are those of the weights.
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

DTYPES = ("float32", "bfloat16", "int8", "nf4")
SHAPES = ((1, 1), (1, 32), (1, 256), (8, 128))
"""Rows and tokens of the timed passes: a step with exact keys and values, a block, a canvas, a batch."""


@dataclass(frozen=True)
class Figures:
    """Measurements of a model under one type."""

    size: int
    """Bytes of its weights."""
    nats: torch.Tensor
    """[R] nats per token of each row."""
    milliseconds: list[float]
    """Of the fastest pass for each of `SHAPES`, head included."""


def main() -> None:
    """Print a table, one line for each type."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--data", default="tatsu-lab/alpaca")
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rows} rows")
    shapes = "".join(f"{f'{rows}x{tokens}':>9}" for rows, tokens in SHAPES)
    print(f"{'':10}{'MB':>8}{'nats':>8}{'more':>17}{shapes}  (ms)")
    first = None
    for dtype in options.dtypes:
        figures = measure(options, dtype)
        first = figures.nats if first is None else first
        more = estimate((figures.nats - first).tolist())
        times = "".join(f"{ms:9.1f}" for ms in figures.milliseconds)
        difference = f"{more.mean:+.4f} ± {more.high - more.mean:.4f}"
        size = f"{figures.size / 1e6:8.1f}"
        print(f"{dtype:10}{size}{figures.nats.mean():8.4f}{difference:>17}{times}", flush=True)


def measure(options: argparse.Namespace, dtype: str) -> Figures:
    """The figures of one type."""
    model, tokenizer = load_model(options.model, options.device, dtype)
    rows = held_out(options, tokenizer)
    nats = nelbo(model, rows, options.draws)
    per_token = [x / len(answer) for x, (_, answer) in zip(nats, rows, strict=True)]
    passes = [milliseconds(model, *shape) for shape in SHAPES]
    return Figures(weight_bytes(model), torch.tensor(per_token, dtype=torch.float64), passes)


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
def milliseconds(model: Any, rows: int, tokens: int, seconds: float = 2.0) -> float:
    """Time of the fastest pass within some seconds, three at least."""
    ids = torch.full((rows, tokens), model.config.mask_token_id)
    best, begin, passes = float("inf"), time.perf_counter(), 0
    while passes < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        model.logits(model.hidden(ids)).sum().item()  # waits for the device
        best, passes = min(best, time.perf_counter() - start), passes + 1
    return best * 1e3


if __name__ == "__main__":
    main()
