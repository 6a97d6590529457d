"""Stage `serve`: the server on a GPU, its clients in a process of their own, against the offline batch.

A model of SmolLM2-135M's shape with random weights, in graphs; answers of 64 tokens at rate 4. Throughput of
so many clients over that of `Sampler.iter_generate` with the same prompts, seeds and rows at a time, and the
time to the first text of a stream, alone and beside the other clients.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.context import Context, MaterialError, free, time_limit
from benchmarks.gpu.decode import Subject
from benchmarks.gpu.material import MINIATURE, SMOLLM2, shaped
from decoding import Sampler
from dlm.data.rules import make_examples
from dlm.graphs import BucketedModel

NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "aiohttp")
SECONDS = 30.0
"""Most seconds for one number of clients."""


def run(context: Context) -> None:
    """64 clients, then 256.

    Raises:
        MaterialError: where the server's packages are not installed.
    """
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        raise MaterialError(f"the server needs {', '.join(lacking)}")
    dtype = torch.bfloat16 if context.cuda else torch.float32
    shape = {**MINIATURE, "vocab_size": SMOLLM2["vocab_size"]} if context.tiny else SMOLLM2
    subject = Subject(context, shaped(context.device, dtype, **shape), "serve")
    subject.model.config.generation = {"decoder": "conv", "rate": 4.0}
    model = BucketedModel(subject.model)
    for clients in (4,) if context.tiny else (64, 256):
        name = f"{clients} clients"
        if context.skip("serve", name, 1 if context.tiny else 15):
            continue
        try:
            with time_limit(min(SECONDS, max(context.left, 15))):
                measure(context, subject, model, name, clients)
        except Exception as error:
            context.report.add("failures", f"serve, {name}", error=f"{type(error).__name__}: {error}"[:500])
        free(context.device)


def measure(context: Context, subject: Subject, model: Any, name: str, clients: int) -> None:
    """Throughput beside the offline batch, then the time to the first text; both after a warm-up."""
    from benchmarks.serve_load import FINISHED
    from benchmarks.serve_rig import Standing, load_process

    bodies = requests(2 * clients, subject.tokens)
    limits = {"max_rows": clients, "max_positions": 10**6, "max_waiting": 4 * clients}
    with Standing(model, subject.tokenizer, **limits) as server:
        task: dict[str, Any] = {"url": server.url, "clients": clients, "quiet": True}
        answers = {**task, "kind": "answers", "bodies": bodies}
        load_process(answers, SECONDS)
        offline(model, subject, bodies, clients)
        tokens, seconds, texts = offline(model, subject, bodies, clients)
        result = load_process(answers, SECONDS)
        replies = result["replies"]
        finished = [reply["outcome"] for reply in replies].count(FINISHED)
        context.report.add(
            "serve", name, offline_tokens_per_second=tokens / seconds,
            served_tokens_per_second=sum(reply["tokens"] for reply in replies) / result["seconds"],
            ratio=seconds / result["seconds"], goal="ratio >= 0.9", answers=len(bodies), finished=finished,
            differing=sum(a["text"] != b for a, b in zip(replies, texts, strict=True)),
        )  # fmt: skip
        for kind, background in (("alone", []), (f"beside {clients - 1}", bodies)):
            probe = {
                **task, "kind": "probe", "clients": clients - 1, "bodies": bodies[:8],
                "background": background, "settle": 0.5 if background else 0,
            }  # fmt: skip
            firsts = [reply["first"] for reply in load_process(probe, SECONDS)["replies"]]
            times = [1000 * first for first in firsts if first is not None]
            context.report.add("first text", f"{name}, {kind}", ms=median(times) if times else None)


def requests(count: int, tokens: int) -> list[dict[str, Any]]:
    """Chat completions of one to six instructions, so that their lengths differ; the i-th has the seed i."""
    texts = [example.instruction for example in make_examples(6 * count, seed=3)]
    prompts = [" ".join(texts[6 * i : 6 * i + 1 + i % 6]) for i in range(count)]
    return [
        {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "seed": i}
        for i, prompt in enumerate(prompts)
    ]


def offline(
    model: Any, subject: Subject, bodies: list[dict[str, Any]], rows: int
) -> tuple[int, float, list[str]]:
    """Tokens, seconds and texts of the same answers without a server."""
    begun = time.perf_counter()
    outs = list(
        Sampler(model, subject.tokenizer).iter_generate(
            [body["messages"] for body in bodies], max_tokens=subject.tokens, seed=range(len(bodies)),
            batch_size=rows,
        )
    )  # fmt: skip
    return sum(len(out.token_ids) for out in outs), time.perf_counter() - begun, [out.text for out in outs]
