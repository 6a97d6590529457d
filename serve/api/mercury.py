"""Mercury's paths for infilling and editing: /v1/fim/completions and /v1/edit/completions."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from decoding.gaps import Gap, Piece, without_span
from serve.api import schema
from serve.api.fill import Filled, Filling, between, fill, fill_suffix, prepare_filling
from serve.api.openai import streamed
from serve.api.parameters import Sampling, faults_named, head, usage
from serve.api.sse import Events, sse_event, stream
from serve.errors import APIError
from serve.service import Service

REGION = re.compile(r"<\|code_to_edit\|>(.*?)<\|/code_to_edit\|>", re.DOTALL)
"""The words to write again, in Mercury's marks."""

WHOLE_FILE = re.compile(r"<\|current_file_content\|>(.*?)<\|/current_file_content\|>", re.DOTALL)
"""The file that they stand in."""

MARK = re.compile(
    r"<\|cursor\|>|^<\|/?[a-z_]+\|>[ \t\r]*(?:\n|\Z)|<\|/?[a-z_]+\|>|^current_file_path:[^\n]*\n",
    re.MULTILINE,
)
"""The cursor; other marks, with their line where they fill it; and lines about the file."""


class FimRequest(schema.CompletionRequest):
    """Body of /v1/fim/completions: `prompt`, `suffix`."""

    prompt: str
    suffix: str = ""


class EditRequest(Sampling):
    """Body of /v1/edit/completions: a text and a span of it, or a message with Mercury's marks."""

    model: str | None = None
    text: str | None = Field(None, description="The text.")
    span: str | Annotated[list[int], Field(min_length=2, max_length=2)] | None = Field(
        None, description="Words that occur once, or where they begin and end in characters."
    )
    instruction: str | None = Field(None, description="What the text is the answer to.")
    messages: Annotated[list[schema.ChatMessage], Field(min_length=1, max_length=1)] | None = None
    min_tokens: int | None = Field(None, ge=1, description="Shortest replacement; with max_tokens.")
    max_tokens: int | None = Field(None, ge=1, description="Longest replacement; as long as before.")
    stream: bool | None = None

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "n": (1,),
        "stop": ([],),
        "return_metadata": (False,),
    }


def marked(message: str) -> tuple[str, tuple[int, int]]:
    """The file in a message with Mercury's marks, and where the words to edit stand in it.

    Raises:
        APIError: 400, for a message without them.
    """
    file = WHOLE_FILE.search(message)
    text = file[1] if file else message
    region = REGION.search(text)
    if region is None:
        raise APIError(
            400,
            "the message holds no <|code_to_edit|>…<|/code_to_edit|>",
            param="messages",
            code="invalid_value",
        )
    prefix, suffix = (MARK.sub("", part) for part in (text[: region.start()], text[region.end() :]))
    words = region[1].strip("\r\n")
    words = MARK.sub("", words)
    return prefix + words + suffix, (len(prefix), len(prefix) + len(words))


def _pieces(service: Service, body: EditRequest) -> list[Piece]:
    if body.messages is not None:
        if body.text is not None or body.span is not None:
            raise APIError(400, "give messages, or a text and a span", param="messages")
        text, span = marked(body.messages[0].text)
        where: str | tuple[int, int] = span
    elif body.text is None or body.span is None:
        raise APIError(400, "give a text and a span of it, or messages", param="text")
    else:
        text = body.text
        where = body.span if isinstance(body.span, str) else (body.span[0], body.span[1])
    gap = None
    if body.min_tokens is not None and body.max_tokens is None:
        raise APIError(400, "min_tokens needs max_tokens", param="min_tokens", code="invalid_value")
    if body.max_tokens is not None:
        gap = Gap(body.min_tokens or 1, body.max_tokens, coarse=True)
    return without_span(text, where, gap, lambda words: len(service.rows.text(words)))


class _Handlers:
    """Handlers of this interface.

    Args:
        service: decodes.
    """

    def __init__(self, service: Service) -> None:
        self.service = service

    async def fim(self, body: FimRequest, http: Request) -> Response:
        """Fill the gap between a prompt and a suffix."""
        self.service.check_model(body.model)
        self.service.check_ready()
        return await fill_suffix(self.service, body, http)

    async def edit(self, body: EditRequest, http: Request) -> Response:
        """Write a span of a text again; the answer is the new text of the span."""
        service = self.service
        service.check_model(body.model)
        service.check_ready()

        def prepare() -> tuple[Filling, list[Piece]]:
            with faults_named():
                pieces = _pieces(service, body)
            return prepare_filling(service, pieces, body.instruction, body), pieces

        filling, pieces = await service.prepare(http, prepare)
        opening = head("chatcmpl", service.config.served_name)
        if body.stream:
            return stream(self._edit_events(filling, pieces, body.timeout, opening))
        (filled,) = await service.unless_gone(http, fill(service, filling, body.timeout))
        message = {
            "role": "assistant",
            "content": _content(filled, pieces),
            "refusal": None,
        }
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        response = {
            **opening,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(filling.prompt_tokens, filled.written),
        }
        return JSONResponse(response)

    async def _edit_events(
        self, filling: Filling, pieces: list[Piece], timeout: float | None, opening: dict[str, Any]
    ) -> Events:
        (filled,) = await fill(self.service, filling, timeout)
        delta = {"role": "assistant", "content": _content(filled, pieces)}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": "stop"}
        yield sse_event({**opening, "object": "chat.completion.chunk", "choices": [choice]})


def router(service: Service) -> APIRouter:
    """The paths of this interface."""
    api, handlers = APIRouter(prefix="/v1", tags=["Mercury"]), _Handlers(service)
    api.post("/fim/completions", responses=streamed(schema.Completion))(handlers.fim)
    api.post("/edit/completions", responses=streamed(schema.ChatCompletion))(handlers.edit)
    return api


def _content(filled: Filled, pieces: list[Piece]) -> str:
    """The text in the place of the span."""
    return between(filled, str(pieces[0]), str(pieces[-1]))
