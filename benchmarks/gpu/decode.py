"""Stage `decode`: tokens per second of the default model's shape and of LLaDA-8B's, with random weights.

A random model almost never ends an answer, so every answer has all its tokens, whatever the decoder. Compared
are ours at several paces and options, the loop of the published code, and the same backbone made causal:
greedy decoding with a static cache and a CUDA graph for a token (the baseline of all ratios), and `generate`
of transformers with a dynamic cache and with a static one, compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.gpu.baselines import Graphed, Timed, as_causal, autoregressive, published
from benchmarks.gpu.context import Context, ceilings, free, time_limit
from benchmarks.gpu.material import LLADA_8B, MINIATURE, SMOLLM2, shaped
from benchmarks.gpu.profiling import profile
from decoding import Engine, Sampler
from decoding.canvas import Row
from decoding.request import Request
from dlm.graphs import BucketedModel

ANSWER = 64
"""Tokens of an answer."""

SLOW = 2.0
"""Seconds of a first answer beyond which little is repeated."""

ASKED = "Give three tips for staying healthy."


@dataclass(frozen=True)
class Way:
    """A way to write answers.

    Attributes:
        name: in the report.
        rows: answers at a time.
        how: arguments of `Sampler.generate`; for baselines none.
        accelerate: "", "graphs" or "compile" as in `LoadConfig`; "layers" compiles each layer, which takes
            seconds where "compile" takes minutes; "graphs of layers" records compiled layers.
        baseline: "dynamic", "graphs" or "compiled" for `generate` with such a cache; "published" for the
            published loop; "" for ours.
        lengths: shortest and longest answer of rows that an engine decodes, instead of `tokens`.
        tokens: of an answer.
        timed: with the time in the model apart, for the shares of sampling and of the roofline.
        profiled: the kernels and the host's operations of a whole answer are listed instead.
        seconds: that it may take, with warm-up; it is stopped then.
    """

    name: str
    rows: int
    how: dict[str, Any] = field(default_factory=dict)
    accelerate: str = ""
    baseline: str = ""
    lengths: tuple[int, int] | None = None
    tokens: int = ANSWER
    timed: bool = False
    profiled: bool = False
    seconds: float = 12.0


RATE_4, RATE_1 = {"decoder": "conv", "rate": 4.0}, {"decoder": "conv", "rate": 1.0}
REUSED = {"decoder": "conv", "rate": 4.0, "reuse": "dual"}
BOUND = {"decoder": "entropy-bound", "options": {"kernel_size": 9}}
DEFAULT = {"decoder": "entropy-bound", "options": {"kernel_size": 3, "frequency_penalty": 0.6}}
IN_BLOCKS = {"block_size": 16, "causal_context": True}
BLOCKS = {"decoder": "llada", "options": {"block_size": 32}, "window": 128, "steps": 32}
CAUSAL = "autoregressive, static cache, graphs"
PUBLISHED = "published loop, L=512, S=64"


def core(rows: int, tokens: int = ANSWER) -> Iterator[Way]:
    """Ours with graphs against autoregressive decoding with graphs."""
    yield Way(CAUSAL, rows, baseline="graphs", tokens=tokens)
    yield Way("rate 4, graphs", rows, RATE_4, "graphs", tokens=tokens, timed=True)


def block_ways() -> Iterator[Way]:
    """The default model's way to decode, in blocks with a cache; drafts for few rows."""
    for rows in (1, 64):
        yield Way(CAUSAL, rows, baseline="graphs")
        yield Way("as the default model", rows, DEFAULT, timed=True)
    for drafts in (1, 3, 8):
        yield Way(f"as the default model, {drafts} drafts", 1, {**DEFAULT, "drafts": drafts})
    yield Way("rate 4", 1, RATE_4)
    yield Way("rate 4", 64, RATE_4)


def first_ways() -> Iterator[Way]:
    """The most important of a small model."""
    yield from core(1)
    yield from core(8)
    yield from core(64)
    yield Way("rate 1, graphs", 1, RATE_1, "graphs")
    yield Way("entropy bound, graphs", 1, BOUND, "graphs", timed=True)
    yield Way("rate 4", 1, RATE_4, timed=True)
    yield Way("rate 4", 64, RATE_4, timed=True)


def large_ways() -> Iterator[Way]:
    """All of a large model."""
    yield from core(1)
    yield from core(64)
    yield Way("entropy bound, graphs", 1, BOUND, "graphs")
    yield Way("rate 1, graphs", 1, RATE_1, "graphs")
    yield from core(256, tokens=16)  # a call takes most of a second


