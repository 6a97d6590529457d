"""Stage `decode`: tokens per second of the default model's shape and of LLaDA-8B's, with random weights.

A random model almost never ends an answer, so every answer has all its tokens, whatever the decoder. Compared
are ours at several paces and options, the loop of the published code, and `generate` of transformers on the
same backbone made causal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.gpu.baselines import Timed, as_causal, autoregressive, published
from benchmarks.gpu.context import Context, ceilings, free
from benchmarks.gpu.material import LLADA_8B, MINIATURE, SMOLLM2, shaped
from decoding import Sampler
from dlm.graphs import BucketedModel

ANSWER = 64
"""Tokens of an answer."""

ASKED = (
    "Give three tips for staying healthy.",
    "Describe the structure of an atom, with all its parts, and say which of them makes it an element.",
    "Write a short story in third person narration about somebody who has to make an important decision.",
    "What is the capital of France?",
)


@dataclass(frozen=True)
class Way:
    """A way to write answers.

    Attributes:
        name: in the report.
        rows: answers at a time.
        how: arguments of `Sampler.generate`; None for a baseline of that name.
        accelerate: "", "graphs" or "compile".
        seconds: that it may take, with warm-up.
        mixed: prompts of several lengths, four times as many as rows.
        timed: with the time in the model apart, for the shares of sampling and of the roofline.
    """

    name: str
    rows: int
    how: dict[str, Any] | None = field(default_factory=dict)
    accelerate: str = ""
    seconds: float = 8.0
    mixed: bool = False
    timed: bool = False


RATE_4, RATE_1 = {"decoder": "conv", "rate": 4.0}, {"decoder": "conv", "rate": 1.0}
REUSED = {"decoder": "conv", "rate": 4.0, "reuse": "dual"}
PACED = {"decoder": "conv", "window": 128, "steps": 32}


def ways(large: bool) -> Iterator[Way]:
    """All measurements, the most important first; for a large model fewer."""
    yield Way("autoregressive", 1, None)
    yield Way("rate 4", 1, RATE_4, timed=True)
    yield Way("rate 4, graphs", 1, RATE_4, "graphs")
    yield Way("rate 4, reuse", 1, REUSED)
    yield Way("autoregressive", 64, None)
    yield Way("rate 4", 64, RATE_4, timed=True)
    yield Way("published loop, L=512, S=64", 1, None)
    yield Way("rate 1", 1, RATE_1)
    yield Way("rate 4, graphs", 64, RATE_4, "graphs")
    yield Way("rate 4, reuse", 64, REUSED)
    yield Way("entropy bound", 1, {"decoder": "entropy-bound", "options": {"kernel_size": 9}})
    if not large:
        yield Way("published loop, L=512, S=64", 64, None, seconds=25)
    for rows in (8,) if large else (8, 256):
        yield Way("autoregressive", rows, None)
        yield Way("rate 4", rows, RATE_4, timed=True)
        yield Way("rate 1", rows, RATE_1)
    yield Way("window 128, 32 steps", 64, PACED)
    yield Way("rate 4, mixed lengths", 64, RATE_4, mixed=True, seconds=15)
    yield Way("rate 4, compiled", 1, RATE_4, "compile", seconds=60)
    yield Way("autoregressive, static cache", 1, None)
    yield Way("autoregressive, static cache, compiled", 1, None, seconds=60)
    yield Way("rate 4, compiled", 64, RATE_4, "compile", seconds=60)


def run(context: Context) -> None:
    """The default model's shape, then the large one, then what is left of the first."""
    if context.tiny:
        measure_all(
            context,
            "tiny",
            {**MINIATURE, "vocab_size": SMOLLM2["vocab_size"]},
            list(ways(False))[:8],
            context.until,
        )
        return
    first = time.monotonic() + context.left * 0.6
    measure_all(context, "135M", SMOLLM2, list(ways(False)), first)
    if context.cuda:
        measure_all(context, "8B", LLADA_8B, list(ways(True)), context.until)
        measure_all(context, "135M", SMOLLM2, list(ways(False)), context.until)
    goals(context, "135M")


def measure_all(context: Context, label: str, shape: dict[str, Any], chosen: list[Way], until: float) -> None:
    """Measure one model; each way that is not measured yet and fits into the time."""
    due = [way for way in chosen if not context.done("decode", title(label, way))]
    if not due or until - time.monotonic() < 8:
        return
    dtype = torch.bfloat16 if context.cuda else torch.float32
    subject = Subject(context, shaped(context.device, dtype, **shape), label)
    for way in due:
        if until - time.monotonic() > (1 if context.tiny else way.seconds):
            try:
                measure(context, subject, way)
            except Exception as error:
                context.report.add(
                    "failures", title(label, way), error=f"{type(error).__name__}: {error}"[:300]
                )
            free(context.device)
    del subject
    free(context.device)


def title(label: str, way: Way) -> str:
    """Of a measurement, in the report."""
    return f"{label}, batch {way.rows}: {way.name}"


