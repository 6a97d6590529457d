"""Milliseconds that a denoising step spends outside the model, and in how many operations of the host.

The model costs nothing: its states and logits are there already. What is left is what an accelerator waits
for: window, clock, caches, noise, reveal rule, writing, which always are on the host; and the token rule,
which an accelerator computes. Times are of the processor, so that other programs disturb them little. Rows
begin with so many masks.

    python -m benchmarks.overhead [--steps 40] [--rounds 3] [--vocabulary 512] [--rows 1 64] [--masks 64 512]
    python -m benchmarks.overhead --profile 25      # where the time goes, by function
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decoding.canvas import Row
from decoding.engine import Engine
from decoding.presets import Decoder
from decoding.request import Request
from decoding.tokens import TokenRule
from dlm.spec import ModelSpec

T = TypeVar("T")

DECODERS = ("conv", "top-k", "entropy-bound", "conv, growing", "entropy-bound, growing")
PROMPT, EOS = 40, 2


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One more."""
        self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Stopwatch:
    """Seconds spent in some calls."""

    seconds: float = 0.0

    def timed(self, call: Callable[..., T]) -> Callable[..., T]:
        """The call, clocked."""

        def clocked(*args: Any, **kwargs: Any) -> T:
            begun = time.process_time()
            out = call(*args, **kwargs)
            self.seconds += time.process_time() - begun
            return out

        return clocked


class FreeModel:
    """A model whose states and logits were made beforehand.

    Args:
        vocabulary: V.
    """

    capabilities = frozenset({"packed"})

    def __init__(self, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = 3 * torch.randn(
            1024, vocabulary, generator=generator
        )  # of all that is asked for at once
        self.table[:, EOS] = self.table[:, -1] = -torch.inf
        self.states = torch.zeros(64 * 1024, 1)
        self.spec = ModelSpec(mask_token_id=vocabulary - 1, eos_token_id=EOS)

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """[B, L] -> [B, L, 1]."""
        del attention_mask
        return self.states[: input_ids.numel()].view(*input_ids.shape, 1)

    def packed_hidden(self, input_ids: torch.Tensor, lengths: Any) -> torch.Tensor:
        """[N] -> [N, 1]."""
        del lengths
        return self.states[: len(input_ids)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, 1] -> [N, V]."""
        return self.table[: len(hidden)]


def request(name: str, masks: int) -> Request:
    """The request for a row of so many masks."""
    name, _, growing = name.partition(", ")
    if not growing:
        return Request(decoder=Decoder.named(name), window=PROMPT + masks, steps=64)
    if name == "conv":
        return Request(decoder=Decoder.named(name), max_tokens=masks, rate=4.0)
    return Request(decoder=Decoder.named(name, kernel_size=9), max_tokens=masks)


def engine_of(model: FreeModel, name: str, rows: int, masks: int) -> Engine:
    """An engine with rows of one plan."""
    plan = request(name, masks).resolve(model)
    row = Row([*range(10, 10 + PROMPT), *[plan.mask_id] * masks], PROMPT)
    tokenizer: Any = None  # no text is made
    engine = Engine(model, tokenizer)
    for seed in range(rows):
        engine.submit(row, plan, seed)
    return engine


def clocked(model: FreeModel, name: str, rows: int, masks: int, steps: int) -> tuple[float, float]:
    """Milliseconds of a step, of the first `steps`, on the host and in the token rule."""
    rule, engine = Stopwatch(), engine_of(model, name, rows, masks)
    choose, certainty = TokenRule.choose, TokenRule.certainty
    TokenRule.choose = rule.timed(choose)  # type: ignore[method-assign]
    TokenRule.certainty = rule.timed(certainty)  # type: ignore[method-assign]
    try:
        begun, taken = time.process_time(), 0
        while len(engine) and taken < steps:
            engine.step()
            taken += 1
        total = time.process_time() - begun
    finally:
        TokenRule.choose, TokenRule.certainty = choose, certainty  # type: ignore[method-assign]
    return 1000 * (total - rule.seconds) / taken, 1000 * rule.seconds / taken


def operations(model: FreeModel, name: str, rows: int, masks: int) -> int:
    """Operations of the fourth step."""
    engine = engine_of(model, name, rows, masks)
    for _ in range(3):
        engine.step()
    mode = Operations()
    with mode:
        engine.step()
    return mode.count


def table(model: FreeModel, cases: list[tuple[str, int, int]], steps: int, rounds: int) -> str:
    """A line for each case: the least of the rounds, in each of which all are measured in turn."""
    took: dict[tuple[str, int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case in cases:
            took[case].append(clocked(model, *case, steps if number else 3))
    lines = ["| decoder | rows | masks | host, ms | token rule, ms | operations |", "|---" * 6 + "|"]
    for (name, rows, masks), each in took.items():
        host, rule = (min(x) for x in zip(*each[1:], strict=True))
        count = operations(model, name, rows, masks)
        lines.append(f"| {name} | {rows} | {masks} | {host:.2f} | {rule:.2f} | {count} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--masks", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--decoders", nargs="+", default=list(DECODERS))
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="functions to list")
    options = parser.parse_args()
    model = FreeModel(options.vocabulary)
    cases = list(product(options.decoders, options.rows, options.masks))
    if not options.profile:
        print(f"a step outside the model, V = {options.vocabulary:,}, {torch.get_num_threads()} threads\n")
        print(table(model, cases, options.steps, options.rounds))
        return
    profiler = cProfile.Profile()
    for case in cases:
        profiler.runcall(clocked, model, *case, options.steps)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(options.profile)


if __name__ == "__main__":
    main()
