"""Gaps in texts: the suffix of /v1/completions, and the way in which all interfaces fill gaps."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from decoding.canvas import Canvas
from decoding.engine import Update
from decoding.gaps import Gap, Piece, combinations
from decoding.infill import Infilled, gap_scores, likeliest, rows_with_gaps
from decoding.request import Plan
from decoding.row_maker import Prompt
from serve.api import schema
from serve.api.parameters import (
    Sampling,
    check_bias,
    check_rows,
    faults_named,
    first_seed,
    head,
    usage,
    wrapped,
)
from serve.api.sse import Events, sse_event, stream
from serve.errors import APIError
from serve.job import Notice, Sample
from serve.service import Service

SCORED = 4
"""Rows of one call that compares lengths; at least 2."""


@dataclass(frozen=True)
class Filled:
    """A text with its gaps filled, and the row that it is."""

    result: Infilled
    canvas: Canvas
    plan: Plan
    seed: int
    candidate: int = 0
    """Number of the length among those that were tried."""

    @property
    def written(self) -> int:
        """Number of tokens in the gaps."""
        return sum(step >= 0 for step in self.result.reveal_step)


@dataclass(frozen=True)
class Filling:
    """A text whose gaps are to be filled: the rows of all lengths that are tried, under each seed."""

    plan: Plan
    samples: list[Sample]
    seeds: list[int]

    @property
    def lengths(self) -> int:
        """Number of lengths that are tried."""
        return len(self.samples) // len(self.seeds)

    @property
    def prompt_tokens(self) -> int:
        """Tokens that are given."""
        ids = self.samples[0].row.ids
        return sum(token != self.plan.mask_id for token in ids)


def prepare_filling(
    service: Service, pieces: Sequence[Piece], prompt: Prompt | None, sampling: Sampling, n: int = 1
) -> Filling:
    """Rows of a text with gaps; to be called on the thread that encodes.

    Raises:
        APIError: 400, for a text that does not fit and parameters that mean nothing here.
    """
    if n > service.config.max_n:
        raise APIError(400, f"n must be at most {service.config.max_n}, got {n}", param="n")
    check_rows(service.config, combinations(pieces) * n, "n" if n > 1 else None)
    with faults_named():
        return _rows_of_lengths(service, pieces, prompt, sampling, n)


def _rows_of_lengths(
    service: Service, pieces: Sequence[Piece], prompt: Prompt | None, sampling: Sampling, n: int
) -> Filling:
    request = sampling.request()
    request.check_decoder()
    check_bias(service, sampling)
    plan = service.rows.plan_gaps(request)
    rows = rows_with_gaps(service.rows, pieces, prompt, plan, "the text")
    for row, clamped in rows:
        row.stages(clamped)  # refused here, before a stream begins
    seeds = [wrapped(first_seed(sampling.seed) + i) for i in range(n)]
    samples = [Sample(row, clamped, seed) for seed in seeds for row, clamped in rows]
    service.check_samples(samples)
    return Filling(plan, samples, seeds)


async def fill(service: Service, filling: Filling, timeout: float | None) -> list[Filled]:
    """The text with its gaps filled, once for each seed; the likeliest length is taken."""
    async with aclosing(filling_steps(service, filling, timeout)) as steps:
        async for value in steps:
            return value  # type: ignore[no-any-return]
    raise AssertionError("a text without an end")


async def filling_steps(
    service: Service, filling: Filling, timeout: float | None, watch: Callable[[Update], Any] | None = None
) -> AsyncGenerator[Any, None]:
    """Notices with the results of `watch` for each step, then the filled texts, see `fill`.

    Where several lengths are tried, their last steps are among them.
    """
    many = filling.lengths > 1

    def finish(update: Update) -> tuple[Canvas, Any]:
        return update.canvas, watch(update) if watch is not None and many else None

    with service.worker.held():
        canvases: dict[int, Canvas] = {}
        notices = service.notices(
            filling.samples,
            watch=watch,
            finish=finish,
            timeout=timeout,
            prompt_tokens=filling.prompt_tokens,
            counted=False,
        )
        async with aclosing(notices):
            async for notice in notices:
                if notice.finished:
                    canvases[notice.index], value = notice.value
                    notice = Notice(notice.index, value)
                if notice.value is not None:
                    yield notice
        size = filling.lengths
        tries = [[canvases[i * size + j] for j in range(size)] for i in range(len(filling.seeds))]
        results = [await _best(service, filling, *pair) for pair in zip(tries, filling.seeds, strict=True)]
        service.metrics.generation_tokens.inc(sum(each.written for each in results))
        yield results


async def _best(service: Service, filling: Filling, tries: list[Canvas], seed: int) -> Filled:
    """The likeliest of the lengths that were tried; compared in slices, between steps of others."""
    scores: list[float] = []
    size, plan = len(tries), filling.plan
    for first in range(0, size, SCORED):
        last = first + SCORED
        part = tries[first : size if size - last == 1 else last]  # one alone would not be compared
        if first and len(part) == 1:
            break
        scores += await service.call(partial(gap_scores, tries=part, plan=plan, batch_size=len(part)))
    best, result = likeliest(tries, scores, service.tokenizer)
    return Filled(result, tries[best], plan, seed, best)


async def fill_suffix(service: Service, body: schema.CompletionRequest, http: Request) -> Response:
    """Answer /v1/completions with a suffix: the text between the two, of any length up to `max_tokens`."""
    for name in ("echo", "logprobs", "stop", "diffusing"):
        value = getattr(body, name)
        if value is not None and value is not False and value != []:
            raise APIError(400, f"{name} means nothing beside a suffix", param=name)
    if not isinstance(body.prompt, str):
        raise APIError(400, "with a suffix, the prompt must be one text", param="prompt")
    if body.stream_options is not None and not body.stream:
        raise APIError(400, "stream_options needs stream to be true", param="stream_options")
    pieces: list[Piece] = [body.prompt, Gap(1, body.max_tokens or 16, coarse=True), body.suffix or ""]
    filling = await service.prepare(http, lambda: prepare_filling(service, pieces, None, body, body.n or 1))
    opening = {**head("cmpl", service.config.served_name), "object": "text_completion"}

    async def answer() -> tuple[list[dict[str, Any]], dict[str, int]]:
        results = await fill(service, filling, body.timeout)
        choices = [_choice(i, result, body, filling) for i, result in enumerate(results)]
        written = sum(result.written for result in results)
        return choices, usage(filling.prompt_tokens, written)

    async def events() -> Events:
        choices, tokens = await answer()
        options = body.stream_options or schema.StreamOptions()
        extra: dict[str, Any] = {"usage": None} if options.include_usage else {}
        extra |= {"usage": tokens} if options.continuous_usage_stats else {}
        for choice in choices:
            yield sse_event({**opening, "choices": [choice], **extra})
        if options.include_usage:
            yield sse_event({**opening, "choices": [], "usage": tokens})

    if body.stream:
        return stream(events())
    choices, tokens = await service.unless_gone(http, answer())
    return JSONResponse({**opening, "choices": choices, "usage": tokens})


def between(filled: Filled, prefix: str, suffix: str) -> str:
    """The text between two that were given; a space before the gap, which the gap took, is not part of it."""
    text = filled.result.text
    if text.startswith(prefix) and text.endswith(suffix):
        return text[len(prefix) : len(text) - len(suffix)]
    return "".join(filled.result.gaps)


def _choice(index: int, filled: Filled, body: schema.CompletionRequest, filling: Filling) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": index,
        "text": between(filled, str(body.prompt), body.suffix or ""),
        "logprobs": None,
        "finish_reason": "stop",
    }
    if body.return_metadata:
        calls, written = filled.result.model_calls, filled.written
        choice["metadata"] = {
            "model_calls": calls,
            "steps": int(filled.canvas.step[0]),
            "tokens_per_call": round(written / max(1, calls), 4),
            "reveal_steps": [step for step in filled.result.reveal_step if step >= 0],
            "prompt_tokens": filling.prompt_tokens,
            "completion_tokens": written,
        }
    return choice