class Subject:
    """A model, and what is made of it when it is first wanted."""

    def __init__(self, context: Context, model: Any, label: str) -> None:
        self.context, self.model, self.label = context, model, label
        self.tokens = 8 if context.tiny else ANSWER
        tokenizer = Path(__file__).resolve().parents[2] / "dlm" / "pretrained" / "sft"
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self._causal: Any = None

    @property
    def causal(self) -> Any:
        """The same backbone, autoregressive."""
        if self._causal is None:
            self._causal = as_causal(self.model)
        return self._causal

    def prompts(self, rows: int, width: int = 40) -> torch.Tensor:
        """[rows, width] random ids."""
        top = min(self.model.config.vocab_size, len(self.tokenizer)) - 5
        return torch.randint(5, top, (rows, width), device=self.model.device)

    def texts(self, way: Way) -> list[str]:
        """Prompts of one length, or of several and four times as many."""
        if not way.mixed:
            return [ASKED[0]] * way.rows
        return [ASKED[i % len(ASKED)] * (1 + i % 3) for i in range(4 * way.rows)]


def measure(context: Context, subject: Subject, way: Way) -> None:
    """Write once to warm up, then until a second is over, three times at most; the median counts."""
    write = writer(subject, way)
    first, _ = _clocked(context, write)
    took: list[float] = []
    tokens = 0
    while not took or (len(took) < 3 and sum(took) < 1 and not context.tiny):
        again, tokens = _clocked(context, write)
        took.append(again)
    speed = tokens / sorted(took)[len(took) // 2]
    base = context.report.find("decode", f"{subject.label}, batch {way.rows}: autoregressive")
    context.report.add(
        "decode", title(subject.label, way), tokens_per_second=speed, seconds=tokens / speed,
        first_seconds=first,
        times_autoregressive=speed / base["tokens_per_second"] if base else None,
    )  # fmt: skip
    if way.timed:  # apart, for it waits for the GPU in every call
        timed = Timed(subject.model)
        again, _ = _clocked(context, _ours(subject, way, timed))
        context.report.add("decode shares", title(subject.label, way), **shares(context, timed, again))


def _clocked(context: Context, write: Callable[[], int]) -> tuple[float, int]:
    """Seconds, and the tokens written."""
    _wait(context)
    begun = time.perf_counter()
    tokens = write()
    _wait(context)
    return time.perf_counter() - begun, tokens


def _wait(context: Context) -> None:
    if context.cuda:
        torch.cuda.synchronize()


def writer(subject: Subject, way: Way) -> Callable[[], int]:
    """What writes the answers and says how many tokens they have."""
    if way.how is None:
        prompts = subject.prompts(way.rows)
        if way.name.startswith("published"):
            window, steps = (64, 4) if subject.context.tiny else (512, 64)
            return published(subject.model, prompts, window, steps, subject.tokens)
        cache = "static" if "static" in way.name else "dynamic"
        return autoregressive(subject.causal, prompts, subject.tokens, cache, "compiled" in way.name)
    model: Any = subject.model
    if way.accelerate == "compile":
        subject.model.backbone.compile(dynamic=False)
    if way.accelerate:
        model = BucketedModel(model, graphs=way.accelerate == "graphs")
    return _ours(subject, way, model)


def _ours(subject: Subject, way: Way, model: Any) -> Callable[[], int]:
    how, sampler, texts = way.how or {}, Sampler(model, subject.tokenizer), subject.texts(way)
    limit: dict[str, Any] = {} if "window" in how else {"max_tokens": subject.tokens}

    def write() -> int:
        outs = sampler.generate(texts, batch_size=way.rows, seed=list(range(len(texts))), **how, **limit)
        return sum(len(out.token_ids) for out in outs)

    return write


def shares(context: Context, timed: Any, took: float) -> dict[str, Any]:
    """Which part of the time is not the model's, and which the model would need at the machine's ceilings."""
    model = timed.model
    weights = sum(p.numel() for p in model.layers.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    ceiling = ceilings(context)
    floor = max(timed.calls * size / ceiling["copy"], 2 * weights * timed.positions / ceiling["matmul"])
    return {
        "sampling": 1 - sum(timed.seconds.values()) / took, "goal_sampling": "<= 0.05",
        "roofline": floor / took, "goal_roofline": ">= 0.5 at batch 64",
        "forward_roofline": floor / max(timed.seconds["forward"], 1e-9),
        "calls": timed.calls, "positions": timed.positions, "seconds_timed": took,
    }  # fmt: skip


def goals(context: Context, label: str) -> None:
    """What the goals ask for, beside what was measured."""
    found = [
        context.report.find("decode", f"{label}, batch 1: rate 4{more}")
        for more in ("", ", graphs", ", reuse")
    ]
    ratios = [r["times_autoregressive"] for r in found if r and r["times_autoregressive"]]
    context.report.add(
        "goals", "decode", times_autoregressive=max(ratios, default=None), goal=">= 5 at batch 1, rate 4"
    )
