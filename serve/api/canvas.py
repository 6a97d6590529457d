"""The native interface, /v1/canvas: every cell of an answer, as it is written.

A canvas is an answer to a prompt, in which texts may be given, or a text with gaps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict
from functools import cache
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from decoding.canvas import Canvas
from decoding.cells import Cell, cells
from decoding.engine import Update
from decoding.gaps import OPEN_GAP, pieces_of
from decoding.presets import Decoder, presets
from decoding.request import Plan
from decoding.row_maker import Prompt
from dlm.errors import ConfigError
from serve.api import schema
from serve.api.fill import Filled, Filling, fill, filling_steps, prepare_filling
from serve.api.openai import ERRORS, streamed
from serve.api.parameters import (
    Generation,
    Sampling,
    Texts,
    check_bias,
    faults_named,
    first_seed,
    new_id,
    stop_texts,
    usage,
)
from serve.api.sse import Events, sse_event, stream
from serve.errors import APIError
from serve.job import Sample
from serve.service import Service

Decode = Callable[..., str]
"""Text of token ids."""

CHARACTER = 4
"""Most tokens of one character: UTF-8 has no longer ones."""


class CanvasRequest(Sampling):
    """Body of /v1/canvas: a text with gaps, or a prompt to answer."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"n": (1,), "return_metadata": (False,)}

    model: str | None = None
    text: str | None = Field(
        None, description="Text with gaps: <mask:3>, <mask:2-6>, or <mask> (up to max_tokens)."
    )
    prompt: str | None = Field(None, description="The user's words.")
    messages: Annotated[list[schema.ChatMessage], Field(min_length=1)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stop: Texts | None = None
    stream: bool | None = None


class CellModel(BaseModel):
    """One position behind the prompt."""

    token_id: int
    text: str
    state: Literal["given", "written", "open", "shut"]
    probability: float | None
    step: int | None


class CanvasResponse(BaseModel):
    """Response of /v1/canvas."""

    id: str
    object: Literal["canvas"] = "canvas"
    created: int
    model: str
    text: str
    gaps: list[str] | None = None
    candidate: int | None = Field(None, description="Which of the lengths that were tried it is, from 0.")
    cells: list[CellModel]
    finish_reason: Literal["stop", "length"]
    step: int
    model_calls: int
    seed: int
    usage: schema.Usage


class DecoderModel(BaseModel):
    """A decoder and its options."""

    name: str
    summary: str
    paper: str
    exact: bool
    timed: bool
    """True where the pace must be a number of steps."""
    options: dict[str, Any]


class DecoderList(BaseModel):
    """Response of /v1/decoders."""

    default: str
    default_options: dict[str, Any]
    data: list[DecoderModel]


def _canvas_prompt(body: CanvasRequest) -> Prompt | None:
    """Prompt that the canvas answers; None for a text that stands alone.

    Raises:
        APIError: 400.
    """
    if body.prompt is not None and body.messages is not None:
        raise APIError(400, "give prompt or messages, not both", param="messages")
    if body.messages is None:
        return body.prompt
    return [{"role": turn.role, "content": turn.text} for turn in body.messages]


def _answer_sample(service: Service, body: CanvasRequest) -> Sample:
    """The row of an answer in which texts may be given."""
    prompt = _canvas_prompt(body)
    if prompt is None:
        raise APIError(400, "give a prompt, messages, or a text with gaps", param="prompt")
    generation = Generation(body, body.max_tokens, stop_texts(body.stop))
    generation.check(service.config)

    def sample() -> Sample:
        ids = service.rows.prompt(prompt)
        request = generation.request(len(ids))
        request.check_decoder()
        check_bias(service, body)
        plan = request.resolve(service.spec)
        row = service.rows.answer_row(ids, plan)
        row.stages(plan)  # refused here, before a stream begins
        return Sample(row, plan, first_seed(body.seed))

    with faults_named():
        answer = sample()
    service.check_samples([answer])
    return answer


def _canvas_filling(service: Service, body: CanvasRequest) -> Filling:
    """The rows of a text with gaps."""
    if body.stop:
        raise APIError(400, "stop means nothing for a text with gaps", param="stop")
    text, prompt = body.text or "", _canvas_prompt(body)

    try:
        pieces = pieces_of(text, body.max_tokens or OPEN_GAP)
    except ConfigError as error:
        raise APIError(400, str(error), param="text", code="invalid_value") from error
    return prepare_filling(service, pieces, prompt, body)


def cell_texts(listed: Sequence[Cell], decode: Decode) -> list[str]:
    """The text of each cell, empty for masks; a character of several tokens stands whole at the first."""
    out: list[str] = []
    while len(out) < len(listed):
        length, text = _character(listed[len(out) : len(out) + CHARACTER], decode)
        out += [text] + [""] * (length - 1)
    return out


def _character(listed: Sequence[Cell], decode: Decode) -> tuple[int, str]:
    """The fewest tokens from the first on that are whole characters, and their text; else the first alone."""
    ids = [cell.token_id for cell in takewhile(lambda cell: cell.state in ("given", "written"), listed)]
    if not ids:
        return 1, ""
    for length in range(1, len(ids) + 1):
        text = decode(*ids[:length])
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return length, text
    return 1, decode(ids[0])


class _View:
    """A canvas as JSON.

    Args:
        tokenizer: the model's.
        model: name of the model.
    """

    def __init__(self, tokenizer: Any, model: str) -> None:
        self.decode: Decode = cache(lambda *ids: str(tokenizer.decode(list(ids))))
        self.head = {"id": new_id("canvas"), "object": "canvas", "created": int(time.time()), "model": model}

    def cells(self, canvas: Canvas, plan: Plan) -> list[dict[str, Any]]:
        """Every cell, with its text."""
        listed = cells(canvas, plan)
        texts = cell_texts(listed, self.decode)
        return [{**asdict(cell), "text": text} for cell, text in zip(listed, texts, strict=True)]

    def answer(self, canvas: Canvas, update: Update, sample: Sample) -> dict[str, Any]:
        """The response for a finished answer."""
        output = update.output
        assert output is not None
        tokens = len(output.token_ids)
        return {
            **self.head,
            "text": output.text,
            "gaps": None,
            "candidate": None,
            "cells": self.cells(canvas, update.plan)[:tokens],
            "finish_reason": output.finish_reason,
            "step": int(canvas.step[0]),
            "model_calls": output.model_calls,
            "seed": sample.seed,
            "usage": usage(sample.row.answer_start, tokens),
        }

    def filled(self, filled: Filled, prompt_tokens: int) -> dict[str, Any]:
        """The response for a text with gaps."""
        return {
            **self.head,
            "text": filled.result.text,
            "gaps": filled.result.gaps,
            "cells": self.cells(filled.canvas, filled.plan),
            "candidate": filled.candidate,
            "finish_reason": "stop",
            "step": int(filled.canvas.step[0]),
            "model_calls": filled.result.model_calls,
            "seed": filled.seed,
            "usage": usage(prompt_tokens, filled.written),
        }


class _Steps:
    """The canvas of a row after each step as JSON: whole at first, then the cells that have changed.

    Args:
        view: makes JSON of canvases.
    """

    def __init__(self, view: _View) -> None:
        self._view = view
        self._last: dict[int, list[dict[str, Any]]] = {}  # by ticket

    def __call__(self, update: Update) -> dict[str, Any]:
        """Data of the event; to be called once for each step of a row."""
        canvas = update.canvas
        listed, previous = self._view.cells(canvas, update.plan), self._last.get(update.ticket)
        self._last[update.ticket] = listed
        data: dict[str, Any] = {
            "step": int(canvas.step[0]),
            "model_calls": int(canvas.model_calls[0]),
            "text": update.event.text,
        }
        if previous is None or len(previous) > len(listed):
            return {**data, "cells": listed}
        fresh = [i for i, cell in enumerate(listed) if i >= len(previous) or cell != previous[i]]
        return {**data, "changes": [{"index": i, **listed[i]} for i in fresh]}


class _Canvases:
    """The two kinds of canvas, whole or as a stream.

    Args:
        service: decodes.
        view: makes JSON of canvases.
        body: the request.
    """

    def __init__(self, service: Service, view: _View, body: CanvasRequest) -> None:
        self.service, self.view, self.body = service, view, body

    async def answer_events(self, sample: Sample) -> Events:
        """Each step of an answer, then the answer."""
        async with aclosing(self._answer(sample, _Steps(self.view))) as items:
            async for finished, value in items:
                yield sse_event(value, "done" if finished else "canvas")

    async def _answer(self, sample: Sample, watch: Callable[[Update], Any] | None) -> Any:
        def finish(update: Update) -> dict[str, Any]:
            return self.view.answer(update.canvas, update, sample)

        notices = self.service.notices([sample], watch=watch, finish=finish, timeout=self.body.timeout)
        async with aclosing(notices):
            async for notice in notices:
                yield notice.finished, notice.value

    async def answer(self, sample: Sample) -> dict[str, Any]:
        """The finished answer."""
        async with aclosing(self._answer(sample, None)) as items:
            async for _, value in items:
                return value  # type: ignore[no-any-return]
        raise AssertionError("an answer without an end")

    async def filled_events(self, filling: Filling) -> Events:
        """Each step of a text with gaps, of every length that is tried, then the text."""
        many, watch = filling.lengths > 1, _Steps(self.view)
        async with aclosing(filling_steps(self.service, filling, self.body.timeout, watch)) as steps:
            async for value in steps:
                if isinstance(value, list):
                    yield sse_event(self.view.filled(value[0], filling.prompt_tokens), "done")
                else:
                    yield sse_event({**({"candidate": value.index} if many else {}), **value.value}, "canvas")

    async def filled(self, filling: Filling) -> dict[str, Any]:
        """The filled text."""
        (result,) = await fill(self.service, filling, self.body.timeout)
        return self.view.filled(result, filling.prompt_tokens)


class _Handlers:
    """Handlers of this interface.

    Args:
        service: decodes.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    async def canvas(self, body: CanvasRequest, http: Request) -> Response:
        """Write an answer, or fill the gaps of a text, and tell of every cell.

        As a stream: `event: canvas` after each step but the last, with all `cells` at first and then those
        that have changed (`changes`, each with its `index`); then `event: done` with all cells. The lengths
        of a gap that are tried are told apart by `candidate`.
        """
        service = self.service
        service.check_model(body.model)
        service.check_ready()
        view = _View(service.tokenizer, service.config.served_name)
        canvases = _Canvases(service, view, body)
        if body.text is not None:
            filling = await service.prepare(http, lambda: _canvas_filling(service, body))
            if body.stream:
                return stream(canvases.filled_events(filling), done=False, error_name="error")
            return JSONResponse(await service.unless_gone(http, canvases.filled(filling)))
        sample = await service.prepare(http, lambda: _answer_sample(service, body))
        if body.stream:
            return stream(canvases.answer_events(sample), done=False, error_name="error")
        return JSONResponse(await service.unless_gone(http, canvases.answer(sample)))

    async def decoders(self) -> Any:
        """List the decoders that this model can be decoded with, and their options."""
        self.service.check_loaded()
        spec = self.service.spec
        defaults = spec.defaults
        listed = [
            {
                "name": name,
                "summary": preset.summary,
                "paper": preset.paper,
                "exact": preset.exact,
                "timed": Decoder.named(name).timed,
                "options": preset.options,
            }
            for name, preset in presets().items()
            if Decoder.named(name).goes_with(spec)
        ]
        return {"default": defaults.decoder, "default_options": defaults.options, "data": listed}


def router(service: Service) -> APIRouter:
    """The paths of this interface."""
    api, handlers = APIRouter(prefix="/v1", tags=["dlm"]), _Handlers(service)
    api.post("/canvas", responses=streamed(CanvasResponse))(handlers.canvas)
    api.get("/decoders", response_model=DecoderList, responses=ERRORS)(handlers.decoders)
    return api