def other_ways() -> Iterator[Way]:
    """The rest of a small model."""
    yield from core(256)
    for accelerate in ("", "graphs"):
        for name, lengths in (("mixed lengths, 32 to 512", (32, 512)), ("equal lengths, 272", (272, 272))):
            more = ", graphs" if accelerate else ""
            yield Way(f"rate 4, {name}{more}", 64, RATE_4, accelerate, lengths=lengths, seconds=25)
    yield Way("llada, blocks of 32, 32 steps, graphs", 64, BLOCKS, "graphs")
    yield Way("entropy bound, graphs", 64, BOUND, "graphs", timed=True)
    for rows in (1, 64):
        yield Way("rate 4, graphs, profile", rows, RATE_4, "graphs", profiled=True)
    yield Way("rate 4, reuse", 1, REUSED)
    yield Way("rate 4, reuse", 64, REUSED)
    yield Way("autoregressive", 1, baseline="dynamic")
    yield Way("autoregressive", 64, baseline="dynamic")
    for rows in (1, 64):
        yield Way("rate 4, graphs of compiled layers", rows, RATE_4, "graphs of layers", seconds=40)
    yield Way("rate 4, compiled layers", 64, RATE_4, "layers", seconds=30)
    yield Way("rate 4, compiled", 1, RATE_4, "compile", seconds=60)
    yield Way("autoregressive, static cache, compiled", 1, baseline="compiled", seconds=60)
    yield Way("rate 4, compiled", 64, RATE_4, "compile", seconds=60)
    yield Way(PUBLISHED, 1, baseline="published", seconds=10)


def run(context: Context) -> None:
    """The small model where it matters most, in blocks too, then the large one, then what is left."""
    if context.tiny:
        shape = {**MINIATURE, "vocab_size": SMOLLM2["vocab_size"]}
        chosen: dict[str, Way] = {}
        for way in (*first_ways(), *other_ways()):
            chosen.setdefault(way.name, way)  # at one batch each
        measure_all(context, "tiny", shape, list(chosen.values()))
        in_blocks = {way.name: way for way in block_ways() if way.rows == 1}
        measure_all(context, "tiny in blocks", {**shape, **IN_BLOCKS}, list(in_blocks.values()))
        return
    measure_all(context, "135M", SMOLLM2, [*first_ways()])
    measure_all(context, "135M in blocks of 16", {**SMOLLM2, **IN_BLOCKS}, [*block_ways()])
    if context.cuda:
        measure_all(context, "8B", LLADA_8B, [*large_ways()])
    measure_all(context, "135M", SMOLLM2, [*other_ways()])
    goals(context, "135M")


def measure_all(context: Context, label: str, shape: dict[str, Any], chosen: list[Way]) -> None:
    """Measure one model in each way that is not measured yet and fits into the time, each on its own."""
    due = [way for way in chosen if not context.done("decode", title(label, way))]
    if not due or context.left < 8:
        print(f"[decode] {label}: left out are {', '.join(title(label, way) for way in due)}", flush=True)
        return
    dtype = torch.bfloat16 if context.cuda else torch.float32
    subject = Subject(context, shaped(context.device, dtype, **shape), label)
    for way in due:
        name = title(label, way)
        if context.skip("decode", name, 1 if context.tiny else min(way.seconds, 20)):
            continue
        try:
            with time_limit(min(way.seconds, context.left)):
                measure(context, subject, way)
        except Exception as error:
            context.report.add("failures", name, error=f"{type(error).__name__}: {error}"[:500])
        for part in (subject.model.backbone, *subject.model.layers):
            part._compiled_call_impl = None  # what a way compiled is not the next one's
        free(context.device)
    del subject
    free(context.device)


def title(label: str, way: Way) -> str:
    """Of a measurement, in the report."""
    return f"{setting(label, way)}: {way.name}"


def setting(label: str, way: Way) -> str:
    """The model, the batch and the answers, that measurements are compared in."""
    length = "" if way.tokens == ANSWER else f", answers of {way.tokens}"
    return f"{label}, batch {way.rows}{length}"


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

    def tokens_of(self, way: Way) -> int:
        """Tokens of an answer; in miniature few."""
        return min(way.tokens, self.tokens)

    def rows(self, way: Way) -> int:
        """Answers at a time; in miniature few."""
        return min(way.rows, 2) if self.context.tiny else way.rows

    def prompts(self, rows: int, width: int = 40) -> torch.Tensor:
        """[rows, width] random ids."""
        top = min(self.model.config.vocab_size, len(self.tokenizer)) - 5
        return torch.randint(5, top, (rows, width), device=self.model.device)


def measure(context: Context, subject: Subject, way: Way) -> None:
    """Write once to warm up, then until a second is over, three times at most; the median counts.

    The time in the model is clocked apart, as that waits for the GPU in every call: a matter of microseconds,
    so that an answer of seconds is written no third time for it.
    """
    model = accelerated(subject, way)
    write = writer(subject, way, model)
    if way.profiled:
        profile(context, title(subject.label, way), write, calls=1)
        return
    first, _ = _clocked(context, write)
    timed, took = Timed(model) if way.timed else None, list[float]()
    slow, tokens = first > SLOW and timed is not None, 0
    if timed:
        again, tokens = _clocked(context, writer(subject, way, timed))
        took += [again] if slow else []
    while not took or (len(took) < 3 and sum(took) < 1 and not context.tiny):
        again_untimed, tokens = _clocked(context, write)
        took.append(again_untimed)
    speed = tokens / sorted(took)[len(took) // 2]
    base = context.report.find("decode", f"{setting(subject.label, way)}: {CAUSAL}")
    context.report.add(
        "decode", title(subject.label, way), tokens_per_second=speed, seconds=tokens / speed,
        first_seconds=first,
        times_autoregressive=speed / base["tokens_per_second"] if base else None,
    )  # fmt: skip
    if timed:
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


def accelerated(subject: Subject, way: Way) -> Any:
    """The model as the way has it."""
    model = subject.model
    parts = {"compile": [model.backbone], "layers": model.layers, "graphs of layers": model.layers}
    for part in () if subject.context.tiny else parts.get(way.accelerate, ()):
        part.compile(dynamic=False)
    return BucketedModel(model, graphs="graphs" in way.accelerate) if way.accelerate else model


def writer(subject: Subject, way: Way, model: Any) -> Callable[[], int]:
    """A function that writes the answers and returns their number of tokens."""
    rows = subject.rows(way)
    if way.lengths:
        return mixed(subject, way, model)
    if not way.baseline:
        return _ours(subject, way, model)
    prompts = subject.prompts(rows)
    if way.baseline == "published":
        window, steps = (64, 4) if subject.context.tiny else (512, 64)
        return published(subject.model, prompts, window, steps, subject.tokens)
    if way.baseline == "graphs":
        return Graphed(subject.causal, prompts, subject.tokens_of(way)).write
    compiled = way.baseline == "compiled" and not subject.context.tiny
    cache = "dynamic" if way.baseline == "dynamic" else "static"
    return autoregressive(subject.causal, prompts, subject.tokens, cache, compiled)


def _ours(subject: Subject, way: Way, model: Any) -> Callable[[], int]:
    sampler, texts = Sampler(model, subject.tokenizer), [ASKED] * subject.rows(way)
    limit: dict[str, Any] = {} if "window" in way.how else {"max_tokens": subject.tokens_of(way)}

    def write() -> int:
        outs = sampler.generate(texts, batch_size=way.rows, seed=list(range(len(texts))), **way.how, **limit)
        return sum(len(out.token_ids) for out in outs)

    return write


def mixed(subject: Subject, way: Way, model: Any) -> Callable[[], int]:
    """Answers of evenly spread lengths through an engine, twice as many as are at work at a time."""
    assert way.lengths is not None
    rows, (least, most) = subject.rows(way), way.lengths
    if subject.context.tiny:
        least, most = least // 8, most // 8
    sizes = [least + (most - least) * i // (2 * rows - 1) for i in range(2 * rows)]
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).tolist()
    plan = Request(**way.how, max_tokens=most).resolve(subject.model)
    prompts = subject.prompts(len(sizes)).cpu().tolist()

    def write() -> int:
        engine = Engine(model, subject.tokenizer, max_rows=rows)
        for seed, i in enumerate(order):
            engine.submit(Row(prompts[i] + [plan.mask_id] * sizes[i], len(prompts[i])), plan, seed)
        while len(engine):
            engine.step()
        return sum(sizes)

    return write


def shares(context: Context, timed: Any, took: float) -> dict[str, Any]:
    """The share of time outside the model, and that which the model would need at the machine's ceilings."""
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
    """The goals beside the measurements."""
    found = [context.report.find("decode", f"{label}, batch 1: rate 4{more}") for more in ("", ", graphs")]
    ratios = [r["times_autoregressive"] for r in found if r and r["times_autoregressive"]]
    context.report.add(
        "goals", "decode", times_autoregressive=max(ratios, default=None), goal=">= 5 at batch 1, rate 4"
    )
